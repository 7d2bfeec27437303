"""One layer of a key-value cache that has seen more tokens than it stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenwise.errors import InputError, Problem


def spare_places(stored: int) -> int:
    """Places for new tokens that are made when a generated one finds none, and all keys and values are copied: a
    sixteenth of what is stored, 64 at most."""
    return min(max(stored // 16, 1), 64)


def needs_gradient(*states: Tensor) -> bool:
    """Whether a gradient is to flow to new keys or values: then nothing may be written behind those before them."""
    return torch.is_grad_enabled() and any(values.requires_grad for values in states)


class FollowingLayer(DynamicLayer):
    """A layer of which more than keys and values follows the rows of a batch when beams are reordered."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda values: values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda values: values[indices.to(values.device)])

    @abstractmethod
    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of all that is stored for a batch."""


class SelectiveLayer(FollowingLayer):
    """Stores the keys and values of some of the tokens it has seen, for each head those of its own.

    Lengths are those of all tokens seen, so that positions and masks are made as for a full cache; `mask` then takes
    the columns of what is stored. Everything follows the rows of a batch when beams are reordered.

    Attributes:
        seen: tokens so far, whether stored or not.
        positions: which of them are stored, [batch, heads, stored], int64, rising; one head where all store the same;
            None before the first.
        real: which of the stored ones count; the others fill up rows that store fewer. Of the shape of `positions` or
            with one head, bool; None where all do.
        tracks: what is known of each stored token, by name, each [batch, heads, stored]; follows the tokens. Those of
            new tokens are 0.
        notes: what is known of each row of the batch, by name, each [batch, ...].
        rising: whether what is stored stands in the order of its positions.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.seen = 0
        self.positions: Tensor | None = None
        self.real: Tensor | None = None
        self.tracks: dict[str, Tensor] = {}
        self.notes: dict[str, Tensor] = {}
        self.rising = True
        self._next: tuple[Tensor, Tensor | None, int] | None = None
        # What `keys` and `values` are the beginnings of, where there is room behind them.
        self._roomy: tuple[Tensor, Tensor] | None = None

    @property
    def stored(self) -> int:
        """How many tokens are stored for each row of the batch."""
        return 0 if self.positions is None else self.positions.shape[2]

    @property
    def rows(self) -> int | None:
        """How many rows the batch has; None before the first token."""
        return None if self.positions is None else self.positions.shape[0]

    @property
    def key_heads(self) -> int:
        """How many heads have keys of their own."""
        assert self.keys is not None
        return self.keys.shape[1]

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token of every row takes in all heads."""
        assert self.keys is not None
        assert self.values is not None
        batch, heads = self.keys.shape[:2]
        return batch * heads * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def nbytes(self) -> int:
        """Bytes that the stored keys and values take, and the room behind them."""
        held = (self.keys, self.values) if self._roomy is None else self._roomy
        return sum(0 if values is None else values.nbytes for values in held)

    def mean_stored(self) -> float:
        """Tokens that count, as a mean over rows and heads."""
        return float(self.stored) if self.real is None else float(self.real.sum(2).float().mean())

    def take_back(self, seen: int) -> None:
        """Forget all but the first `seen` tokens seen; what has been evicted meanwhile stays gone."""
        assert self.positions is not None
        if not self.rising:
            self.sort()
        before = self.positions < seen
        counts = before.sum(2)
        if bool((counts == counts[0, 0]).all()):
            self.keep(torch.arange(int(counts[0, 0]), device=before.device).expand(*before.shape[:2], -1))
        else:
            self.hide(before)
        self.seen = seen

    def gave(self, key: Tensor) -> bool:
        """Whether `key` is what the last `update` returned: whether an attention call reads this layer."""
        return key is self.keys

    def expect(self, positions: Tensor, seen: int, real: Tensor | None = None) -> None:
        """Say what the next `update` brings, which is otherwise taken for the tokens that follow those seen.

        Args:
            positions: of its tokens, [batch, tokens], int64.
            seen: how many tokens have been seen with them.
            real: which of them count, [batch, tokens], bool; all unless given.
        """
        self._next = (positions.unsqueeze(1), None if real is None else real.unsqueeze(1), seen)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        batch, _, tokens, _ = key_states.shape
        if self._next is None:
            positions = torch.arange(self.seen, self.seen + tokens, device=key_states.device).expand(batch, 1, -1)
            real, seen = None, self.seen + tokens
        else:
            positions, real, seen = self._next
            self._next = None
        if real is not None or self.real is not None:
            before = self.real
            if before is None:
                before = torch.ones(batch, 1, self.stored, dtype=torch.bool, device=key_states.device)
            real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
            self.real = torch.cat([before, real.expand(-1, before.shape[1], -1)], 2)
        if self.positions is None:
            self.positions = positions
        else:
            self.positions = torch.cat([self.positions, positions.expand(-1, self.positions.shape[1], -1)], 2)
        for name, values in self.tracks.items():
            self.tracks[name] = torch.nn.functional.pad(values, (0, tokens))
        self.seen = seen
        return self._append(key_states, value_states)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values behind the others; single ones where there is room, so that nothing is copied."""
        tokens = key_states.shape[2]
        graded = needs_gradient(key_states, value_states)
        if self.keys is None or self.values is None or tokens > 1 or graded:
            self._roomy = None
            return super().update(key_states, value_states)
        before, spare = (self.keys, self.values), spare_places(self.keys.shape[2]) - 1
        self._roomy, (self.keys, self.values) = append(self._roomy, before, (key_states, value_states), spare)
        return self.keys, self.values

    def leave_room(self) -> None:
        """Write new tokens to memory of its own, where another layer has the same keys and values."""
        self._roomy = None

    def replace_keys(self, keys: Tensor) -> None:
        """Store other keys for the same tokens."""
        if keys is not self.keys:
            self.keys, self._roomy = keys, None

    def drop(self, gone: Tensor) -> None:
        """Free one token of each head, without copying the others: the last one takes its place.

        What is stored is then no longer `rising`.

        Args:
            gone: its place, [batch, heads, 1], int64; one head where it is the same in all.
        """
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        assert self.real is None
        last = self.stored - 1
        if self._roomy is None:
            self._roomy = (self.keys, self.values)
        index = gone.expand(-1, self.key_heads, -1).unsqueeze(3)
        for held in (self.keys, self.values):
            held.scatter_(2, index.expand(-1, -1, -1, held.shape[3]), held[:, :, last:].clone())
        self.keys, self.values = self.keys[:, :, :last], self.values[:, :, :last]
        self.positions = _without(self.positions, gone)
        self.tracks = {name: _without(values, gone) for name, values in self.tracks.items()}
        self.rising = False

    def sort(self) -> Tensor:
        """Let what is stored stand in the order of its positions.

        Returns:
            Where each stood, [batch, heads, stored], int64.
        """
        assert self.positions is not None
        order = self.positions.argsort(dim=2)
        self.keep(order)
        self.rising = True
        return order

    def keep(self, index: Tensor, real: Tensor | None = None) -> None:
        """Store some of the tokens alone and free the memory of the others.

        Args:
            index: which of the stored ones, [batch, heads, kept], int64, rising; one head where all keep the same.
            real: which of these count, of the shape of `index`, bool; those that count now unless given.
        """
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        heads = self.keys.shape[1]
        if self.real is not None:
            still = take_heads(self.real, index)
            real = still if real is None else still & real
        self.real = real
        self.positions = take_heads(self.positions, index)
        self.tracks = {name: take_heads(values, index) for name, values in self.tracks.items()}
        index = index.expand(-1, heads, -1)
        self.keys, self.values = take_rows(self.keys, index), take_rows(self.values, index)
        self._roomy = None

    def hide(self, shown: Tensor) -> None:
        """As `keep`, but all stay stored, and those not in `shown` ([batch, heads, stored], bool) do not count."""
        self.real = shown if self.real is None else self.real & shown

    def mask(self, whole: Tensor | None, tokens: int) -> Tensor | None:
        """The mask of the next `tokens` queries over what is stored and themselves.

        Args:
            whole: their mask over all tokens seen and themselves, [batch, 1, tokens, seen + tokens], bool or what is
                added to the scores; None where nothing is hidden, or where each sees those before it.
            tokens: how many follow.

        Returns:
            [batch, heads, tokens, stored + tokens], with one head where all are alike; or None.
        """
        assert self.positions is not None
        return _mask_of(self.positions, self.real, self.seen, whole, tokens)

    def mask_of_last(self, whole: Tensor | None, tokens: int) -> Tensor | None:
        """As `mask`, once the queries' own keys are stored behind the others."""
        assert self.positions is not None
        real = None if self.real is None else self.real[..., :-tokens]
        return _mask_of(self.positions[..., :-tokens], real, self.seen - tokens, whole, tokens)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        # What is left of the keys must not be taken for a beginning of the next prompt.
        self.keys, self.values, self.is_initialized, self._roomy = None, None, False, None
        self.seen, self.positions, self.real, self._next = 0, None, None, None
        self.tracks, self.notes, self.rising = {}, {}, True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError(
                Problem(
                    "past_key_values",
                    "stores fewer tokens than it has seen and cannot take the last ones back.",
                    "Generate without assisted decoding.",
                )
            )

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._roomy = None
        for name in ("keys", "values", "positions", "real"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, change(values))
        self.tracks = {name: change(values) for name, values in self.tracks.items()}
        self.notes = {name: change(values) for name, values in self.notes.items()}


Pair = tuple[Tensor, Tensor]
"""Keys and values, each [batch, heads, tokens, channels]."""


def append(roomy: Pair | None, before: Pair | None, new: Pair, spare: int) -> tuple[Pair, Pair]:
    """Keys and values behind others, copying these only where there is no room behind them.

    Args:
        roomy: memory that `before` is the beginning of; None where it is of no such memory.
        before: what is stored; None where nothing is.
        new: what is to stand behind it.
        spare: places to be left free where memory has to be made.

    Returns:
        The memory, and all that is stored in it.
    """
    stored, tokens = 0 if before is None else before[0].shape[2], new[0].shape[2]
    if roomy is None or roomy[0].shape[2] < stored + tokens:
        first, second = (
            states.new_empty(*states.shape[:2], stored + tokens + spare, states.shape[3]) for states in new
        )
        roomy = first, second
        for place, values in zip(roomy, before or (), strict=False):
            place[:, :, :stored] = values
    for place, states in zip(roomy, new, strict=True):
        place[:, :, stored : stored + tokens] = states
    keys, values = (place[:, :, : stored + tokens] for place in roomy)
    return roomy, (keys, values)


def _without(values: Tensor, gone: Tensor) -> Tensor:
    """`values` ([batch, heads, tokens]) with the last one at the place of the one that is gone."""
    values = values.expand(-1, max(values.shape[1], gone.shape[1]), -1)
    moved = values.clone(memory_format=torch.contiguous_format)
    last = values.shape[2] - 1
    return moved.scatter_(2, gone.expand(-1, values.shape[1], -1), values[..., last:])[..., :last]


def take_heads(values: Tensor, index: Tensor) -> Tensor:
    """Of `values` ([batch, heads, tokens]) those at `index` ([batch, heads, taken]); either may have one head."""
    heads = max(values.shape[1], index.shape[1])
    return values.expand(-1, heads, -1).gather(2, index.expand(-1, heads, -1))


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Of `values` ([batch, heads, tokens, channels]) the rows at `index` ([batch, heads, taken]).

    Copies whole rows: `gather` looks up every channel by itself, which takes several times as long.
    """
    batch, heads, tokens, _ = values.shape
    starts = (torch.arange(batch * heads, device=index.device) * tokens).view(batch, heads, 1)
    return values.flatten(0, 2).index_select(0, (index + starts).flatten()).unflatten(0, index.shape)


def take_channels(values: Tensor, index: Tensor) -> Tensor:
    """Of `values` ([batch, heads, tokens, channels]) the channels at `index` ([batch, key heads, taken]).

    Heads that share a key stand beside each other and take the same.
    """
    index = index.repeat_interleave(values.shape[1] // index.shape[1], 1).unsqueeze(2)
    return values.gather(3, index.expand(-1, -1, values.shape[2], -1))


def _mask_of(positions: Tensor, real: Tensor | None, seen: int, whole: Tensor | None, tokens: int) -> Tensor | None:
    device = positions.device
    if whole is None:
        if real is None:
            return None
        before = real.unsqueeze(2).expand(-1, -1, tokens, -1)
        among = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().expand(*before.shape[:3], -1)
        return torch.cat([before, among], 3)
    batch, heads = positions.shape[:2]
    # All that is stored lies behind every query, so that the last one sees as much of it as the others.
    last = whole[:, 0, -1:].expand(batch, heads, -1)
    before = last.gather(2, positions)
    if real is not None:
        before = torch.where(real, before, hidden_value(before.dtype))
    if before.shape[1] > 1 and bool((before == before[:, :1]).all()):
        before = before[:, :1]
    before = before.unsqueeze(2).expand(-1, -1, tokens, -1)
    among = whole[..., seen:].expand(batch, before.shape[1], -1, -1)
    return torch.cat([before, among], 3)


def hidden_value(dtype: torch.dtype) -> float | bool:
    """What a mask of this type has where a key is hidden."""
    return False if dtype == torch.bool else torch.finfo(dtype).min
