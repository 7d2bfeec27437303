"""Reading a score store: look rows up by their token ids, or join columns to a data set."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor

from tokenwise import fingerprint
from tokenwise.errors import InputError, Problem, nearest
from tokenwise.scores.layout import NOT_PREDICTED, TYPES, Manifest, row_key, shard_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CACHE_BYTES = 256 * 2**20


def open_store(folder: str | Path, field: str = "store") -> ScoreStore:
    """Open the token scores in a folder.

    Args:
        folder: what ``tokenwise score`` wrote.
        field: the field to name in an error.

    Raises:
        InputError: when it holds no scores, or the run that makes them has not finished.
    """
    return ScoreStore(folder, field)


class ScoreStore:
    """Statistics of every token of a data set, on disk; only an index of the rows is held in memory.

    Args:
        folder: what ``tokenwise score`` wrote.
        field: the field to name in an error.

    Attributes:
        folder: where it lies.
        manifest: how it was made.

    Raises:
        InputError: when it holds no scores, or the run that makes them has not finished.
    """

    def __init__(self, folder: str | Path, field: str = "store") -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder, field)
        if not self.manifest.complete:
            fix = "Run the same command again: it continues where it stopped."
            raise InputError(Problem(field, f"{str(self.folder)!r} is not finished.", fix))
        self._numbers: dict[bytes, int] = {}
        self._group_starts: list[int] = []
        self._groups: list[tuple[int, int]] = []
        self._cache: OrderedDict[tuple[str, int], tuple[NDArray[Any], NDArray[np.int32]]] = OrderedDict()
        self._cached_bytes = 0
        number = 0
        for shard in range(self.manifest.shards):
            file = shard_file(self.folder, shard)
            if not file.is_file():
                raise InputError(Problem(field, f"{str(self.folder)!r} lacks {file.name}.", "Score the data again."))
            with parquet.ParquetFile(file, memory_map=True) as stream:
                for group in range(stream.num_row_groups):
                    self._group_starts.append(number)
                    self._groups.append((shard, group))
                    for key in stream.read_row_group(group, columns=["key"]).column(0).to_pylist():
                        self._numbers.setdefault(key, number)
                        number += 1

    @property
    def rows(self) -> int:
        """How many rows there are, equal ones counted apart."""
        return self.manifest.rows

    @property
    def columns(self) -> tuple[str, ...]:
        """What can be read: the stored columns, and ``nll``, which is -``logp``."""
        stored = self.manifest.columns
        return (*stored, "nll") if "logp" in stored else tuple(stored)

    def __repr__(self) -> str:
        facts = f"{self.rows:,} rows, {self.manifest.tokens:,} tokens: {', '.join(self.columns)}"
        return f"ScoreStore({str(self.folder)!r}: {facts})"

    def __contains__(self, input_ids: Sequence[int] | Tensor) -> bool:
        return row_key(np.asarray(input_ids, dtype=np.int32)) in self._numbers

    def lookup(
        self,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor | NDArray[Any],
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        columns: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """The scores of the tokens of a row, or of a batch of rows.

        Args:
            input_ids: [tokens] or [batch, tokens], as they are trained on.
            attention_mask: 0 where `input_ids` is padding, on either side; of the same shape.
            position_ids: of the same shape; where they do not count up, another row begins (packing).
            columns: which of `columns` to read; all unless given.

        Returns:
            By column a tensor shaped like `input_ids`, with one more dimension for ``top_ids`` and ``top_logp``, on
            the CPU, fp32 or int64. Index t speaks of token t. The first token of each row is given, not predicted:
            there, and at padding, stands 0 (-1 in ``top_ids``).

        Raises:
            InputError: when a row is not in the store, naming it, or there is no such column.
        """
        names = self._known(self.columns if columns is None else columns, "columns")
        ids = as_array(input_ids)
        found, _ = self.aligned(np.atleast_2d(ids), as_batch(attention_mask, ids), as_batch(position_ids, ids), names)
        return {name: values[0] if ids.ndim == 1 else values for name, values in found.items()}

    def aligned(
        self,
        ids: NDArray[np.int32],
        mask: NDArray[Any] | None,
        positions: NDArray[Any] | None,
        columns: Sequence[str],
    ) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
        """As `lookup`, for [batch, tokens]; also which positions hold a prediction."""
        stored = {name: "logp" if name == "nll" else name for name in columns}
        found: dict[str, NDArray[Any]] = {}
        for name in set(stored.values()):
            shape = (*ids.shape, self.manifest.top_k) if name.startswith("top_") else ids.shape
            kind = np.float32 if TYPES[name] is np.float16 else np.int64
            found[name] = np.full(shape, NOT_PREDICTED.get(name, 0), dtype=kind)
        predicted = np.zeros(ids.shape, dtype=bool)
        for row, places in _sequences(ids, mask, positions):
            number = self._number(ids[row, places], row)
            for name, values in found.items():
                values[row, places] = self._read(name, number).reshape(len(places), *values.shape[2:])
            predicted[row, places[1:]] = True
        tensors = {name: torch.from_numpy(values) for name, values in found.items()}
        return {name: -tensors["logp"] if name == "nll" else tensors[name] for name in columns}, predicted

    def join(
        self,
        dataset: Dataset | Sequence[Mapping[str, Any]],
        columns: Mapping[str, str] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Any:
        """The data set with columns of scores, one number for each token of ``input_ids``.

        Args:
            dataset: a `datasets.Dataset` or a list of records, with ``input_ids`` and, where rows are padded or
                packed, ``attention_mask`` or ``position_ids``.
            columns: name of the new column -> column of the store; ``{"reference_nll": "nll"}`` unless given.
            tokenizer: what tokenised the data set; checked against that of the store.

        Returns:
            A data set of the same kind; the one given stays as it is.

        Raises:
            InputError: when the store was made with another tokenizer or of other text, when a column is missing, or
                one is there already.
        """
        from datasets import Dataset

        columns = dict(columns) if columns is not None else {"reference_nll": "nll"}
        self._known(list(columns.values()), "columns")
        if columns.get("reference_nll") == "logp":
            message = "'reference_nll' is a negative log-likelihood, and 'logp' has the other sign."
            raise InputError(Problem("columns", message, "Write {'reference_nll': 'nll'}."))
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        present = dataset.column_names if isinstance(dataset, Dataset) else (dataset[0] if len(dataset) else {})
        taken = [name for name in columns if name in present]
        if taken:
            raise InputError(Problem("columns", f"the data set has {taken[0]!r} already.", "Choose another name."))
        if len(dataset) and "input_ids" not in present:
            message = f"has no 'input_ids'; it has {', '.join(present)}."
            raise InputError(Problem("dataset", message, "Tokenise it first, as it is trained on."))

        def joined(row: Mapping[str, Any], index: int) -> dict[str, list[Any]]:
            ids = as_array(row["input_ids"])
            mask, positions = (as_batch(row.get(name), ids) for name in ("attention_mask", "position_ids"))
            try:
                found, _ = self.aligned(ids[None], mask, positions, list(columns.values()))
            except InputError as error:
                problems = error.problems
                raise InputError(Problem(f"rows[{index}]", p.message, p.fix) for p in problems) from None
            return {new: found[name][0].tolist() for new, name in columns.items()}

        if not isinstance(dataset, Dataset):
            return [{**row, **joined(row, index)} for index, row in enumerate(dataset)]
        identity = fingerprint.of_value([dataset._fingerprint, self.manifest.deciding(), columns])
        return dataset.map(joined, with_indices=True, new_fingerprint=identity[:32])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, field: str = "tokenizer") -> None:
        """Check that the scored rows were made with this tokenizer; a store that knows of none passes.

        Raises:
            InputError: when they were made with another one.
        """
        ours, theirs = self.manifest.tokenizer, fingerprint.of_vocabulary(tokenizer)
        if ours is not None and ours != theirs:
            raise InputError(
                Problem(
                    field,
                    f"the scores in {str(self.folder)!r} were made with another tokenizer "
                    f"(vocabulary {ours[:12]}, here {theirs[:12]}).",
                    "Score the data with a model that has the same tokenizer.",
                )
            )

    def _known(self, names: Sequence[str], field: str) -> list[str]:
        unknown = [name for name in names if name not in self.columns]
        if unknown:
            raise InputError(
                Problem(
                    field,
                    f"the scores in {str(self.folder)!r} have no {unknown[0]!r}, only {', '.join(self.columns)}.",
                    nearest(unknown[0], self.columns, "Score the data with the statistic it belongs to."),
                )
            )
        return list(names)

    def _number(self, ids: NDArray[np.int32], row: int) -> int:
        number = self._numbers.get(row_key(ids))
        if number is None:
            start = " ".join(map(str, ids[:6].tolist())) + (" ..." if len(ids) > 6 else "")
            message = f"these {len(ids)} tokens ({start}) are not among the scored rows of {str(self.folder)!r}."
            limit = self.manifest.max_length
            if limit is not None and len(ids) > limit:
                message += f" Scored rows have at most {limit} tokens."
            fix = "Score the rows exactly as they are trained on: tokenised, with the same template and truncation."
            raise InputError(Problem(f"rows[{row}]", message, fix))
        return number

    def _read(self, column: str, number: int) -> NDArray[Any]:
        """The stored entries of one row."""
        group = bisect.bisect_right(self._group_starts, number) - 1
        values, offsets = self._group(column, group)
        at = number - self._group_starts[group]
        return values[offsets[at] : offsets[at + 1]]

    def _group(self, column: str, group: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """A column of a row group and where its rows begin, from the cache or the file."""
        if (column, group) in self._cache:
            self._cache.move_to_end((column, group))
            return self._cache[column, group]
        shard, at = self._groups[group]
        with parquet.ParquetFile(shard_file(self.folder, shard), memory_map=True) as file:
            lists = file.read_row_group(at, columns=[column]).column(0).combine_chunks()
        read = lists.values.to_numpy(), lists.offsets.to_numpy()
        self._cache[column, group] = read
        self._cached_bytes += sum(array.nbytes for array in read)
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= sum(array.nbytes for array in oldest)
        return read


def _sequences(
    ids: NDArray[np.int32], mask: NDArray[Any] | None, positions: NDArray[Any] | None
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The rows of text in a batch: index in the batch, and the positions of the tokens."""
    for row in range(ids.shape[0]):
        kept = np.arange(ids.shape[1]) if mask is None else mask[row].nonzero()[0]
        if not len(kept):
            continue
        if positions is None:
            yield row, kept
            continue
        own = positions[row if positions.shape[0] > 1 else 0, kept]
        bounds = [0, *((np.diff(own) <= 0).nonzero()[0] + 1).tolist(), len(kept)]
        for start, stop in itertools.pairwise(bounds):
            yield row, kept[start:stop]


def as_array(values: Any) -> NDArray[Any]:
    """A tensor or a list as an array, on the CPU."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_batch(values: Any, ids: NDArray[Any]) -> NDArray[Any] | None:
    """A mask or positions as [batch, tokens], None as None.

    Raises:
        InputError: when they are not shaped like `ids`.
    """
    if values is None:
        return None
    array = np.atleast_2d(as_array(values))
    if array.shape[-1] != ids.shape[-1] or array.ndim != 2:
        message = f"has shape {tuple(array.shape)}, where input_ids have {tuple(ids.shape)}."
        raise InputError(Problem("attention_mask or position_ids", message, "Give them shaped like input_ids."))
    return array
