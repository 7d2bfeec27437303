"""The cache that stores all tokens and has each step read some of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from tokenwise.cache.attaching import ListeningCache
from tokenwise.cache.base import CacheSelector, StoredTokens
from tokenwise.cache.padding import seen_columns
from tokenwise.cache.refusals import basic_problems
from tokenwise.errors import InputError
from tokenwise.models.cache_memory import layer_nbytes
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.growing_kv import GrowingLayer
from tokenwise.models.selective_kv import hidden_value
from tokenwise.models.tap import AttentionCall


class SelectingCache(ListeningCache):
    """A cache of all tokens whose attention reads those a method selects, and a handle that ends it.

    Layers that see a window of the tokens are left as they are. Undone, it goes on as a cache that is read whole.

    Attributes:
        model: the model whose attention it listens to.
        method: the method.
        masked: whether all tokens are read and the others hidden.
        stats: ``tokens_seen`` (columns, padding included), ``tokens_read`` by the last step (mean over layers, of the
            row that reads most), ``bytes``, and ``full_bytes``, what a stock cache would take.
    """

    works_in: ClassVar[tuple[str, ...]] = ("_select",)

    def __init__(self, model: nn.Module, method: CacheSelector, masked: bool = False):
        attentions = cached_attentions(model)
        config: Any = model.config
        stock = DynamicCache(config=config).layers
        super().__init__([GrowingLayer() if type(layer) is DynamicLayer else layer for layer in stock])
        self.model = model
        self.method = method
        self.masked = masked
        self.places = tuple(
            index for index, layer in enumerate(self.layers) if type(layer) is GrowingLayer and index in attentions
        )
        """The layers that select, by their index in the model."""
        self._read: dict[int, Tensor | None] = {}
        # What a layer reads is copied to the same memory as what the one before it read: to get new memory from the
        # system takes longer than the attention.
        self._memory: list[Tensor] = []
        problems = basic_problems(model, method, self.places, method.recent)
        if problems:
            raise InputError(problems)
        self.attach(model, {index: attentions[index] for index in self.places})

    def nbytes(self) -> int:
        """Bytes that keys and values take, with layers of a window, room for new tokens, and what was read last."""
        layers = (layer.nbytes() if isinstance(layer, GrowingLayer) else layer_nbytes(layer) for layer in self.layers)
        return sum(layers) + sum(values.nbytes for values in self._memory)

    def full_nbytes(self) -> int:
        """Bytes that a stock cache of all tokens seen would take."""
        return sum(layer_nbytes(layer) for layer in self.layers)

    def kept(self, layer: int) -> Tensor:
        """Which of the tokens seen the last step read.

        Args:
            layer: its index in the model.

        Returns:
            [batch, key heads, seen], bool.
        """
        stored: GrowingLayer = self.layers[layer]
        assert stored.keys is not None
        batch, heads, seen, _ = stored.keys.shape
        places = self._read.get(layer)
        if places is None:
            shown = torch.ones(batch, heads, seen, dtype=torch.bool, device=stored.keys.device)
            return shown if stored.pads is None else shown & stored.shown(seen).unsqueeze(1)
        return _shown(places, seen).expand(-1, heads, -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Of a pass that broke off, some layers have seen the tokens and others have not.
        return min(self.layers[index].seen for index in self.places)

    def undo(self) -> None:
        # The model's masks go on to be made over columns, and nothing will turn them.
        for index in self.places:
            self.layers[index].restore_order()
        super().undo()

    def reset(self) -> None:
        super().reset()
        self._read.clear()
        self._memory.clear()

    def begin(self) -> None:
        """After a pass that broke off: forget what only some layers have seen."""
        seen = self.get_seq_length()
        for layer in self.layers:
            if seen == 0 and layer.get_seq_length():
                layer.reset()
            elif layer.get_seq_length() > seen:
                layer.crop(seen - layer.get_seq_length())

    def attended(self, index: int, call: AttentionCall) -> None:
        layer: GrowingLayer = self.layers[index]
        method, tokens = self.method, call.query.shape[2]
        first, new = layer.seen == tokens, None
        if first or tokens > 1 or layer.pads is None:
            new = _note_padding(layer, call, move=method.keep != 1.0)
        if method.keep == 1.0:
            return
        if layer.order is not None:
            assert layer.keys is not None
            assert layer.values is not None
            call.key, call.value = layer.keys, layer.values
            call.mask = None if call.mask is None else layer.mask_of_places(call.mask)
        self._select(index, layer, call, first, new)
        if index == self.places[-1]:
            read = [layer.seen if found is None else found.shape[2] for found in self._read.values()]
            self.stats.update(
                tokens_seen=layer.seen,
                tokens_read=sum(read) / len(read),
                bytes=self.nbytes(),
                full_bytes=self.full_nbytes(),
            )

    def _select(self, index: int, layer: GrowingLayer, call: AttentionCall, first: bool, new: Tensor | None) -> None:
        """Have the call read what the method selects; all of it in the `first` one."""
        method, tokens = self.method, call.query.shape[2]
        with torch.no_grad():
            stored = self._tokens(index, layer, call, new)
            method.observe(stored, call)
            places = None if first or (tokens > 1 and not method.parts) else method.select(stored, call)
        self._read[index] = None if places is None else layer.columns_of(places)
        if places is not None:
            call.mask = _mask(call, places, stored.real is not None, self.masked)
            if not self.masked:
                graded = torch.is_grad_enabled() and call.query.requires_grad
                call.key, call.value = layer.take(places.clamp_min(0), None if graded else self._memory)

    def _tokens(self, index: int, layer: GrowingLayer, call: AttentionCall, new: Tensor | None) -> StoredTokens:
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.pads is not None
        positions = torch.arange(layer.seen, device=layer.keys.device).expand(layer.keys.shape[0], 1, -1)
        return StoredTokens(
            layer.keys,
            layer.values,
            positions,
            _real(layer.pads, layer.seen) if layer.padded else None,
            layer.pads,
            layer.seen,
            self.places.index(index),
            len(self.places),
            call.scaling,
            call.softcap,
            call.query.shape[1],
            call.module,
            {},
            layer.notes,
            sinks=call.sinks,
            new=new,
        )


def _note_padding(layer: GrowingLayer, call: AttentionCall, move: bool) -> Tensor | None:
    """Note the padding of each row, and `move` what stands between tokens.

    Returns:
        Which of the call's own tokens are none, [batch, queries], bool; None where all are.
    """
    batch, device, tokens = call.query.shape[0], call.query.device, call.query.shape[2]
    last = seen_columns(call)
    if last is None:
        if layer.pads is None or layer.seen == tokens:
            layer.pads, layer.padded = torch.zeros(batch, dtype=torch.long, device=device), False
        return None
    layer.note_padding(last, tokens, move)
    new = last[:, -tokens:]
    return new if layer.padded and not bool(new.all()) else None


def _real(pads: Tensor, seen: int) -> Tensor:
    """Which tokens are no padding, [batch, 1, seen]."""
    return torch.arange(seen, device=pads.device) >= pads.view(-1, 1, 1)


def _shown(places: Tensor, seen: int) -> Tensor:
    """Which tokens stand at `places`, [batch, heads, seen]; -1 is none."""
    shown = torch.zeros(*places.shape[:2], seen + 1, dtype=torch.bool, device=places.device)
    # What fills up goes to a column that is cut off.
    return shown.scatter_(2, torch.where(places < 0, seen, places), True)[..., :seen]


def _mask(call: AttentionCall, places: Tensor, padded: bool, masked: bool) -> Tensor | None:
    """The call's mask over the tokens at `places`; over all of them, the others hidden, if `masked`."""
    whole, group = call.mask, call.query.shape[1] // call.key.shape[1]
    if whole is None and not (padded or masked):
        return None
    real = (_shown(places, call.key.shape[2]) if masked else places >= 0).unsqueeze(2)
    if whole is None:
        found = real.expand(-1, -1, call.query.shape[2], -1)
    else:
        found = whole.expand(places.shape[0], places.shape[1], -1, -1)
        if not masked:
            found = found.gather(3, places.clamp_min(0).unsqueeze(2).expand(-1, -1, found.shape[2], -1))
        if padded or masked:
            found = torch.where(real, found, hidden_value(found.dtype))
    return found.repeat_interleave(group, 1) if found.shape[1] > 1 else found
