"""From data to rows of token ids: files or what lies in memory; texts, chats or rows that are tokenised already."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenwise import fingerprint
from tokenwise.documents import check_field, count_values, find_files, read_values
from tokenwise.errors import InputError, Problem
from tokenwise.scores.layout import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS_AT_ONCE = 256

Value = tuple[str, Any]
"""Where a record stands, for messages, and what it holds."""


@dataclass(frozen=True)
class Source:
    """Data that can be read again from its beginning.

    Args:
        names: what a user calls it.
        values: begins to read it.
        count: how many records there are.
        fingerprint: of its content.
    """

    names: list[str]
    values: Callable[[], Iterator[Value]]
    count: int
    fingerprint: str


def open_source(data: Any, name: str, field: str = "data") -> Source:
    """The data to score.

    Args:
        data: a path, a glob or a list of them (text files, JSON lines, JSON, Parquet, folders that datasets saved); a
            `datasets.Dataset`; a list of records or of rows of token ids; or a Source, which is returned as it is.
        name: the field or column that holds text, messages or token ids.
        field: the field to name in an error.

    Raises:
        InputError: when it is none of these, or empty, or a file is missing.
    """
    from datasets import Dataset

    if isinstance(data, Source):
        return data
    if isinstance(data, Dataset):
        if name not in data.column_names:
            check_field(name, data.column_names, "the dataset", field)
        plain = data.with_format(None).select_columns([name])
        return _in_memory(lambda: (row[name] for row in plain), len(data), "a dataset", field)
    if isinstance(data, str | Path):
        data = [str(data)]
    if not isinstance(data, Sequence):
        message = f"{type(data).__name__} cannot be read more than once."
        raise InputError(Problem(field, message, "Give paths, a datasets.Dataset or a list."))
    if data and all(isinstance(entry, str | Path) for entry in data):
        paths = find_files([str(entry) for entry in data], Path.cwd(), field)
        return Source(
            names=[str(entry) for entry in data],
            values=lambda: itertools.chain.from_iterable(read_values(path, name, field) for path in paths),
            count=sum(count_values(path, field) for path in paths),
            fingerprint=fingerprint.of_data(paths),
        )
    records = data

    def values() -> Iterator[Any]:
        for index, record in enumerate(records):
            if isinstance(record, dict):
                check_field(name, record, f"{field}[{index}]", field)
                yield record[name]
            else:
                yield record

    return _in_memory(values, len(records), "a list", field)


def _in_memory(values: Callable[[], Iterable[Any]], count: int, name: str, field: str) -> Source:
    if not count:
        raise InputError(Problem(field, "is empty."))
    digest = hashlib.sha256()
    for value in values():
        digest.update(json.dumps(value, default=lambda array: array.tolist()).encode() + b"\n")

    def placed() -> Iterator[Value]:
        return ((f"{field}[{index}]", value) for index, value in enumerate(values()))

    return Source([name], placed, count, digest.hexdigest())


def kind_of(value: Any) -> str:
    """What a value is: ``text``, ``messages``, ``ids``, or ``empty``; other things have the name of their type."""
    if value is None or (isinstance(value, str) and not value):
        return "empty"
    if isinstance(value, str):
        return "text"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return type(value).__name__
    if not value:
        return "empty"
    first = value[0]
    if isinstance(first, dict) and "role" in first:
        return "messages"
    if isinstance(first, int) and not isinstance(first, bool):
        return "ids"
    return f"list of {type(first).__name__}"


@dataclass
class Encoder:
    """Makes rows of token ids.

    Args:
        kind: what all values are, as `kind_of` says.
        tokenizer: for texts and messages; messages go through its chat template.
        vocabulary: ids must be smaller.
        max_length: longer rows are cut to their first tokens; None for no limit.
        field: the field to name in an error.
    """

    kind: str
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    max_length: int | None
    field: str = "data"

    def check(self) -> None:
        """Check that there is what the kind of data needs.

        Raises:
            InputError: for a kind that cannot be scored, or without tokenizer or chat template.
        """
        if self.kind not in ("text", "messages", "ids"):
            message = f"holds {self.kind}, which is neither text nor messages nor token ids."
            raise InputError(Problem(self.field, message, "Name the field that holds one of them."))
        if self.kind != "ids" and self.tokenizer is None:
            message = f"holds {self.kind}, and there is no tokenizer."
            raise InputError(Problem(self.field, message, "Give one, or rows that are tokenised already (input_ids)."))
        if self.kind == "messages" and not getattr(self.tokenizer, "chat_template", None):
            fix = "Save one with the tokenizer, or tokenise the rows yourself."
            raise InputError(Problem("tokenizer", "has no chat template, which messages need.", fix))

    def __call__(self, values: list[Value]) -> Iterator[tuple[NDArray[np.int32], bool]]:
        """The token ids of each value, and whether they were cut. A value without tokens gives an empty row."""
        for where, value in values:
            kind = kind_of(value)
            if kind not in (self.kind, "empty"):
                message = f"{where} holds {kind}, where other records hold {self.kind}."
                raise InputError(Problem(self.field, message))
        filled = [value for _, value in values if kind_of(value) != "empty"]
        encoded = iter(self._encode(filled) if filled else ())
        for where, value in values:
            ids = next(encoded) if kind_of(value) != "empty" else ()
            row = np.asarray(ids, dtype=np.int64)
            if row.ndim != 1 or (len(row) and not 0 <= row.min() <= row.max() < self.vocabulary):
                message = f"{where} has token ids outside 0 to {self.vocabulary - 1}, the model's vocabulary."
                raise InputError(Problem(self.field, message, "Use the tokenizer the model was trained with."))
            cut = self.max_length is not None and len(row) > self.max_length
            yield row[: self.max_length].astype(np.int32), cut

    def _encode(self, values: list[Any]) -> Iterable[Any]:
        if self.kind == "ids":
            return values
        assert self.tokenizer is not None
        if self.kind == "messages":
            return self.tokenizer.apply_chat_template(values, tokenize=True, return_dict=False)
        encoded: list[list[int]] = self.tokenizer(values, return_attention_mask=False, verbose=False)["input_ids"]
        return encoded


def make_shards(
    source: Source,
    encoder: Encoder,
    shard_tokens: int,
    finished: Callable[[int], dict[str, int] | None],
) -> Iterator[Shard | dict[str, int]]:
    """The rows of the data in shards of at least `shard_tokens` tokens; of a finished one its facts.

    The records of finished shards are passed over without tokenizing them.
    """
    values = source.values()
    ready: deque[tuple[NDArray[np.int32], bool]] = deque()
    position = 0
    for index in itertools.count():
        facts = finished(index)
        if facts is not None and facts["first"] == position:
            skipped = [ready.popleft() for _ in range(min(facts["records"], len(ready)))]
            beyond = facts["records"] - len(skipped)
            next(itertools.islice(values, beyond, beyond), None)
            position += facts["records"]
            yield facts
            continue
        shard = Shard(index, position)
        tokens = 0
        while tokens < shard_tokens:
            if not ready:
                ready.extend(encoder(list(itertools.islice(values, _RECORDS_AT_ONCE))))
                if not ready:
                    break
            row, cut = ready.popleft()
            shard.records += 1
            if len(row):
                shard.rows.append(row)
                shard.truncated += cut
                tokens += len(row)
        if not shard.records:
            return
        position += shard.records
        yield shard
