"""One layer of a key-value cache that stores all tokens, and hands out some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenwise.models.selective_kv import FollowingLayer, append, needs_gradient, spare_places, take_heads


class GrowingLayer(FollowingLayer):
    """Stores all tokens in memory that has room for more, so that a new one copies none of the others.

    Tokens stand at the places of their columns. Where a row has padding between its tokens, as when a later turn is
    padded, what is stored is put in another order: padding in front, then the tokens.

    Attributes:
        pads: columns of padding of each row, [batch], int64; None until that is known.
        padded: whether any row has some.
        real: which of the first columns are no padding, where some stands between tokens, [batch, any], bool; behind
            them all are tokens. None where all padding stands in front.
        order: the column of each of the first places, where what is stored is in another order, [batch, any], int64;
            those behind stand at their columns. None where all do.
        notes: what is known of each row of the batch, by name, each [batch, ...]; forgotten when tokens are taken back.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.pads: Tensor | None = None
        self.padded = False
        self.real: Tensor | None = None
        self.order: Tensor | None = None
        self.notes: dict[str, Tensor] = {}
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def seen(self) -> int:
        """Tokens stored."""
        return self.get_seq_length()

    @property
    def rows(self) -> int | None:
        """How many rows the batch has; None before the first token."""
        return None if self._held is None else self._held[0].shape[0]

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token of every row takes in all heads."""
        assert self.keys is not None
        assert self.values is not None
        batch, heads = self.keys.shape[:2]
        return batch * heads * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def nbytes(self) -> int:
        """Bytes that keys and values take, with the room for more."""
        return 0 if self._held is None else sum(values.nbytes for values in self._held)

    def gave(self, key: Tensor) -> bool:
        """Whether `key` is what the last `update` returned: whether an attention call reads this layer."""
        return key is self.keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = None if self._held is None or self.keys is None or self.values is None else (self.keys, self.values)
        graded = needs_gradient(key_states, value_states)
        spare = 0 if graded else spare_places(self.seen + key_states.shape[2])
        held = None if graded else self._held
        self._held, (self.keys, self.values) = append(held, before, (key_states, value_states), spare)
        return self.keys, self.values

    def take(self, places: Tensor, into: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens.

        Args:
            places: [batch, key heads or 1, taken], int64.
            into: memory to write them to, which is made larger where it is too small; new memory unless given. Only
                where no gradient is wanted.

        Returns:
            Each [batch, key heads, taken, channels].
        """
        assert self._held is not None
        batch, heads, room, _ = self._held[0].shape
        starts = torch.arange(0, batch * heads * room, room, device=places.device).view(batch, heads, 1)
        index = places + starts
        rows = [held.flatten(0, 2) for held in self._held]
        if into is None:
            found = [values.index_select(0, index.flatten()) for values in rows]
        else:
            count = index.numel()
            writable = bool(into) and into[0].is_inference() == torch.is_inference_mode_enabled()
            if not writable or len(into[0]) < count or into[0].dtype != rows[0].dtype:
                into[:] = [values.new_empty(count + count // 8, values.shape[1]) for values in rows]
            found = [
                torch.index_select(values, 0, index.flatten(), out=memory[:count])
                for values, memory in zip(rows, into, strict=True)
            ]
        keys, values = (part.unflatten(0, index.shape) for part in found)
        return keys, values

    def shown(self, count: int) -> Tensor:
        """Which of the first `count` columns are no padding, [batch, count], bool."""
        assert self.pads is not None
        if self.real is not None:
            return torch.nn.functional.pad(self.real, (0, count - self.real.shape[1]), value=True)
        return torch.arange(count, device=self.pads.device) >= self.pads.unsqueeze(1)

    def note_padding(self, real: Tensor, tokens: int, move: bool = True) -> None:
        """Say which columns are padding.

        Args:
            real: which are none, [batch, seen], bool.
            tokens: how many of the last columns are new.
            move: whether padding between tokens is to be put in front of them.
        """
        known = real[:, : real.shape[1] - tokens]
        pads, among = (~real).sum(1), bool((real[:, :-1] & ~real[:, 1:]).any())
        if self.pads is not None and (among or self.real is not None):
            # What is noted of tokens is wrong where others are taken for padding than were before.
            self.notes = self.notes if torch.equal(self.shown(known.shape[1]), known) else {}
        self.pads, self.padded = pads, bool(pads.any())
        # Behind the last padding of all rows places are columns. A copy: it may be a row of a whole mask.
        self.real = real[:, : int((~real).any(0).nonzero().max()) + 1].clone() if among else None
        self._arrange(self.real.byte().argsort(dim=1, stable=True) if move and self.real is not None else None)

    def restore_order(self) -> None:
        """Let all tokens stand at the places of their columns."""
        self._arrange(None)

    def _arrange(self, order: Tensor | None) -> None:
        if order is None and self.order is None:
            return
        assert self.keys is not None
        places = torch.arange(self.seen, device=self.keys.device).expand(self.keys.shape[0], -1)
        before, after = (_continued(each, places) for each in (self.order, order))
        if not torch.equal(before, after):
            self._held = self.take(before.argsort(dim=1).gather(1, after).unsqueeze(1))
            self.keys, self.values = self._held
        self.order = order

    def columns_of(self, places: Tensor) -> Tensor:
        """The columns of the tokens at `places`, [batch, heads, any], int64; -1 stays."""
        if self.order is None:
            return places
        moved = self.order.shape[1]
        found = take_heads(self.order.unsqueeze(1), places.clamp(0, moved - 1))
        return torch.where((places < 0) | (places >= moved), places, found)

    def mask_of_places(self, mask: Tensor) -> Tensor:
        """A mask over columns, [batch or 1, heads, queries, seen], as one over places."""
        if self.order is None:
            return mask
        batch, moved = self.order.shape
        mask = mask.expand(batch, -1, -1, -1)
        index = self.order.view(batch, 1, 1, moved).expand(-1, *mask.shape[1:3], -1)
        return torch.cat([mask[..., :moved].gather(3, index), mask[..., moved:]], 3)

    def crop(self, tokens_to_remove: int) -> None:
        left = self.seen + tokens_to_remove
        real, move = self.real, self.order is not None
        among = real is not None and tokens_to_remove < 0 and left < real.shape[1]
        if among:
            self.restore_order()
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.notes = {}
        if among:
            assert real is not None
            self.note_padding(real[:, : self.seen], 0, move)

    def reset(self) -> None:
        super().reset()
        self.pads, self.padded, self.notes, self._held = None, False, {}, None
        self.real, self.order = None, None

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._held is None:
            return
        seen = self.seen
        self._held = change(self._held[0]), change(self._held[1])
        self.keys, self.values = (held[:, :, :seen] for held in self._held)
        for name in ("pads", "real", "order"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, change(values))
        self.notes = {name: change(values) for name, values in self.notes.items()}


def _continued(order: Tensor | None, places: Tensor) -> Tensor:
    """`order` ([batch, any]), or none, for all of `places` ([batch, seen]); those behind it stand at their columns."""
    return places if order is None else torch.cat([order, places[:, order.shape[1] :]], 1)
