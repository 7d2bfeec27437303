"""Errors that name the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing wrong with what a user gave us.

    Args:
        field: where it stands, as the user wrote it: ``methods[1].excess_loss.keep``.
        message: what is wrong with it, including the value.
        fix: what to write or do instead; empty where the message already says it.
    """

    field: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" + (f" {self.fix}" if self.fix else "")


class InputError(ValueError):
    """Raised before any work starts when something the user gave cannot be used; carries every problem found."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def nearest(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A sentence that suggests the known word closest to `word`; where none is close, `otherwise`, or what is known.

    A word that differs in nothing but case, underscores and hyphens is the closest.
    """
    known = sorted(set(known))
    same = [name for name in known if _letters(name) == _letters(word)]
    close = same or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    if otherwise is not None:
        return otherwise
    return "Known: " + ", ".join(known) + "." if known else ""


def _letters(word: str) -> str:
    return word.replace("_", "").replace("-", "").casefold()


def missing_file(field: str, path: str | Path) -> Problem:
    """The problem of a path that does not exist, with the nearest existing name beside it."""
    path = Path(path)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    if close:
        fix = f"Did you mean {str(path.parent / close[0])!r}?"
    elif not path.parent.is_dir():
        fix = f"The folder {str(path.parent)!r} does not exist either."
    else:
        fix = "Check the path; relative paths in a plan start at the plan's folder, others at the current folder."
    return Problem(field, f"{str(path)!r} does not exist.", fix)
