import math

import pytest

from tokenwise.comparison.yaml_file import read_yaml
from tokenwise.errors import InputError


def read(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def message(tmp_path, text):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("2e6", 2e6),
        ("-1.5E+2", -150.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("12", 12),
        ("010", 10),
        ("+7", 7),
        ("2_000_000", 2000000),
        ("true", True),
        ("False", False),
        ("off", "off"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("0x1F", "0x1F"),
        ("1e", "1e"),
        ("128 tokens", "128 tokens"),
        ("./mine.py:Mine", "./mine.py:Mine"),
        ("'1e-3'", "1e-3"),
        ("-.inf", -math.inf),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_scalars_are_what_they_look_like(tmp_path, text, expected):
    value = read(tmp_path, f"key: {text}\n")["key"]
    assert value == expected
    assert type(value) is type(expected)


def test_not_a_number(tmp_path):
    assert math.isnan(read(tmp_path, "a: .nan")["a"])


def test_anchors_and_merges_work(tmp_path):
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n"
    assert read(tmp_path, text)["other"] == {"a": 1, "b": 3}


def test_every_key_written_twice_is_named_with_its_line(tmp_path):
    said = message(tmp_path, "a: 1\nb:\n  c: 1\n  c: 2\na: 3\nd: [{e: 1, e: 2}]\n")
    assert said.splitlines() == [
        "plan.yaml line 5: 'a' is there twice. Keep one of them.",
        "plan.yaml line 4: 'c' is there twice. Keep one of them.",
        "plan.yaml line 6: 'e' is there twice. Keep one of them.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n\tb: 2\n", "plan.yaml line 2 column 1: a tab stands where YAML wants spaces."),
        ("a: [1\nb: 2\n", "plan.yaml line 2 column 2: this is not YAML: expected ',' or ']'"),
        ("a: b: c\n", "plan.yaml line 1 column 5: this is not YAML: mapping values are not allowed here."),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "plan.yaml line 2 column 1: this is not YAML: but found another document"),
        ("? [1, {}]\n: 2\n", "found unhashable key"),
        ("a: \x07\n", "plan.yaml: is not YAML"),
    ],
)
def test_broken_yaml_is_located(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "plan.yaml").write_bytes(b"a: \xff")
    with pytest.raises(InputError, match=r"plan\.yaml: is not UTF-8 text \(byte 3\)"):
        read_yaml(tmp_path / "plan.yaml")
    with pytest.raises(InputError, match="Did you mean"):
        read_yaml(tmp_path / "plan.yml")
    with pytest.raises(InputError, match="is a folder"):
        read_yaml(tmp_path)


def test_an_empty_file_is_nothing(tmp_path):
    assert read(tmp_path, "") is None
    assert read(tmp_path, "# only words\n") is None
