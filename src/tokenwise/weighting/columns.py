"""Data columns aligned with the tokens: checked before training, padded and packed like the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    DefaultDataCollator,
    Trainer,
    default_data_collator,
)

from tokenwise.errors import InputError, Problem
from tokenwise.models.patch import replace_attribute
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.base import TokenWeighter
from tokenwise.weighting.forward import COLUMNS
from tokenwise.weighting.objective import Objective
from tokenwise.weighting.weighing import Weighing

_ROWS_AT_ONCE = 1000


class TrainingColumns:
    """The columns of a trainer's training data that a method reads.

    They are checked on creation, where the data can be read without training (a `datasets.Dataset` or a list), else
    batch by batch. `connect` then carries them through the collators of transformers and TRL; a collator of the
    user's own gets the columns too, and has to make tensors of them itself.

    Args:
        trainer: the trainer.
        method: the method.

    Raises:
        InputError: naming the column, the row, the value and the fix.
    """

    def __init__(self, trainer: Trainer, method: TokenWeighter | Objective):
        self.trainer = trainer
        self.names = sorted(method.reads & set(COLUMNS))
        self.known = _is_known(trainer.data_collator)
        self.dataset: Any = trainer.train_dataset
        self.check: Callable[..., None] | None = None
        if not self.names or not self.known or self.dataset is None:
            return
        present = column_names(self.dataset)
        if present is None:
            self.check = _Check(self.names, method.negative)
            return
        own = isinstance(method, TokenWeighter) and method.has_reference()
        optional = {"reference_nll"} if own or getattr(method, "reference", None) is not None else set()
        for name in self.names:
            if name in present or name in optional:
                continue
            if name != "sample_id":
                raise InputError(
                    Problem(
                        f"train_dataset.{name}",
                        f"is missing, and {type(method).__name__} reads it. The columns are: {', '.join(present)}.",
                        f"Give each row a list {name!r}, as long as its input_ids"
                        + (
                            " (where SFTTrainer packs, with tokenwise.WeighMixin)." if "seq_lengths" in present else "."
                        ),
                    )
                )
            self.dataset = _numbered(self.dataset, trainer)
        check_columns(self.dataset, self.names, method.negative)

    def connect(self, handle: Weighing) -> None:
        """Carry the columns into the batches of the training; undone with the handle."""
        trainer = self.trainer
        if not self.names:
            return
        plain = trainer.get_train_dataloader

        def get_train_dataloader() -> Any:
            # Only while the loader is made, so that evaluation keeps its own collator and columns.
            trainer._set_signature_columns_if_needed()
            usual: list[str] = trainer._signature_columns or []
            undos = [replace_attribute(trainer, "_signature_columns", [*usual, *self.names])]
            if self.known:
                collator = ColumnCollator(trainer.data_collator, self.names, self.check)
                undos.append(replace_attribute(trainer, "data_collator", collator))
            try:
                return plain()
            finally:
                for undo in undos:
                    undo()

        handle.on_undo(replace_attribute(trainer, "get_train_dataloader", get_train_dataloader))
        if self.dataset is not trainer.train_dataset:
            handle.on_undo(replace_attribute(trainer, "train_dataset", self.dataset))


class ColumnCollator:
    """A collator that lets another one lay out the tokens, and lays out the columns the same way.

    Args:
        collator: the other collator; it may pad on either side, or flatten the batch into one row.
        names: the columns.
        check: called with the rows and their index in the batch, where they were not checked beforehand.
    """

    def __init__(self, collator: Any, names: Sequence[str], check: Callable[..., None] | None = None):
        self.collator = collator
        self.names = names
        self.check = check

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        if self.check is not None:
            self.check(features)
        rows = [dict(feature) for feature in features]
        columns = {
            name: torch.cat([_values(name, row.pop(name), len(row["input_ids"])) for row in rows])
            for name in self.names
            if name in rows[0]
        }
        tokens = [torch.as_tensor(row["input_ids"]) for row in rows]
        batch = self.collator(rows)
        if columns:
            places = _places(tokens, batch)
            for name, values in columns.items():
                laid = torch.zeros(batch["input_ids"].numel(), dtype=values.dtype)
                laid[places] = values
                batch[name] = laid.view(batch["input_ids"].shape)
                if "labels" in batch and bool((batch[name].isnan() & batch["labels"].ne(IGNORED))[:, 1:].any()):
                    raise InputError(
                        Problem(
                            name,
                            "has no value at the first token of a row padded on the left, which is predicted there.",
                            "Give it one, pad on the right, or set the label of the first token to -100.",
                        )
                    )
        return batch


def _values(name: str, value: Any, length: int) -> Tensor:
    """A row's column as a tensor [tokens]; one number stands for all tokens."""
    kind = np.int64 if name == "sample_id" else np.float32
    found = torch.from_numpy(np.array(value, dtype=kind))
    return found.expand(length) if found.dim() == 0 else found


def _places(tokens: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
    """Where in the flattened batch each token went: [tokens of all rows]."""
    ids = batch["input_ids"]
    lengths = torch.tensor([len(row) for row in tokens])
    rows, width = ids.shape
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    within = torch.arange(int(lengths.sum())) - first
    candidates = []
    if rows == len(tokens) and width >= int(lengths.max()):
        start = torch.repeat_interleave(torch.arange(rows) * width, lengths)
        right = start + within
        left = start + within + torch.repeat_interleave(width - lengths, lengths)
        mask = batch.get("attention_mask")
        padded_left = mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all())
        candidates = [left, right] if padded_left else [right, left]
    elif rows == 1 and width >= int(lengths.sum()):
        candidates = [first + within]
    whole = torch.cat(tokens)
    for places in candidates:
        if torch.equal(ids.reshape(-1)[places], whole.to(ids)):
            return places
    raise InputError(
        Problem(
            "data_collator",
            "changes the tokens or their order, so the columns cannot follow them.",
            "Use a collator that only pads or flattens, or one of your own that makes the columns too.",
        )
    )


def _is_known(collator: Any) -> bool:
    """Whether `collator` is one that knows nothing of our columns and only lays out tokens."""
    types: tuple[type, ...] = (
        DataCollatorForLanguageModeling,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        DataCollatorWithPadding,
        DefaultDataCollator,
    )
    return (
        collator is default_data_collator
        or isinstance(collator, types)
        or any(
            base.__module__ == "trl.trainer.sft_trainer" and base.__name__ == "DataCollatorForLanguageModeling"
            for base in type(collator).__mro__
        )
    )


def column_names(dataset: Any) -> list[str] | None:
    """The columns of a data set that can be read without training; None for others (streams, classes of one's own)."""
    if isinstance(dataset, datasets.Dataset):
        return None if dataset.format["type"] == "custom" else dataset.column_names
    if isinstance(dataset, list) and dataset:
        return list(dataset[0])
    return None


def _numbered(dataset: Any, trainer: Trainer) -> Any:
    """The data set with a column ``sample_id`` that numbers its rows, or the sequences packed into them."""
    if isinstance(dataset, list):
        return [{**row, "sample_id": index} for index, row in enumerate(dataset)]
    if "seq_lengths" not in dataset.column_names:
        return dataset.add_column("sample_id", np.arange(len(dataset)))
    counts = pc.list_value_length(dataset.with_format("arrow")["seq_lengths"]).to_numpy()
    firsts = np.cumsum(counts) - counts

    def number(row: dict[str, Any], index: int) -> dict[str, Any]:
        lengths = row["seq_lengths"]
        return {"sample_id": np.repeat(np.arange(firsts[index], firsts[index] + len(lengths)), lengths)}

    return dataset.map(number, with_indices=True)


def check_columns(dataset: Any, names: Sequence[str], negative: bool, first_is_read: bool = False) -> None:
    """Check columns against the tokens of each row, before training.

    Values are checked only where they are read: at labels, and (unless `first_is_read`) not at a sequence's first
    token, which nothing predicts.

    Args:
        dataset: a data set of which `column_names` are known.
        names: the columns to check, where they are there.
        negative: whether ``loss_weights`` may be below 0.
        first_is_read: whether the first token of each row is predicted from the row before (wrapped packing).

    Raises:
        InputError: for the first row that is wrong, naming column, row, value and fix.
    """
    present = column_names(dataset) or []
    names = [name for name in names if name in present]
    for start, block in _blocks(
        dataset, [name for name in ("input_ids", "labels", "seq_lengths", *names) if name in present]
    ):
        _check_block(block, names, negative, start, first_is_read)


class _Check:
    """Checks the rows of one batch."""

    def __init__(self, names: Sequence[str], negative: bool):
        self.names = names
        self.negative = negative

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        names = [name for name in self.names if name in rows[0]]
        fields = [name for name in ("input_ids", "labels", "seq_lengths", *names) if name in rows[0]]
        _check_block({name: _Ragged.of([row[name] for row in rows]) for name in fields}, names, self.negative)


class _Ragged:
    """Lists of different lengths: how long each is (None where the rows hold plain numbers), and all values."""

    def __init__(self, lengths: np.ndarray | None, values: np.ndarray):
        self.lengths = lengths
        self.values = values

    @classmethod
    def of(cls, rows: Sequence[Any]) -> _Ragged:
        if all(np.ndim(row) == 0 for row in rows):
            return cls(None, np.asarray(rows))
        parts = [np.atleast_1d(np.asarray(row, dtype=None if None not in _plain(row) else float)) for row in rows]
        return cls(np.array([len(part) for part in parts]), np.concatenate(parts))


def _plain(row: Any) -> Any:
    return row if isinstance(row, (list, tuple)) else ()


def _blocks(dataset: Any, names: list[str]) -> Iterator[tuple[int, dict[str, _Ragged]]]:
    if isinstance(dataset, list):
        for start in range(0, len(dataset), _ROWS_AT_ONCE):
            rows = dataset[start : start + _ROWS_AT_ONCE]
            yield start, {name: _Ragged.of([row[name] for row in rows]) for name in names}
        return
    start = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
        block = {}
        for name in names:
            column = table[name].combine_chunks()
            if isinstance(dataset.features[name], datasets.Value):
                block[name] = _Ragged(None, column.to_numpy(zero_copy_only=False))
            else:
                lengths = pc.fill_null(pc.list_value_length(column), 0)
                values = pc.list_flatten(column)
                block[name] = _Ragged(lengths.to_numpy(zero_copy_only=False), values.to_numpy(zero_copy_only=False))
        yield start, block
        start += table.num_rows


def _check_block(
    block: dict[str, _Ragged], names: Sequence[str], negative: bool, start: int = 0, first_is_read: bool = False
) -> None:
    lengths = block["input_ids"].lengths
    assert lengths is not None
    ends = np.cumsum(lengths)
    read = np.ones(ends[-1] if len(ends) else 0, dtype=bool)
    if "labels" in block and block["labels"].values.shape == read.shape:
        read &= block["labels"].values != IGNORED
    if not first_is_read:
        sequences = block["seq_lengths"].values if "seq_lengths" in block else lengths
        firsts = np.cumsum(sequences) - sequences
        read[firsts[sequences > 0]] = False
    for name in names:
        column = block[name]
        values = column.values
        if column.lengths is None:
            if name != "sample_id":
                raise _wrong(start, name, f"is one number, {values[0]}, for the whole row.", _AS_LONG)
        elif (bad := np.flatnonzero(column.lengths != lengths)).size:
            row = int(bad[0])
            raise _wrong(
                start + row,
                name,
                f"has {column.lengths[row]} values for {lengths[row]} tokens.",
                _AS_LONG + " SFTTrainer cuts and packs it along with them only in a class T(tokenwise.WeighMixin, "
                "SFTTrainer).",
            )
        if name == "sample_id":
            if values.dtype.kind not in "iu":
                raise _wrong(start, name, f"holds {values.dtype} values.", "Number the samples by integers.")
            continue
        values = values.astype(float)
        wrong = ~np.isfinite(values)
        if name == "loss_weights" and not negative:
            wrong |= values < 0
        bad = np.flatnonzero(wrong & read)
        if bad.size:
            row = int(np.searchsorted(ends, bad[0], side="right"))
            token = int(bad[0] - (ends[row] - lengths[row]))
            fix = (
                "Weights are finite and at least 0."
                if name == "loss_weights" and not negative
                else "Give finite values."
            )
            raise _wrong(start + row, f"{name}[{token}]", f"is {values[bad[0]]}.", fix)


_AS_LONG = "Give one value for each token of input_ids, aligned like labels."


def _wrong(row: int, name: str, message: str, fix: str) -> InputError:
    return InputError(Problem(f"train_dataset[{row}].{name}", message, fix))
