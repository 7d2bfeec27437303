import io

import pytest

from tokenwise.cli import explain
from tokenwise.cli.main import main
from tokenwise.errors import InputError


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("keep=0.5", ("keep", 0.5)),
        ("temperature=1e-3", ("temperature", 1e-3)),
        ("detach=false", ("detach", False)),
        ("strategy=off", ("strategy", "off")),
        ("keep=128 tokens", ("keep", "128 tokens")),
        ("reference=./a=b", ("reference", "./a=b")),
        ("reference=a: b: c", ("reference", "a: b: c")),
    ],
)
def test_fields_are_read_as_in_a_plan(word, expected):
    assert explain._field(word) == expected


@pytest.mark.parametrize("word", ["keep", "=0.5"])
def test_a_field_without_name_or_value_is_refused(word):
    with pytest.raises(InputError, match=r"-p: .*Write -p keep=0\.5"):
        explain._field(word)


def test_token_texts_give_the_text_again():
    text = "  añ 🙂 x\n"
    # A byte-level tokenizer: the emoji's four bytes are two tokens that both cover the whole character.
    offsets = [(0, 0), (2, 4), (5, 6), (5, 6), (7, 8), (8, 9)]
    names = ["<s>", "aÃ±", "ðŁ", "ĻĤ", "x", "Ċ"]
    pieces = explain.token_texts(text, offsets, names)
    assert pieces == ["<s>", "  añ", " 🙂", "·", " x", "\n"]


def test_text_comes_from_the_argument_a_file_or_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("from a file", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert explain._read_text("as it is") == "as it is"
    assert explain._read_text(f"@{file}") == "from a file"
    assert explain._read_text("-") == "from a pipe"


def test_missing_file_is_named(tmp_path, capsys):
    (tmp_path / "text.txt").touch()
    assert main(["explain", "./model", f"@{tmp_path / 'texd.txt'}", "--method", "uniform"]) == 2
    assert "text.txt'?" in capsys.readouterr().err
