"""One layer of a key-value cache whose heads store different numbers of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenwise.models.selective_kv import SelectiveLayer, needs_gradient, spare_places
from tokenwise.models.tap import AttentionCall
from tokenwise.signals.attention import attention_softmax


class RaggedLayer(SelectiveLayer):
    """Each head of each row stores tokens of its own number, one head behind the other in one piece of memory.

    An attention function reads keys of one length, so `update` gives back the new keys alone, and the attention is
    computed by `attend`.

    Attributes:
        flat_keys, flat_values: [places, head_dim] and [places, value_dim]; of each row and head so many places side by
            side, of which the first are in use.
        flat_positions: of the token at each place, [places], int64.
        lengths: places in use of each row and head, [batch, heads], on the CPU.
        room: places of each row and head, [batch, heads], on the CPU.
    """

    flat_keys: Tensor
    flat_values: Tensor
    flat_positions: Tensor
    lengths: Tensor
    room: Tensor
    _new: Tensor | None = None

    @classmethod
    def of(cls, layer: SelectiveLayer, shown: Tensor) -> RaggedLayer:
        """The tokens of `layer` that are `shown` ([batch, heads, stored], bool); those that do not count are not."""
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.positions is not None
        made = cls()
        made.dtype, made.device, made.is_initialized = layer.keys.dtype, layer.keys.device, True
        if layer.real is not None:
            shown = shown & layer.real
        made.seen, made.notes = layer.seen, layer.notes
        made.flat_keys, made.flat_values = layer.keys[shown], layer.values[shown]
        made.flat_positions = layer.positions.expand_as(shown)[shown]
        made.tracks = {name: values.expand_as(shown)[shown] for name, values in layer.tracks.items()}
        made.lengths = shown.sum(2).cpu()
        made.room = made.lengths.clone()
        return made

    @property
    def stored(self) -> int:
        return int(self.lengths.max())

    @property
    def rows(self) -> int | None:
        return self.lengths.shape[0]

    @property
    def key_heads(self) -> int:
        return self.lengths.shape[1]

    @property
    def token_nbytes(self) -> int:
        width = self.flat_keys.shape[1] + self.flat_values.shape[1]
        return self.lengths.numel() * width * self.flat_keys.element_size()

    def nbytes(self) -> int:
        return self.flat_keys.nbytes + self.flat_values.nbytes

    def mean_stored(self) -> float:
        return float(self.lengths.float().mean())

    def gave(self, key: Tensor) -> bool:
        return key is self._new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[2]
        if bool((self.lengths + tokens > self.room).any()):
            self._make_room(tokens)
        elif needs_gradient(key_states, value_states):
            self.flat_keys, self.flat_values = self.flat_keys.clone(), self.flat_values.clone()
        starts = self.room.flatten().cumsum(0) - self.room.flatten() + self.lengths.flatten()
        places = (starts.unsqueeze(1) + torch.arange(tokens)).flatten().to(self.flat_keys.device)
        self.flat_keys[places] = key_states.flatten(0, 2)
        self.flat_values[places] = value_states.flatten(0, 2)
        following = torch.arange(self.seen, self.seen + tokens, device=places.device)
        self.flat_positions[places] = following.repeat(self.lengths.numel())
        for values in self.tracks.values():
            values[places] = 0
        self.lengths = self.lengths + tokens
        self.seen += tokens
        self._new = key_states
        return key_states, value_states

    def attend(self, call: AttentionCall, whole: Tensor | None) -> Tensor:
        """What the attention of the new tokens gives, their own keys being stored already.

        Args:
            call: with their queries.
            whole: the model's mask over all tokens seen, [batch, 1, queries, seen], or None.

        Returns:
            [batch, queries, heads, value_dim].
        """
        batch, heads, tokens, _ = call.query.shape
        group = heads // self.key_heads
        output = call.query.new_empty(batch, tokens, heads, self.flat_values.shape[1])
        start = 0
        rooms, lengths = self.room.flatten().tolist(), self.lengths.flatten().tolist()
        for place, (room, length) in enumerate(zip(rooms, lengths, strict=True)):
            row, head = divmod(place, self.key_heads)
            mine = slice(start, start + length)
            start += room
            some = slice(head * group, (head + 1) * group)
            bias = self._bias(call, whole, row, self.flat_positions[mine], tokens)
            sinks = None if call.sinks is None else call.sinks[some]
            output[row, :, some] = _attention(
                call.query[row, some],
                self.flat_keys[mine],
                self.flat_values[mine],
                bias,
                call.scaling,
                call.softcap,
                sinks,
            ).transpose(0, 1)
        return output

    def padded(self) -> SelectiveLayer:
        """The same tokens with as many places for each head; the first do not count where there are fewer."""
        index, real = self._places()
        made = SelectiveLayer()
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        made.keys, made.values = self.flat_keys[index], self.flat_values[index]
        made.positions, made.real = self.flat_positions[index].masked_fill(~real, 0), real
        made.tracks = {name: values[index].masked_fill(~real, 0) for name, values in self.tracks.items()}
        made.seen, made.notes = self.seen, self.notes
        return made

    def set_tracks(self, tracks: dict[str, Tensor]) -> None:
        """Take over what is known of each token, as it stands in `padded`."""
        index, real = self._places()
        self.tracks = {}
        for name, values in tracks.items():
            made = values.new_zeros(len(self.flat_positions))
            made[index[real]] = values.expand_as(real)[real]
            self.tracks[name] = made

    def padded_call(self, call: AttentionCall, whole: Tensor | None) -> AttentionCall:
        """The call as it would be on `padded`."""
        layer = self.padded()
        mask = layer.mask_of_last(whole, call.query.shape[2])
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(call.query.shape[1] // mask.shape[1], 1)
        assert layer.keys is not None
        assert layer.values is not None
        return replace(call, key=layer.keys, value=layer.values, mask=mask, answer=None)

    def take_back(self, seen: int) -> None:
        layer = self.padded()
        layer.take_back(seen)
        assert layer.real is not None
        vars(self).update(vars(RaggedLayer.of(layer, layer.real)))

    def _rows(self, change: Any) -> None:
        layer = self.padded()
        layer._rows(change)
        assert layer.real is not None
        vars(self).update(vars(RaggedLayer.of(layer, layer.real)))

    def _places(self) -> tuple[Tensor, Tensor]:
        """Of each row and head the places in use, and which of them are, [batch, heads, most in use]."""
        most = self.stored
        starts = (self.room.flatten().cumsum(0) - self.room.flatten()).view_as(self.room)
        offset = torch.arange(most) - (most - self.lengths.unsqueeze(2))
        real = offset >= 0
        index = (starts.unsqueeze(2) + offset.clamp_min(0)).clamp_max(len(self.flat_keys) - 1)
        return index.to(self.flat_keys.device), real.to(self.flat_keys.device)

    def _make_room(self, tokens: int) -> None:
        room = self.lengths + tokens + spare_places(self.stored)
        starts = room.flatten().cumsum(0) - room.flatten()
        old = self.room.flatten().cumsum(0) - self.room.flatten()
        lengths = self.lengths.flatten()
        inside = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        source = (old.repeat_interleave(lengths) + inside).to(self.flat_keys.device)
        target = (starts.repeat_interleave(lengths) + inside).to(self.flat_keys.device)

        def moved(values: Tensor) -> Tensor:
            made = values.new_zeros(int(room.sum()), *values.shape[1:])
            made[target] = values[source]
            return made

        self.flat_keys, self.flat_values = moved(self.flat_keys), moved(self.flat_values)
        self.flat_positions = moved(self.flat_positions)
        self.tracks = {name: moved(values) for name, values in self.tracks.items()}
        self.room = room

    def _bias(
        self, call: AttentionCall, whole: Tensor | None, row: int, positions: Tensor, tokens: int
    ) -> Tensor | None:
        """What is added to the scores of one head's keys, [queries, keys], or None."""
        if whole is not None:
            columns = whole[row if whole.shape[0] > 1 else 0, 0][:, positions]
            if columns.dtype != torch.bool:
                return columns.float()
            if bool(columns.all()):
                return None
            return torch.zeros(columns.shape, device=columns.device).masked_fill_(~columns, float("-inf"))
        if tokens == 1:
            return None
        places = torch.arange(self.seen - tokens, self.seen, device=positions.device)
        hidden = positions > places.unsqueeze(1)
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The attention of a group of heads that share keys: [group, queries, value_dim].

    Args:
        query: [group, queries, head_dim].
        key, value: [keys, head_dim] and [keys, value_dim].
        bias: [queries, keys], or None.
        sinks: [group], or None.
    """
    if softcap is None and sinks is None and query.shape[1] > 1:
        mask = None if bias is None else bias.to(query.dtype).unsqueeze(0).unsqueeze(0)
        keys, values = (part.expand(1, query.shape[0], -1, -1) for part in (key, value))
        return functional.scaled_dot_product_attention(query.unsqueeze(0), keys, values, mask, scale=scaling)[0]
    scores = (query.flatten(0, 1) @ key.T).float().unflatten(0, query.shape[:2]) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    rows = attention_softmax(scores, None if sinks is None else sinks.view(-1, 1, 1)).to(value.dtype)
    return (rows.flatten(0, 1) @ value).unflatten(0, query.shape[:2])
