"""One layer of a key-value cache that has seen more tokens than it stores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenwise.errors import InputError, Problem


class SelectiveLayer(DynamicLayer):
    """Stores the keys and values of some of the tokens it has seen.

    Lengths are those of all tokens seen, so that positions and masks are made as for a full cache; `mask` then takes
    the columns of what is stored. Everything follows the rows of a batch when beams are reordered.

    Attributes:
        seen: tokens so far, whether stored or not.
        positions: which of them are stored, [batch, stored], int64; None before the first.
        real: which of the stored ones count; the others fill up rows that store fewer. [batch, stored], bool; None
            where all do.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.seen = 0
        self.positions: Tensor | None = None
        self.real: Tensor | None = None
        self._next: tuple[Tensor, Tensor | None, int] | None = None

    @property
    def stored(self) -> int:
        """How many tokens are stored for each row of the batch."""
        return 0 if self.positions is None else self.positions.shape[1]

    def nbytes(self) -> int:
        """Bytes that the stored keys and values take."""
        return sum(0 if values is None else values.nbytes for values in (self.keys, self.values))

    def expect(self, positions: Tensor, seen: int, real: Tensor | None = None) -> None:
        """Say what the next `update` brings, which is otherwise taken for the tokens that follow those seen.

        Args:
            positions: of its tokens, [batch, tokens], int64.
            seen: how many tokens have been seen with them.
            real: which of them count, [batch, tokens], bool; all unless given.
        """
        self._next = (positions, real, seen)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        batch, _, tokens, _ = key_states.shape
        if self._next is None:
            positions = torch.arange(self.seen, self.seen + tokens, device=key_states.device).expand(batch, -1)
            real, seen = None, self.seen + tokens
        else:
            positions, real, seen = self._next
            self._next = None
        if real is not None or self.real is not None:
            before = self.real
            if before is None:
                before = torch.ones(batch, self.stored, dtype=torch.bool, device=key_states.device)
            real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
            self.real = torch.cat([before, real], 1)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], 1)
        self.seen = seen
        return super().update(key_states, value_states, *args, **options)

    def mask(self, whole: Tensor | None, tokens: int) -> Tensor | None:
        """The mask of the next `tokens` queries over what is stored and themselves.

        Args:
            whole: their mask over all tokens seen and themselves, [batch, heads or 1, tokens, seen + tokens], bool or
                what is added to the scores; None where nothing is hidden, or where each sees those before it.
            tokens: how many follow.

        Returns:
            [batch, heads or 1, tokens, stored + tokens], or None.
        """
        assert self.positions is not None
        batch, device = self.positions.shape[0], self.positions.device
        if whole is None:
            if self.real is None:
                return None
            before = self.real[:, None, None].expand(-1, 1, tokens, -1)
            among = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
            return torch.cat([before, among], 3)
        following = torch.arange(self.seen, self.seen + tokens, device=device).expand(batch, -1)
        columns = torch.cat([self.positions, following], 1)[:, None, None]
        whole = whole.expand(batch, *whole.shape[1:])
        taken = whole.gather(3, columns.expand(-1, *whole.shape[1:3], -1))
        if self.real is None:
            return taken
        hidden = ~torch.nn.functional.pad(self.real, (0, tokens), value=True)[:, None, None]
        return taken.masked_fill(hidden, hidden_value(taken.dtype))

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.seen, self.positions, self.real, self._next = 0, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError(
                Problem(
                    "past_key_values",
                    "stores fewer tokens than it has seen and cannot take the last ones back.",
                    "Generate without assisted decoding.",
                )
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda values: values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda values: values[indices.to(values.device)])

    def _rows(self, change: Any) -> None:
        for name in ("keys", "values", "positions", "real"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, change(values))


def hidden_value(dtype: torch.dtype) -> float | bool:
    """What a mask of this type has where a key is hidden."""
    return False if dtype == torch.bool else torch.finfo(dtype).min
