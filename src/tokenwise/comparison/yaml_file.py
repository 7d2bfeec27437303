"""Reading YAML without its surprises: ``off`` is a word, ``1e-3`` is a number, a key stands once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tokenwise.errors import InputError, Problem, missing_file


class _Loader(yaml.SafeLoader):
    """Safe, with the scalars of YAML 1.2: booleans are true and false alone, numbers are decimal, dates are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        character: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    self.duplicates.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _scalar(kind: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), list(first))


_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_scalar("int", r"[-+]?\d+(?:_\d+)*", "-+0123456789")
_scalar("float", r"[-+]?(?:\d[\d_]*\.?|\d[\d_]*\.\d+|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.inf|\.nan", "-+.0123456789")
# Decimal always: 010 is ten.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, as dicts, lists and scalars; None for an empty file.

    Raises:
        InputError: when the file is missing or is not YAML (with line and column), and for every key written twice.
    """
    if path.is_dir():
        raise InputError(Problem(str(path), "is a folder, not a plan file."))
    if not path.is_file():
        raise InputError(missing_file("plan", path))
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except UnicodeDecodeError as error:
        raise InputError(Problem(path.name, f"is not UTF-8 text (byte {error.start}).")) from error
    except yaml.MarkedYAMLError as error:
        raise InputError(_syntax_problem(path, error)) from error
    except yaml.YAMLError as error:
        raise InputError(Problem(path.name, f"is not YAML: {' '.join(str(error).split())}.")) from error
    if loader.duplicates:
        raise InputError(
            Problem(f"{path.name} line {line}", f"{key!r} is there twice.", "Keep one of them.")
            for key, line in loader.duplicates
        )
    return content


def parse_value(text: str) -> Any:
    """A value as it would be written in a YAML file; the text itself where it is not YAML."""
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError:
        return text


def _syntax_problem(path: Path, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{path.name} line {mark.line + 1} column {mark.column + 1}" if mark else path.name
    what = error.problem or error.context or "cannot be read"
    if "'\\t'" in what:
        return Problem(where, "a tab stands where YAML wants spaces.", "Indent with spaces.")
    return Problem(
        where, f"this is not YAML: {what}{f' ({error.context})' if error.problem and error.context else ''}."
    )
