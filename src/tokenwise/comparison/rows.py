"""Rows of different lengths as token ids: what chat and classification data are turned into once, for all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray

from tokenwise.comparison.data import IGNORED, Windows
from tokenwise.errors import Problem

_NAMED = 3
"""A problem of many rows names so many of them."""


@dataclass(frozen=True)
class _Arrays:
    """Arrays in a file of numpy's, never pickled."""

    def save(self, stream: IO[bytes]) -> None:
        """Write to an open file."""
        np.savez(stream, allow_pickle=False, **vars(self))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Ragged(_Arrays):
    """Rows of token ids behind one another.

    Args:
        input_ids: token ids of all rows, shape [tokens].
        ends: where each row ends in them, shape [rows].
        cut: how many rows were cut at the longest length, shape [].
        left_out: how many rows held nothing to learn after that, shape [].
    """

    input_ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    cut: NDArray[np.int64]
    left_out: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, index: int) -> slice:
        """Where a row lies."""
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    @staticmethod
    def remark_of(path: Path) -> str:
        """How many rows a file has and what became of the others, in words."""
        with np.load(path, allow_pickle=False) as arrays:
            rows, cut, left_out = len(arrays["ends"]), int(arrays["cut"]), int(arrays["left_out"])
        parts = [f"{rows:,} rows"]
        parts += [f"{cut:,} of them cut"] * bool(cut)
        parts += [f"{left_out:,} too long and left out"] * bool(left_out)
        return ", ".join(parts)


@dataclass(frozen=True)
class Labelled(Ragged):
    """Rows with labels on some of their tokens.

    Args:
        labels: the token ids that are to be predicted, -100 elsewhere, shape [tokens].
    """

    labels: NDArray[np.int32]

    def windows(self, padding: int) -> Windows:
        """The rows as what `HeldOut` measures: a document each, padded on the right."""
        lengths = np.diff(self.ends, prepend=0).astype(np.int32)
        input_ids = np.full((len(self), int(lengths.max())), padding, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORED)
        for index, length in enumerate(lengths):
            input_ids[index, :length] = self.input_ids[self.span(index)]
            labels[index, :length] = self.labels[self.span(index)]
        labels[:, 0] = IGNORED
        each = np.arange(len(self))
        return Windows(input_ids, labels, lengths, each.astype(np.int32), np.zeros_like(each))


@dataclass(frozen=True)
class Responses(Labelled):
    """Conversations, and which of their tokens are to be learnt.

    Args:
        loss_weights: weights of all tokens as the data has them, shape [tokens]; empty where a row has none.
        prompts: tokens before the last response of each row, shape [rows].
        answers: the text of that response for each row, as JSON in UTF-8, shape [bytes].
    """

    loss_weights: NDArray[np.float32]
    prompts: NDArray[np.int64]
    answers: NDArray[np.uint8]

    @property
    def expected(self) -> list[str]:
        """The text of the last response of each row."""
        return list(json.loads(self.answers.tobytes()))


@dataclass(frozen=True)
class Examples(Ragged):
    """Texts and their classes.

    Args:
        classes: class of each row, an index into `names`, shape [rows].
        names: of the classes.
    """

    classes: NDArray[np.int64]
    names: NDArray[np.str_]


@dataclass(frozen=True)
class Answers(Labelled):
    """Answers to forget and answers to keep.

    Args:
        forget: which rows are to be forgotten, shape [rows].
    """

    forget: NDArray[np.bool_]

    def rows(self, forget: bool) -> NDArray[np.int64]:
        """The rows to forget, or those to keep."""
        return np.flatnonzero(self.forget == forget)


class Findings:
    """What is wrong with rows, told once for all rows that share it."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._found: dict[tuple[str, str], list[str]] = {}

    def add(self, where: str, message: str, fix: str = "") -> None:
        """Note what is wrong with the row at `where`; `message` goes on a sentence that begins with it."""
        self._found.setdefault((message, fix), []).append(where)

    def problems(self) -> list[Problem]:
        """One problem for each message."""
        return [
            Problem(self._field, f"{_some(where)}: {message}", fix) for (message, fix), where in self._found.items()
        ]


def _some(where: Sequence[str]) -> str:
    more = len(where) - _NAMED
    return ", ".join(where[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
