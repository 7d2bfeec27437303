"""One layer of a key-value cache that stores some tokens exactly and others in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenwise.models.selective_kv import SelectiveLayer, take_heads, take_rows
from tokenwise.signals.packing import Packed, pack, unpack


class TieredLayer(SelectiveLayer):
    """Stores tokens in two tiers: those in few bits, and behind them the exact ones, to which new ones come.

    `update` gives all of them back in the type of the model, and `release` forgets that once the attention has been
    called, so that one layer at a time is unpacked. Positions, and what is known of each token, stand as the tokens do:
    they rise within each tier alone, but for `whole`.

    Attributes:
        packed_keys, packed_values: of the tokens in few bits, [batch, heads, packed] vectors.
        exact_keys, exact_values: of the others, [batch, heads, exact, channels].
    """

    packed_keys: Packed
    packed_values: Packed
    exact_keys: Tensor
    exact_values: Tensor

    @classmethod
    def of(cls, layer: SelectiveLayer, exact: Tensor, bits: int) -> TieredLayer:
        """The tokens of `layer`, those that are not `exact` ([batch, heads or 1, stored], bool) in 8 or 4 `bits`."""
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.positions is not None
        made = cls()
        made.dtype, made.device, made.is_initialized = layer.keys.dtype, layer.keys.device, True
        exact = exact.expand(*layer.keys.shape[:3])
        counts, stored = exact.sum(2, keepdim=True), exact.shape[2]
        most, least = int(counts.max()), int(counts.min())
        # The packed ones first, and each tier in the order they stood in. Where heads have different numbers of exact
        # tokens some are stored in both tiers, and count in one.
        places = exact.long().argsort(dim=2, stable=True)
        packed, kept = places[..., : stored - least], places[..., stored - most :]
        both = torch.cat([packed, kept], 2)
        made.real = None if layer.real is None else take_heads(layer.real, both)
        if most > least:
            where = torch.arange(both.shape[2], device=both.device)
            counted = torch.where(where < stored - least, where < stored - counts, where >= both.shape[2] - counts)
            made.real = counted if made.real is None else made.real & counted
        made.positions, made.seen, made.notes = take_heads(layer.positions, both), layer.seen, layer.notes
        made.tracks = {name: take_heads(values, both) for name, values in layer.tracks.items()}
        made.packed_keys, made.packed_values = (
            pack(take_rows(values, packed), bits) for values in (layer.keys, layer.values)
        )
        made.exact_keys, made.exact_values = take_rows(layer.keys, kept), take_rows(layer.values, kept)
        return made

    @property
    def key_heads(self) -> int:
        return self.exact_keys.shape[1]

    @property
    def token_nbytes(self) -> int:
        batch, heads, _, width = self.exact_keys.shape
        return batch * heads * (width + self.exact_values.shape[3]) * self.exact_keys.element_size()

    def nbytes(self) -> int:
        """Bytes that both tiers take, without what is unpacked while the attention is called."""
        exact = sum(values.nbytes for values in self._roomy or (self.exact_keys, self.exact_values))
        return exact + self.packed_keys.nbytes + self.packed_values.nbytes

    def is_exact(self) -> Tensor:
        """Which of the stored tokens are exact, [batch, heads, stored], bool."""
        assert self.positions is not None
        places = torch.arange(self.stored, device=self.positions.device)
        return (places >= self.packed_keys.codes.shape[2]).expand_as(self.positions)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.exact_keys, self.exact_values
        self.exact_keys, self.exact_values = super().update(key_states, value_states, *args, **options)
        self.keys, self.values = self._unpacked()
        return self.keys, self.values

    def release(self) -> None:
        """Forget what is unpacked."""
        self.keys = self.values = None

    def whole(self) -> SelectiveLayer:
        """The same tokens in the type of the model, all of them, in the order of their positions."""
        assert self.positions is not None
        made = SelectiveLayer()
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        keys, values = self._unpacked()
        real = torch.ones_like(self.positions, dtype=torch.bool) if self.real is None else self.real
        real = real.expand_as(self.positions)
        most = int(real.sum(2).max())
        # What does not count stands first.
        order = self.positions.masked_fill(~real, -1).argsort(dim=2, stable=True)[..., -most:]
        real = take_heads(real, order)
        made.real = None if bool(real.all()) else real
        made.keys, made.values = take_rows(keys, order), take_rows(values, order)
        made.positions, made.seen, made.notes = take_heads(self.positions, order), self.seen, self.notes
        made.tracks = {name: take_heads(values, order) for name, values in self.tracks.items()}
        return made

    def take_back(self, seen: int) -> None:
        self.tracks["exact"] = self.is_exact()
        layer = self.whole()
        layer.take_back(seen)
        exact = layer.tracks.pop("exact")
        vars(self).update(vars(TieredLayer.of(layer, exact, self.packed_keys.bits)))

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._rows(change)
        self.exact_keys, self.exact_values = change(self.exact_keys), change(self.exact_values)
        self.packed_keys, self.packed_values = (
            replace(part, codes=change(part.codes), low=change(part.low), step=change(part.step))
            for part in (self.packed_keys, self.packed_values)
        )

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values of both tiers."""
        keys, values = (
            _joined(packed, exact)
            for packed, exact in ((self.packed_keys, self.exact_keys), (self.packed_values, self.exact_values))
        )
        return keys, values


def _joined(packed: Packed, exact: Tensor) -> Tensor:
    batch, heads, tokens, channels = exact.shape
    count = packed.codes.shape[2]
    made = exact.new_empty(batch, heads, count + tokens, channels)
    unpack(packed, made[:, :, :count])
    made[:, :, count:] = exact
    return made
