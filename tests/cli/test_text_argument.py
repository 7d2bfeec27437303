import io

import pytest

from tokenwise.cli.text_argument import read_text
from tokenwise.errors import InputError


def test_text_comes_from_the_argument_a_file_or_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("from a file", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert read_text("as it is", "TEXT") == "as it is"
    assert read_text(f"@{file}", "TEXT") == "from a file"
    assert read_text("-", "TEXT") == "from a pipe"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"PROMPT: .* is not UTF-8"):
        read_text(f"@{file}", "PROMPT")
