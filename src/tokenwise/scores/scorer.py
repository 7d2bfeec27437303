"""One forward pass over the rows of a shard, and the statistics of their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenwise.models.adapters import adapters_disabled
from tokenwise.models.flops import FlopMeter
from tokenwise.models.head import base_of, last_hidden, output_head
from tokenwise.models.load import max_positions
from tokenwise.scores.layout import COLUMNS, NOT_PREDICTED, TYPES, Cost, Shard, shard_table
from tokenwise.signals.head import token_statistics

_METERED = 32
"""Tokens of the rows whose operations are counted."""


class Scorer:
    """Computes the columns of a store.

    Args:
        model: a causal language model, or a PEFT model.
        statistics: names in `COLUMNS`.
        top_k: entries per token of the statistic ``top_k``.
        batch_tokens: tokens of a forward pass at most, padding included; a longer row is a batch of its own.
        adapters: False runs a model that has adapters without them.
    """

    def __init__(
        self, model: nn.Module, statistics: Sequence[str], top_k: int, batch_tokens: int, adapters: bool = True
    ) -> None:
        self.model = model
        self.statistics = list(statistics)
        self.top_k = top_k
        self.batch_tokens = batch_tokens
        self.adapters = adapters

    def table(self, shard: Shard) -> tuple[pyarrow.Table, Cost]:
        """The table of a shard, see `layout`, and what it cost."""
        flops = self.flops([len(row) for row in shard.rows])
        started = time.perf_counter()
        table = shard_table(shard, self.columns(shard.rows))
        return table, Cost(flops, time.perf_counter() - started)

    def flops(self, lengths: Sequence[int]) -> float | None:
        """Operations that `columns` takes for rows of these lengths; None where they cannot be told.

        Counted on three short passes and scaled: the cost of a batch is linear in its tokens, in the pairs of tokens of
        its rows, padding included, and in what is predicted.
        """
        if self._flops is None:
            return None
        per_token, per_pair, per_label = self._flops
        total = 0.0
        for batch in batches(lengths, self.batch_tokens):
            longest, labels = lengths[batch[0]], sum(lengths[index] - 1 for index in batch)
            total += len(batch) * (per_token * longest + per_pair * longest**2) + per_label * labels
        return total

    @cached_property
    def _flops(self) -> tuple[float, float, float] | None:
        """Operations for each token, for each pair of tokens in a row, and for each label."""
        long = min(_METERED, max_positions(base_of(self.model).config) or _METERED)
        if long < 4:
            return None
        short = long // 2
        was_training = self.model.training
        self.model.eval()
        try:
            with adapters_disabled(self.model, not self.adapters), torch.no_grad():
                one, two, half = (self._metered(lengths) for lengths in ([long], [long, 2], [short]))
        finally:
            self.model.train(was_training)
        # A second row of one label costs as much again as the first, but for the other labels.
        label = (2 * one - two) / (long - 2)
        whole, part = (one - label * (long - 1)) / long, (half - label * (short - 1)) / short
        pair = (whole - part) / (long - short)
        return whole - pair * long, pair, label

    def _metered(self, lengths: Sequence[int]) -> int:
        meter = FlopMeter()
        with meter:
            self._score([np.zeros(length, dtype=np.int32) for length in lengths], np.zeros(len(lengths), np.int64))
        return meter.flops

    @torch.no_grad()
    def columns(self, rows: list[NDArray[np.int32]]) -> dict[str, NDArray[Any]]:
        """The columns of `rows`, one after the other: [tokens] each, [tokens, top_k] for ``top_ids`` and ``top_logp``.

        Rows of similar length share a batch, whatever their order.
        """
        names = [name for statistic in self.statistics for name in COLUMNS[statistic]]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        places: list[NDArray[np.int64]] = []
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        was_training = self.model.training
        self.model.eval()
        try:
            with adapters_disabled(self.model, not self.adapters):
                for batch in batches([len(row) for row in rows], self.batch_tokens):
                    place, values = self._score([rows[index] for index in batch], starts[batch])
                    places.append(place)
                    for name in names:
                        found[name].append(values[name])
        finally:
            self.model.train(was_training)
        columns = {}
        for name in names:
            shape = (int(starts[-1]), self.top_k) if name in COLUMNS["top_k"] else (int(starts[-1]),)
            columns[name] = np.full(shape, NOT_PREDICTED.get(name, 0), dtype=TYPES[name])
            if places:
                # The device is waited for once per shard, here.
                columns[name][np.concatenate(places)] = torch.cat(found[name]).cpu().numpy()
        return columns

    def _score(
        self, rows: list[NDArray[np.int32]], starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
        """The columns of the predicted tokens of a batch, and their places in the shard."""
        base = base_of(self.model)
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        # Padded on the right, where a causal model does not look: no mask is needed, and attention is fastest.
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        predicted = np.arange(1, longest) < lengths[:, None]
        row_of, column_of = predicted.nonzero()
        device = base.device
        hidden = last_hidden(base, input_ids=_moved(ids, device))
        statistics = token_statistics(
            hidden.reshape(-1, hidden.shape[-1]),
            output_head(base),
            _moved(ids[:, 1:][predicted], device),
            rows=_moved(row_of * longest + column_of, device),
            reads=self.statistics,
            top_k=self.top_k if "top_k" in self.statistics else 0,
        )
        values = {"logp": _half(-statistics.nll)}
        if statistics.entropy is not None:
            values["entropy"] = _half(statistics.entropy)
        if statistics.rank is not None:
            values["rank"] = statistics.rank
        if statistics.top_ids is not None and statistics.top_logp is not None:
            values["top_ids"], values["top_logp"] = statistics.top_ids, _half(statistics.top_logp)
        return starts[row_of] + column_of + 1, values


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Indices of rows to run together, longest first, within a budget of tokens that counts padding.

    Rows of one token have nothing to predict and are left out.
    """
    order = [index for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]) if lengths[index] > 1]
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield np.array(order[start : start + size])
        start += size


def _half(values: Tensor) -> Tensor:
    # Beyond fp16's range stands its end, never an infinity.
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half()


def _moved(values: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    # From pinned memory the copy does not wait for the forward pass before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
