"""The option ``-p KEY=VALUE`` of the commands that take a method."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from tokenwise.errors import InputError, Problem


def add_fields(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the option; its words are collected in ``fields``."""
    parser.add_argument(
        "-p",
        dest="fields",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"a field of the method, such as {example}; repeat it for more",
    )


def read_fields(words: Iterable[str]) -> dict[str, Any]:
    """The fields that words like ``keep=0.5`` give, their values read as in a plan.

    Raises:
        InputError: when a word has no name or no value.
    """
    from tokenwise.comparison.yaml_file import parse_value

    fields = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(Problem("-p", f"{word!r} is not a field and its value.", "Write -p keep=0.5."))
        fields[name] = parse_value(value)
    return fields
