"""One layer of a key-value cache that stores all tokens, and hands out some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenwise.models.selective_kv import FollowingLayer, append, needs_gradient, spare_places


class GrowingLayer(FollowingLayer):
    """Stores all tokens in memory that has room for more, so that a new one copies none of the others.

    Attributes:
        pads: columns of padding in front of each row, [batch], int64; None until that is known.
        padded: whether any row has some.
        notes: what is known of each row of the batch, by name, each [batch, ...]; forgotten when tokens are taken back.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.pads: Tensor | None = None
        self.padded = False
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

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.notes = {}

    def reset(self) -> None:
        super().reset()
        self.pads, self.padded, self.notes, self._held = None, False, {}, None

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._held is None:
            return
        seen = self.seen
        self._held = change(self._held[0]), change(self._held[1])
        self.keys, self.values = (held[:, :, :seen] for held in self._held)
        self.pads = None if self.pads is None else change(self.pads)
        self.notes = {name: change(values) for name, values in self.notes.items()}
