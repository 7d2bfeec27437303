import pytest

from tokenwise.cli.method_fields import read_fields
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
    assert read_fields([word]) == dict([expected])


@pytest.mark.parametrize("word", ["keep", "=0.5"])
def test_a_field_without_name_or_value_is_refused(word):
    with pytest.raises(InputError, match=r"-p: .*Write -p keep=0\.5"):
        read_fields([word])
