"""Long contexts with a question or a continuation, as token ids: read once for all runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tokenwise.comparison.rows import Findings
from tokenwise.comparison.sections import shorten
from tokenwise.documents import read_records
from tokenwise.errors import InputError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = "A row is {context: ..., question: ..., answer: ...}, or {context: ..., target: ...}."


@dataclass(frozen=True)
class Contexts:
    """Rows of a context, a question and its answer; or of a context and what follows it.

    Args:
        ids: token ids of all parts of all rows behind one another, int32.
        ends: where each part ends, [rows, 3]: context, question (empty where there is none), answer or continuation.
        depth: where in the context the answer stands, [rows], in [0, 1]; NaN where the data does not say.
        answers: the text of each answer, as JSON in UTF-8; of continuations nothing.
        total: how many rows there were before some were chosen.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    depth: NDArray[np.float64]
    answers: NDArray[np.uint8]
    total: int

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def continuations(self) -> bool:
        """Whether the rows are continued instead of asked about."""
        return not self.expected

    @property
    def expected(self) -> list[str]:
        """The text of each answer; none of continuations."""
        return list(json.loads(self.answers.tobytes()))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each part has, [rows, 3]."""
        return np.diff(self.ends.ravel(), prepend=0).reshape(-1, 3)

    def parts(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """The token ids of a row's context, question and answer or continuation."""
        start = int(self.ends[row - 1, 2]) if row else 0
        context, question, answer = np.split(self.ids[start : self.ends[row, 2]], self.ends[row, :2] - start)
        return context.tolist(), question.tolist(), answer.tolist()

    def save(self, stream: IO[bytes]) -> None:
        """Write as `load` reads it."""
        np.savez(
            stream, ids=self.ids, ends=self.ends, depth=self.depth, answers=self.answers, total=np.array(self.total)
        )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["ids"], found["ends"], found["depth"], found["answers"], int(found["total"]))


def continues(paths: Sequence[Path], where: str) -> bool:
    """Whether the first row is continued instead of asked about.

    Raises:
        InputError: when the files cannot be read.
    """
    _, row = next(iter(read_records(paths, where)), ("", None))
    return isinstance(row, Mapping) and "target" in row and "question" not in row


def read_contexts(
    paths: Sequence[Path], limit: int | None, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, where: str
) -> Contexts:
    """Read rows and turn them into token ids.

    Args:
        paths: JSON lines, or other files of records.
        limit: how many at most, drawn by chance, the same ones every time; None for all.
        tokenizer: the model's. Its chat template, where it has one, writes context and question as one turn of the
            user; else the question stands on a line of its own.
        max_new_tokens: tokens that an answer may have.
        where: the field to name in an error.

    Raises:
        InputError: with everything wrong with them.
    """
    findings = Findings(where)
    rows = list(read_records(paths, where))
    continued = continues(paths, where)
    fields = ("context", "target") if continued else ("context", "question", "answer")
    chosen = set(np.random.default_rng(0).permutation(len(rows))[:limit].tolist())
    ids: list[int] = []
    ends, depths, answers = [], [], []
    for number, (place, row) in enumerate(rows):
        wrong = _wrong(row, fields)
        for message, fix in wrong:
            findings.add(place, message, fix)
        if wrong or number not in chosen:
            continue
        if continued:
            context, question, answer = _continued(tokenizer, row["context"], row["target"])
        else:
            context, question, answer = _asked(tokenizer, *(row[name].strip() for name in fields))
            answers.append(row["answer"].strip())
            if len(answer) > max_new_tokens:
                findings.add(place, f"its answer has more than {max_new_tokens} tokens.", "Raise task.max_new_tokens.")
        if len(context) < 2 or not answer:
            findings.add(place, "has too little text: a context needs two tokens at least, and what follows it one.")
        for part in (context, question, answer):
            ids += part
            ends.append(len(ids))
        depths.append(float(row["depth"]) if row.get("depth") is not None else math.nan)
    problems = findings.problems()
    if not rows:
        problems.append(Problem(where, "there is no row.", FORM))
    if problems:
        raise InputError(problems)
    return Contexts(
        np.array(ids, dtype=np.int32),
        np.array(ends, dtype=np.int64).reshape(-1, 3),
        np.array(depths),
        np.frombuffer(json.dumps(answers).encode(), dtype=np.uint8),
        len(rows),
    )


def _wrong(row: Any, fields: Sequence[str]) -> list[tuple[str, str]]:
    """What is wrong with a row: messages and fixes."""
    if not isinstance(row, Mapping):
        return [(f"holds {type(row).__name__}, not an object.", FORM)]
    other = ("question", "answer") if "target" in fields else ("target",)
    message, fix = "has a field {!r}, and the first row is of the other kind.", "Compare them in two plans."
    found = [(message.format(name), fix) for name in other if name in row]
    for name in fields:
        if name not in row:
            found.append((f"has no field {name!r}.", FORM))
        elif not (isinstance(row[name], str) and row[name].strip()):
            found.append((f"field {name!r} holds {shorten(row[name])}, not text.", ""))
    depth = row.get("depth")
    number = isinstance(depth, int | float) and not isinstance(depth, bool)
    if depth is not None and not (number and 0 <= depth <= 1):
        found.append((f"field 'depth' holds {shorten(depth)}, not a number from 0 to 1.", ""))
    return found


def _asked(
    tokenizer: PreTrainedTokenizerBase, context: str, question: str, answer: str
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt up to the context's end, of the rest of it, and of the answer."""
    if getattr(tokenizer, "chat_template", None):
        turn = {"role": "user", "content": f"{context}\n\n{question}"}
        written = str(tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
        head, found, tail = written.partition(context)
        if found:
            return (
                _ids(tokenizer, head + context),
                _ids(tokenizer, tail),
                _following(tokenizer, tail, "" if tail[-1:].isspace() else " ", answer),
            )
    tail = f"\n{question}"
    return _begun(tokenizer, context), _ids(tokenizer, tail), _following(tokenizer, tail, " ", answer)


def _continued(tokenizer: PreTrainedTokenizerBase, context: str, target: str) -> tuple[list[int], list[int], list[int]]:
    return _begun(tokenizer, context), [], _following(tokenizer, context, "", target)


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that goes on, with what the tokenizer puts in front."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _following(tokenizer: PreTrainedTokenizerBase, text: str, between: str, after: str) -> list[int]:
    """Token ids of `after` where it follows `text`."""
    before, whole = _ids(tokenizer, text), _ids(tokenizer, text + between + after)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # Where the tokenizer joins the end of the one with the beginning of the other.
    return _ids(tokenizer, after)
