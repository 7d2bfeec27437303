"""A text on the command line: as it is, from a file, or from standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from tokenwise.errors import InputError, Problem, missing_file


def read_text(argument: str, field: str) -> str:
    """The text itself, that of a file where it is ``@FILE``, or of standard input where it is ``-``.

    Raises:
        InputError: when there is no such file, or it holds no UTF-8; names `field`.
    """
    if argument == "-":
        return sys.stdin.read()
    if not argument.startswith("@"):
        return argument
    path = Path(argument[1:])
    if not path.is_file():
        raise InputError(missing_file(field, path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(Problem(field, f"{str(path)!r} is not UTF-8 (byte {error.start}).")) from None
