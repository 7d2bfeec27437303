"""Questions about images: read once for all runs, with the images they are about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from tokenwise.comparison.images import decode
from tokenwise.comparison.rows import Findings
from tokenwise.comparison.sections import shorten
from tokenwise.documents import read_records
from tokenwise.errors import InputError, Problem

FIELDS = ("image", "question", "answer")
"""What every row holds, as text."""


@dataclass(frozen=True)
class Questions:
    """Questions, their answers, and images as their files' content, never pickled.

    Args:
        content: the files of all images behind one another, uint8.
        ends: where each ends, [images].
        image: which image each question is about, [questions].
        questions: what is asked.
        answers: what is to be answered.
        total: how many there were before some were chosen.
    """

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]
    image: NDArray[np.int64]
    questions: list[str]
    answers: list[str]
    total: int

    def __len__(self) -> int:
        return len(self.questions)

    def picture(self, index: int) -> Any:
        """The image of a question, decoded."""
        which = int(self.image[index])
        start = int(self.ends[which - 1]) if which else 0
        return decode(self.content[start : self.ends[which]].tobytes())

    def save(self, stream: IO[bytes]) -> None:
        """Write as `load` reads it."""
        texts = json.dumps([self.questions, self.answers]).encode()
        np.savez(
            stream,
            content=self.content,
            ends=self.ends,
            image=self.image,
            texts=np.frombuffer(texts, dtype=np.uint8),
            total=np.array(self.total),
        )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            questions, answers = json.loads(found["texts"].tobytes())
            return cls(found["content"], found["ends"], found["image"], questions, answers, int(found["total"]))


def named_images(paths: Sequence[Path], where: str) -> list[Path]:
    """The images that the rows name and that are there, each once, in their order.

    Raises:
        InputError: when a file of rows cannot be read.
    """
    rows = (path.parent / row["image"] for path, _, row in _rows(paths, where) if isinstance(row.get("image"), str))
    return [image for image in dict.fromkeys(rows) if image.is_file()]


def read_questions(paths: Sequence[Path], limit: int | None, where: str) -> Questions:
    """Read questions, every image decoded once to see that it can be.

    Args:
        paths: JSON lines, or other files of records, with the fields `FIELDS`; images are files, their paths starting
            at the folder of the file that names them.
        limit: how many at most, drawn by chance, the same ones every time; None for all.
        where: the field to name in an error.

    Raises:
        InputError: with everything wrong with them.
    """
    findings = Findings(where)
    rows = list(_rows(paths, where))
    chosen = _drawn(len(rows), limit)
    places: dict[Path, int] = {}
    content: list[NDArray[np.uint8]] = []
    image, questions, answers = [], [], []
    for number, (path, place, row) in enumerate(rows):
        missing = [name for name in FIELDS if name not in row]
        for name in missing:
            findings.add(place, f"has no field {name!r}.", "A row is {image: ..., question: ..., answer: ...}.")
        empty = [name for name in FIELDS if name in row and not (isinstance(row[name], str) and row[name].strip())]
        for name in empty:
            findings.add(place, f"field {name!r} holds {shorten(row[name])}, not text.")
        if missing or empty or number not in chosen:
            continue
        file = path.parent / row["image"]
        if file not in places:
            data = _content(file, place, findings)
            places[file] = len(content)
            content.append(np.frombuffer(data, dtype=np.uint8))
        image.append(places[file])
        questions.append(row["question"].strip())
        answers.append(row["answer"].strip())
    problems = findings.problems()
    if not rows:
        problems.append(Problem(where, "there is no question."))
    if problems:
        raise InputError(problems)
    ends = np.cumsum([len(part) for part in content], dtype=np.int64)
    return Questions(np.concatenate(content), ends, np.array(image, dtype=np.int64), questions, answers, len(rows))


def _drawn(total: int, limit: int | None) -> set[int]:
    # Every nth question would be of one kind wherever kinds take turns.
    order = np.random.default_rng(0).permutation(total)
    return set(order[:limit].tolist())


def _rows(paths: Sequence[Path], where: str) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    return ((path, place, row) for path in paths for place, row in read_records([path], where))


def _content(file: Path, place: str, findings: Findings) -> bytes:
    if not file.is_file():
        findings.add(place, f"there is no image {str(file)!r}.", "Paths of images start at the folder of the rows.")
        return b""
    data = file.read_bytes()
    try:
        decode(data)
    except OSError as error:
        findings.add(place, f"image {str(file)!r} cannot be decoded ({error}).")
    return data
