"""One layer of a key-value cache that stores some tokens exactly and others in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenwise.models.selective_kv import SelectiveLayer, take_rows
from tokenwise.signals.packing import Packed, pack, unpack


class TieredLayer(SelectiveLayer):
    """Stores tokens in two tiers. New ones come to the exact tier.

    `update` gives all of them back in the type of the model, and `release` forgets that once the attention has been
    called, so that one layer at a time is unpacked.

    Attributes:
        packed_keys, packed_values: of the tokens in few bits, [batch, heads, packed] vectors.
        exact_keys, exact_values: of the others, [batch, heads, exact, channels].
        order: where each stored token stands among those packed and the exact ones behind them, [batch, heads,
            stored], int32.
    """

    packed_keys: Packed
    packed_values: Packed
    exact_keys: Tensor
    exact_values: Tensor
    order: Tensor

    @classmethod
    def of(cls, layer: SelectiveLayer, exact: Tensor, bits: int) -> TieredLayer:
        """The tokens of `layer`, those that are not `exact` ([batch, heads or 1, stored], bool) in 8 or 4 `bits`."""
        assert layer.keys is not None
        assert layer.values is not None
        made = cls()
        made.dtype, made.device, made.is_initialized = layer.keys.dtype, layer.keys.device, True
        made.positions, made.real, made.seen = layer.positions, layer.real, layer.seen
        made.tracks, made.notes = layer.tracks, layer.notes
        exact = exact.expand(-1, layer.key_heads, -1)
        counts, stored = exact.sum(2), exact.shape[2]
        most, least = int(counts.max()), int(counts.min())
        # Those to be packed first, and all in the order they stand in. Where heads have different numbers of exact
        # tokens some are stored in both tiers, and count as what they are.
        places = exact.long().argsort(dim=2, stable=True)
        packed, kept = places[..., : stored - least], places[..., stored - most :]
        made.packed_keys, made.packed_values = (
            pack(take_rows(values, packed), bits) for values in (layer.keys, layer.values)
        )
        made.exact_keys, made.exact_values = take_rows(layer.keys, kept), take_rows(layer.values, kept)
        order = places.argsort(dim=2)
        made.order = torch.where(exact, order + (most - least), order).int()
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
        exact = self.exact_keys.nbytes + self.exact_values.nbytes
        return exact + self.packed_keys.nbytes + self.packed_values.nbytes

    def is_exact(self) -> Tensor:
        """Which of the stored tokens are exact, [batch, heads, stored], bool."""
        return self.order >= self.packed_keys.codes.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._unpacked()
        found = super().update(key_states, value_states, *args, **options)
        end = self.packed_keys.codes.shape[2] + self.exact_keys.shape[2]
        new = torch.arange(end, end + key_states.shape[2], dtype=torch.int32, device=self.order.device)
        self.order = torch.cat([self.order, new.expand(*self.order.shape[:2], -1)], 2)
        self.exact_keys = torch.cat([self.exact_keys, key_states], 2)
        self.exact_values = torch.cat([self.exact_values, value_states], 2)
        return found

    def release(self) -> None:
        """Forget what is unpacked."""
        self.keys = self.values = None

    def whole(self) -> SelectiveLayer:
        """The same tokens in the type of the model, all of them."""
        made = SelectiveLayer()
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        made.keys, made.values = self._unpacked()
        made.positions, made.real, made.seen = self.positions, self.real, self.seen
        made.tracks, made.notes = dict(self.tracks), self.notes
        return made

    def take_back(self, seen: int) -> None:
        layer = self.whole()
        layer.tracks["exact"] = self.is_exact()
        layer.take_back(seen)
        exact = layer.tracks.pop("exact")
        vars(self).update(vars(TieredLayer.of(layer, exact, self.packed_keys.bits)))

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._rows(change)
        self.exact_keys, self.exact_values = change(self.exact_keys), change(self.exact_values)
        self.order = change(self.order)
        self.packed_keys, self.packed_values = (
            replace(part, codes=change(part.codes), low=change(part.low), step=change(part.step))
            for part in (self.packed_keys, self.packed_values)
        )

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        keys, values = (
            take_rows(torch.cat([unpack(packed), exact], 2), self.order)
            for packed, exact in (
                (self.packed_keys, self.exact_keys),
                (self.packed_values, self.exact_values),
            )
        )
        return keys, values
