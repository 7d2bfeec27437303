"""What a store looks like on disk: Parquet shards and one JSON manifest.

A shard holds consecutive rows in their order, one record each: ``key`` (a hash of the row's token ids), ``length``, and
lists with one entry per token: ``logp`` and ``entropy`` in fp16, ``rank`` in int32, and with `top_k` entries per token
``top_ids`` in int32 and ``top_logp`` in fp16. Index t speaks of token t. The first token of a row is given, not
predicted: its log-probability, entropy and rank are 0, and its ``top_ids`` are -1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from tokenwise.errors import InputError, Problem, missing_file
from tokenwise.files import write_binary, write_text

MANIFEST = "manifest.json"
COSTS = "costs.jsonl"
COLUMNS = {"logp": ("logp",), "entropy": ("entropy",), "rank": ("rank",), "top_k": ("top_ids", "top_logp")}
"""The columns of each statistic."""
TYPES = {"logp": np.float16, "entropy": np.float16, "rank": np.int32, "top_ids": np.int32, "top_logp": np.float16}
NOT_PREDICTED = {"top_ids": -1}
"""What a column holds for the first token of a row, where that is not 0."""

_KIND = "tokenwise scores"
_KEY_BYTES = 16
_GROUP_TOKENS = 2**16
"""Tokens of a row group: what is read at once to get one row."""


def row_key(ids: NDArray[np.int32]) -> bytes:
    """The name of a row: a hash of its token ids."""
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=_KEY_BYTES).digest()


@dataclass(frozen=True)
class Cost:
    """What computing scores took. None means "not known", never zero.

    Args:
        flops: of the forward passes and the statistics.
        seconds: of the same, loading and tokenising excluded; None also where several workers shared the work.
        machine: what they ran on, as `speed_of` says; None where it was more than one.
    """

    flops: float | None = None
    seconds: float | None = None
    machine: str | None = None


@dataclass(frozen=True)
class Manifest:
    """How a store was made, and what it holds.

    Args:
        model: name and fingerprint of the model, and whether its adapters were in effect.
        tokenizer: fingerprint of vocabulary and special tokens; None where rows were tokenised already and no
            tokenizer was given.
        vocabulary: number of logits of the model.
        data: names and fingerprint of the data, and the field that was read.
        statistics: names in `COLUMNS`.
        top_k: entries per token of the statistic ``top_k``; 0 without it.
        max_length: longer rows were cut to this many tokens; None for no limit.
        batch_tokens: tokens of a forward pass at most, padding included.
        shard_tokens: tokens after which a shard ends.
        dtype: the type the model computed in.
        tokenwise: version that wrote it.
        complete: whether all rows are there.
        rows: how many rows there are.
        tokens: of all rows.
        truncated: rows that were cut.
        empty: records without a token, which are left out.
        shards: how many files there are.
        cost: what computing all of it took, also what was lost when a run was killed.
    """

    DECIDING: ClassVar[tuple[str, ...]] = (
        "model.fingerprint", "model.adapters", "tokenizer", "vocabulary", "data.fingerprint", "data.field",
        "statistics", "top_k", "max_length", "batch_tokens", "shard_tokens", "dtype", "tokenwise",
    )  # fmt: skip
    """What must be equal for a run to continue another one."""

    model: dict[str, Any]
    tokenizer: str | None
    vocabulary: int
    data: dict[str, Any]
    statistics: list[str]
    top_k: int
    max_length: int | None
    batch_tokens: int
    shard_tokens: int
    dtype: str
    tokenwise: str
    complete: bool = False
    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    empty: int = 0
    shards: int = 0
    cost: Cost = field(default_factory=Cost)
    kind: str = field(default=_KIND)
    format: int = 1

    @property
    def columns(self) -> list[str]:
        """The columns with an entry for each token."""
        return [column for name in self.statistics for column in COLUMNS[name]]

    def deciding(self) -> dict[str, Any]:
        """The values of `DECIDING`."""
        values = asdict(self)
        return {
            name: values[name] if "." not in name else values[name.split(".")[0]][name.split(".")[1]]
            for name in self.DECIDING
        }

    def write(self, folder: Path) -> None:
        """Write it to its folder, atomically."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path, where: str) -> Manifest:
        """Read a store's manifest.

        Raises:
            InputError: naming `where`, when there is none or it cannot be read.
        """
        if not folder.is_dir():
            raise InputError(missing_file(where, folder))
        if not is_store(folder):
            fix = "Make one: tokenwise score MODEL DATA --out DIR."
            raise InputError(Problem(where, f"{str(folder)!r} holds no token scores.", fix))
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(cls)}
        if values.get("format") != cls.format or set(values) | {"cost"} != known:
            message = f"{str(folder)!r} was written by tokenwise {values.get('tokenwise')} in another format."
            raise InputError(Problem(where, message, "Score the data again."))
        # Stores from before costs were kept have none.
        return cls(**{**values, "cost": Cost(**values.get("cost", {}))})


def is_store(path: str | Path) -> bool:
    """Whether a folder holds a score store, finished or not."""
    try:
        values = json.loads(Path(path, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("kind") == _KIND


@dataclass
class Shard:
    """Consecutive rows of token ids, and which records of the data they come from.

    Args:
        index: number of the shard.
        first: number of the first record.
        records: how many records, those without a token included.
        rows: token ids of each row, [tokens], int32.
        truncated: rows that were cut.
    """

    index: int
    first: int
    records: int = 0
    rows: list[NDArray[np.int32]] = field(default_factory=list)
    truncated: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def facts(self) -> dict[str, int]:
        """What its file says of it."""
        names = ("index", "first", "records", "truncated", "tokens")
        return {**{name: getattr(self, name) for name in names}, "rows": len(self.rows)}


def shard_file(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{index:06d}.parquet"


def shard_table(shard: Shard, columns: dict[str, NDArray[Any]]) -> pyarrow.Table:
    """The table of a shard.

    Args:
        shard: the rows.
        columns: per column one value for each token, rows one after the other: [tokens] or [tokens, top_k].
    """
    keys = b"".join(map(row_key, shard.rows))
    lengths = np.array([len(row) for row in shard.rows], dtype=np.int32)
    ends = np.concatenate([[0], lengths.cumsum()])
    arrays: dict[str, pyarrow.Array] = {
        "key": pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(_KEY_BYTES), len(lengths), [None, pyarrow.py_buffer(keys)]
        ),
        "length": pyarrow.array(lengths),
    }
    for name, values in columns.items():
        per_token = 1 if values.ndim == 1 else values.shape[1]
        offsets = pyarrow.array((ends * per_token).astype(np.int32))
        arrays[name] = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values.reshape(-1)))
    return pyarrow.table(arrays).replace_schema_metadata({"tokenwise": json.dumps(shard.facts())})


def table_facts(table: pyarrow.Table) -> dict[str, int]:
    """What a shard's table says of the shard."""
    facts: dict[str, int] = json.loads(table.schema.metadata[b"tokenwise"])
    return facts


def write_shard(folder: Path, table: pyarrow.Table) -> dict[str, int]:
    """Write a shard's table to its file, atomically; returns its facts."""
    facts = table_facts(table)
    rows_at_once = max(1, facts["rows"] * _GROUP_TOKENS // max(facts["tokens"], 1))
    write_binary(
        shard_file(folder, facts["index"]),
        lambda stream: parquet.write_table(
            table, stream, row_group_size=rows_at_once, compression="zstd", use_dictionary=False, write_statistics=False
        ),
    )
    return facts


def add_cost(folder: Path, index: int, cost: Cost) -> None:
    """Note what a shard cost, before its file is written: what is computed twice is counted twice."""
    with (folder / COSTS).open("a", encoding="utf-8") as stream:
        # The line's end comes first, so that half a line of a killed run spoils no other.
        stream.write("\n" + json.dumps({"shard": index, **asdict(cost)}))


def read_cost(folder: Path, shards: int) -> Cost:
    """What all noted computations cost together; unknown where a shard has no note, or one of its notes is unknown."""
    try:
        lines = (folder / COSTS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return Cost()
    notes = [json.loads(line) for line in lines if line.endswith("}")]
    if {note["shard"] for note in notes} != set(range(shards)):
        return Cost()
    flops, seconds = ([note[name] for note in notes] for name in ("flops", "seconds"))
    machines = {note["machine"] for note in notes}
    return Cost(
        flops=None if None in flops else sum(flops),
        seconds=None if None in seconds or len(machines) != 1 else sum(seconds),
        machine=machines.pop() if len(machines) == 1 else None,
    )


def read_facts(folder: Path, index: int) -> dict[str, int] | None:
    """What the file of a shard says of it; None where there is no such file."""
    file = shard_file(folder, index)
    if not file.is_file():
        return None
    facts: dict[str, int] = json.loads(parquet.read_metadata(file).metadata[b"tokenwise"])
    return facts
