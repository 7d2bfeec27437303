import ast
import io
import math
import re

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


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A tiny random model with its tokenizer."""
    from tokenwise.models.load import make_or_load_model, train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n"] * 3, vocab_size=280)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 32, **sizes}
    make_or_load_model({"config": config}, seed=0, tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_weights_are_drawn_and_written(saved_model, tmp_path, capsys):
    text, page = "def add(first):\n    return 1", tmp_path / "page.html"
    arguments = ["--method", "top_entropy", "-p", "keep=0.25", "--html", str(page)]
    assert main(["explain", saved_model, text, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"top_entropy (keep 0.25) on {saved_model}"
    rows = [line.split(maxsplit=2) for line in lines[2:-2]]
    assert "".join(ast.literal_eval(token) for _, _, token in rows) == text
    assert rows[0][0] == "-"
    weights = [float(weight) for weight, _, _ in rows[1:]]
    assert set(weights) == {0.0, 1.0}
    # At or above the interpolated quantile.
    assert sum(weights) == math.floor(0.25 * (len(weights) - 1) + 1e-9) + 1
    assert "<h1>top_entropy (keep 0.25) on" in page.read_text(encoding="utf-8")


def test_uniform_weighs_every_token_one(saved_model):
    view = explain.explain(saved_model, "def add", "uniform", {})
    assert view.weights == [None] + [1.0] * (len(view.tokens) - 1)
    assert all(loss > 0 for loss in view.nll[1:])


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("x", [], "at least two"),
        ("x y z " * 30, [], "reads at most 32"),
        ("def add", ["-p", "kep=0.5"], "Did you mean 'keep'?"),
        ("def add", ["-p", "keep=0"], "must|greater"),
    ],
)
def test_unusable_input_is_one_clear_message(saved_model, capsys, text, arguments, message):
    assert main(["explain", saved_model, text, "--method", "top_entropy", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.out == ""


def test_missing_model_is_named(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "absent"), "some text", "--method", "uniform"]) == 2
    assert "absent" in capsys.readouterr().err
