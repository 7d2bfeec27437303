"""The cache that evicts: a transformers Cache whose layers store what a method keeps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.ragged_kv import RaggedLayer
from tokenwise.models.rotary import Rotary, find_rotary
from tokenwise.models.selective_kv import SelectiveLayer
from tokenwise.models.tap import AttentionCall, listen
from tokenwise.policies.budget import kept_count
from tokenwise.policies.eviction import best_of_all, best_of_each_head, protected, pyramid_counts


class EvictingCache(Cache, Handle):
    """A cache that stores the tokens a method keeps, and a handle that ends it.

    Layers that see a window of the tokens are left as they are: they store no more than their window anyway.

    Attributes:
        model: the model whose attention it listens to.
        method: the method.
        masked: whether all tokens stay stored and the others are hidden.
        stats: ``tokens_seen`` (columns, padding included), ``tokens_stored`` (mean over rows, layers and heads),
            ``bytes``, and ``full_bytes``, what a cache of all tokens would take.
    """

    layers: list[Any]

    def __init__(self, model: nn.Module, method: CachePolicy, masked: bool = False):
        attentions = cached_attentions(model)
        Cache.__init__(self, layers=_layers(model))
        Handle.__init__(self)
        self.model = model
        self.method = method
        self.masked = masked
        self._places = [
            index for index, layer in enumerate(self.layers) if type(layer) is SelectiveLayer and index in attentions
        ]
        self._attentions: dict[int, Any] = {index: attentions[index] for index in self._places}
        self._calls: dict[int, tuple[float, float | None, int]] = {}
        self._pending: dict[int, Tensor] = {}
        self._evicted_at: dict[int, int] = {}
        self._held = False
        self._ended = False
        self._rotary: Rotary | None = None
        self._check(model)
        mine = weakref.ref(self)
        for index in self._places:
            self.on_undo(listen(attentions[index], _listener(mine, index)))
        hook = model.register_forward_pre_hook(_repairer(mine))
        self.on_undo(hook.remove)
        weakref.finalize(self, self._undos.close)

    def _check(self, model: nn.Module) -> None:
        method, name, problems = self.method, type(self.method).__name__, []
        if not self._places:
            problems.append(
                Problem(
                    "model",
                    f"{type(model).__name__} has no layer whose cache holds all tokens.",
                    "Nothing can be evicted from layers that store a window of the tokens, or a state.",
                )
            )
        keep = method.keep
        if isinstance(keep, str) and keep.endswith("tokens") and int(keep.split()[0]) < max(method.protects, 1):
            problems.append(
                Problem(
                    f"{name}.keep",
                    f"{keep!r} is less than the {method.protects} tokens that stay whatever their score "
                    f"(sink {method.sink}, at the end {max(method.recent, method.window)}).",
                    "Keep more, or protect less.",
                )
            )
        if isinstance(keep, str) and keep.endswith("bytes") and self._places:
            config = self._attentions[self._places[0]].config
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            dtype = next(model.parameters()).dtype
            token = 2 * width * heads * len(self._places) * dtype.itemsize
            if int(keep.split()[0]) < token * max(method.protects, 1):
                problems.append(
                    Problem(
                        f"{name}.keep",
                        f"{keep!r} is less than {max(method.protects, 1)} tokens take: {token} bytes each, in "
                        f"{len(self._places)} layers.",
                        "Keep more.",
                    )
                )
        if method.positions == "compact" and not problems:
            self._rotary = find_rotary(model, self._attentions[self._places[0]])
        if problems:
            raise InputError(problems)

    def nbytes(self) -> int:
        """Bytes that the stored keys and values take, of layers with a window, too."""
        return sum(_nbytes(layer) for layer in self.layers)

    def kept(self, layer: int) -> Tensor:
        """Which of the tokens seen a layer stores.

        Args:
            layer: its index in the model.

        Returns:
            [batch, key heads, seen], bool.
        """
        stored = self._selective(layer)
        stored = stored.padded() if isinstance(stored, RaggedLayer) else stored
        assert stored.positions is not None
        batch, heads = stored.positions.shape[0], stored.key_heads
        positions = stored.positions.expand(batch, heads, -1)
        real = torch.ones_like(positions, dtype=torch.bool) if stored.real is None else stored.real.expand_as(positions)
        shown = torch.zeros(batch, heads, stored.seen + 1, dtype=torch.bool, device=positions.device)
        # What does not count goes to a column that is cut off.
        return shown.scatter_(2, positions.masked_fill(~real, stored.seen), True)[..., : stored.seen]

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Evict nothing while inside: a prompt read in pieces is evicted from at the end, as if read in one piece."""
        self._held = True
        try:
            yield self
        finally:
            self._held = False
        with torch.no_grad():
            for index in self._places:
                if self._selective(index).seen:
                    self._evict(index)

    def with_keep(self, keep: float | str) -> EvictingCache:
        """The cache as it would be with another budget; keys and values are shared, not copied.

        Only for a masked cache with ``keep=1``, which scores the tokens and hides none.
        """
        if not self.masked or self.method.keep != 1.0:
            raise InputError(
                Problem(
                    "keep",
                    "can be changed in a masked cache of all tokens alone.",
                    "Read the prompt with tw.evict(model, method.replace(keep=1.0), masked=True).",
                )
            )
        other = EvictingCache(self.model, self.method.replace(keep=keep), masked=True)
        for index, layer in enumerate(self.layers):
            other.layers[index] = _shared(layer)
        other._calls = dict(self._calls)
        scores = {index: self._selective(index).tracks["score"] for index in self._places}
        other._keep_best(scores)
        return other

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens, to read them once more: what was evicted because of them stays gone, and what a
        method has noted of them stays.

        Layers with a window can do so where `DynamicSlidingWindowLayer.activate_past_recording` was called before.

        Args:
            tokens: how many of those seen.
        """
        for index, layer in enumerate(self.layers):
            if index not in self._attentions:
                layer.crop(-tokens)
            elif layer.seen:
                layer.notes["counted"] = layer.notes["counted"] - tokens
                layer.take_back(layer.seen - tokens)
                self._evicted_at[index] = min(self._evicted_at.get(index, 0), layer.seen)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any) -> Any:
        if self._ended and layer_idx in self._attentions and self._thinned(self._selective(layer_idx)):
            raise InputError(
                Problem(
                    "past_key_values",
                    "is a cache that was undone: nothing tells the model any more which tokens it stores.",
                    "Begin with a new one, or undo it when you are through.",
                )
            )
        return super().update(key_states, value_states, layer_idx, *args, **options)

    def undo(self) -> None:
        self._ended = True
        super().undo()

    def reset(self) -> None:
        super().reset()
        for index in self._places:
            if isinstance(self.layers[index], RaggedLayer):
                self.layers[index] = SelectiveLayer()
        self._pending.clear()
        self._evicted_at.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Of a pass that broke off, some layers have seen the tokens and others have not.
        return min((self._selective(index).seen for index in self._places), default=0)

    def _selective(self, index: int) -> SelectiveLayer:
        layer = self.layers[index]
        assert isinstance(layer, SelectiveLayer)
        return layer

    def _thinned(self, layer: SelectiveLayer) -> bool:
        return layer.stored != layer.seen or layer.real is not None

    def _repair(self) -> None:
        """After a pass that broke off: forget what only some layers have seen."""
        seen = [self._selective(index).seen for index in self._places]
        if len(set(seen)) > 1:
            self._pending.clear()
            for index in self._places:
                layer = self._selective(index)
                if min(seen) == 0:
                    self.layers[index] = SelectiveLayer()
                elif layer.seen > min(seen):
                    layer.take_back(min(seen))
            for index, layer in enumerate(self.layers):
                if index not in self._attentions:
                    if min(seen) == 0:
                        layer.reset()
                    elif layer.get_seq_length() > min(seen):
                        layer.crop(min(seen) - layer.get_seq_length())

    def _attended(self, index: int, call: AttentionCall) -> None:
        layer = self._selective(index)
        if not layer.gave(call.key):
            return
        method, tokens, whole = self.method, call.query.shape[2], call.mask
        reading = tokens > 1 or layer.seen == tokens
        if reading:
            self._note_padding(layer, call, whole)
        else:
            layer.notes["counted"] = layer.notes["counted"] + tokens
        if isinstance(layer, RaggedLayer):
            call.answer = layer.attend(call, whole)
        elif self._thinned(layer):
            mask = layer.mask_of_last(whole, tokens)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.repeat_interleave(call.query.shape[1] // mask.shape[1], 1)
            call.mask = mask
        if (method.keep == 1.0 and not self.masked) or (not reading and method.interval is None):
            return
        self._calls[index] = (call.scaling, call.softcap, call.query.shape[1])
        with torch.no_grad():
            self._observe(index, layer, call, whole)
            since = layer.seen - self._evicted_at.get(index, 0)
            if not self._held and (reading or (method.interval is not None and since >= method.interval)):
                self._evict(index)
        if index == self._places[-1]:
            self.stats.update(
                tokens_seen=layer.seen,
                tokens_stored=self._mean_stored(),
                bytes=self.nbytes(),
                full_bytes=self._full_bytes(),
            )

    def _note_padding(self, layer: SelectiveLayer, call: AttentionCall, whole: Tensor | None) -> None:
        """Count the padding of each row."""
        batch, device = call.query.shape[0], call.query.device
        if whole is None:
            layer.notes["pads"] = torch.zeros(batch, dtype=torch.long, device=device)
            layer.notes["counted"] = torch.full((batch,), layer.seen, dtype=torch.long, device=device)
            return
        last = whole[:, 0, -1]
        last = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        last = last.expand(batch, -1)
        if not bool(last[:, -1].all()):
            raise InputError(
                Problem("attention_mask", "hides the last token of a row.", "Pad on the left: padding_side = 'left'.")
            )
        layer.notes["pads"] = last.long().argmax(1)
        layer.notes["counted"] = last.sum(1)
        if not bool(last.all()):
            layer.notes["shown"] = last

    def _observe(self, index: int, layer: SelectiveLayer, call: AttentionCall, whole: Tensor | None) -> None:
        method = self.method
        if method.window:
            before = layer.notes.get("queries")
            queries = call.query[:, :, -method.window :]
            if before is not None:
                queries = torch.cat([before, queries], 2)[:, :, -method.window :]
            layer.notes["queries"] = queries.clone() if queries.shape[2] < call.query.shape[2] else queries
        even = layer
        if isinstance(layer, RaggedLayer):
            even, call = layer.padded(), layer.padded_call(call, whole)
        if "received" in method.reads:
            tokens = call.query.shape[2]
            shown = layer.notes.get("shown")
            valid = None if shown is None else shown[:, -tokens:]
            count = tokens if valid is None else valid.sum(1).clamp_min(1)[:, None, None]
            found = (call.columns(valid) * count).unflatten(1, (call.key.shape[1], -1)).sum(2)
            before = even.tracks.get("received")
            even.tracks["received"] = found if before is None else before + found
        method.observe(self._tokens(index, even), call)
        if isinstance(layer, RaggedLayer):
            layer.set_tracks(even.tracks)

    def _tokens(self, index: int, layer: SelectiveLayer) -> StoredTokens:
        scaling, softcap, heads = self._calls[index]
        layer = layer.padded() if isinstance(layer, RaggedLayer) else layer
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.positions is not None
        real = layer.real
        shown = layer.notes.get("shown")
        if shown is not None:
            shown = torch.nn.functional.pad(shown, (0, layer.seen - shown.shape[1]), value=True)
            shown = shown.unsqueeze(1).expand(-1, layer.positions.shape[1], -1).gather(2, layer.positions)
            real = shown if real is None else real & shown
        return StoredTokens(
            layer.keys,
            layer.values,
            layer.positions,
            real,
            layer.notes["pads"],
            layer.seen,
            self._places.index(index),
            len(self._places),
            scaling,
            softcap,
            heads,
            self._attentions[index],
            layer.tracks,
            layer.notes,
        )

    def _evict(self, index: int) -> None:
        """Evict from one layer, or from all once the last has been scored, where they share a budget."""
        layer = self._selective(index)
        self._evicted_at[index] = layer.seen
        counts = self._counts(layer)
        if not self.masked and bool((counts >= layer.notes["counted"]).all()):
            return
        self._pending[index] = self._scores(index, layer)
        if self.method.allocate != "layers_and_heads" or index == self._places[-1]:
            scores, self._pending = self._pending, {}
            self._keep_best(scores)

    def _scores(self, index: int, layer: SelectiveLayer) -> Tensor:
        """The method's scores, with what is protected above and what does not count below all others."""
        method, even = self.method, layer
        if self.masked and layer.real is not None:
            # A method sees what it would if the hidden ones were gone.
            even = _without_hidden(layer)
        tokens = self._tokens(index, even)
        scores = method.score(tokens).float()
        if bool(scores.isnan().any()):
            raise FloatingPointError(f"{type(method).__name__} gives NaN as a score in layer {index}")
        heads = max(scores.shape[1], tokens.positions.shape[1])
        scores = scores.expand(-1, heads, -1)
        safe = protected(tokens.positions, tokens.pads, tokens.seen, method.sink, max(method.recent, method.window))
        scores = scores.masked_fill(safe, float("inf"))
        if tokens.real is not None:
            scores = scores.masked_fill(~tokens.real, float("-inf"))
        if even is not layer:
            assert tokens.real is not None
            places = even.tracks["place"].masked_fill(~tokens.real, layer.stored)
            found = scores.new_full((*places.shape[:2], layer.stored + 1), float("-inf"))
            scores = found.scatter_(2, places, scores)[..., : layer.stored]
        if self.masked:
            layer.tracks["score"] = scores
        return scores

    def _keep_best(self, scores: dict[int, Tensor]) -> None:
        """Let the layers keep what the budget allows."""
        method = self.method
        for index in scores:
            self._selective(index).notes.pop("shown", None)
        if method.allocate == "layers_and_heads":
            layers = [self._selective(index) for index in scores]
            counts = self._counts(layers[0])
            # Where all heads scored alike each still stores its own.
            whole = [
                score.expand(-1, layer.key_heads, -1) for score, layer in zip(scores.values(), layers, strict=True)
            ]
            totals = counts * sum(score.shape[1] for score in whole)
            floors = (counts * method.floor).long().clamp_min(1)
            for index, shown in zip(scores, best_of_all(whole, totals, floors), strict=True):
                self._keep_ragged(index, shown)
            return
        for index, score in scores.items():
            layer = self._selective(index)
            counts = self._counts(layer)
            if method.allocate == "heads":
                score = score.expand(-1, layer.key_heads, -1)
                floors = (counts * method.floor).long().clamp_min(1)
                self._keep_ragged(index, best_of_all([score], counts * layer.key_heads, floors)[0])
                continue
            if method.allocate == "pyramid":
                counts = self._pyramid(counts, layer.notes["counted"], self._places.index(index))
            counts = counts.minimum((score > float("-inf")).sum(2).amin(1))
            places, real = best_of_each_head(score, counts)
            if self.masked:
                shown = torch.zeros_like(score, dtype=torch.bool)
                real = torch.ones_like(places, dtype=torch.bool) if real is None else real.expand_as(places)
                shown.scatter_(2, places, real)
                # A place that fills up may be the same as one that counts.
                layer.hide(shown | torch.zeros_like(shown).scatter_add(2, places, real))
            elif places.shape[2] < layer.stored or real is not None:
                self._even(index).keep(places, real)
            self._close_up(self._selective(index))

    def _pyramid(self, counts: Tensor, counted: Tensor, place: int) -> Tensor:
        rows = []
        for count, available in zip(counts.tolist(), counted.tolist(), strict=True):
            method = self.method
            rows.append(pyramid_counts(count, available, len(self._places), method.window, method.beta)[place])
        return torch.tensor(rows, device=counts.device)

    def _even(self, index: int) -> SelectiveLayer:
        """The layer, with as many places for each head."""
        layer = self._selective(index)
        if isinstance(layer, RaggedLayer):
            layer = layer.padded()
            self.layers[index] = layer
        return layer

    def _keep_ragged(self, index: int, shown: Tensor) -> None:
        layer = self._even(index)
        if self.masked:
            layer.hide(shown)
            self._close_up(layer)
            return
        self._close_up(layer, shown)
        self.layers[index] = RaggedLayer.of(layer, shown)

    def _close_up(self, layer: SelectiveLayer, shown: Tensor | None = None) -> None:
        """Where positions are compact, turn the keys to where they stand among those that are left.

        Keys move towards the next token rather than the next token towards them: a rotary embedding knows distances
        alone, and the model goes on counting as it does.
        """
        if self._rotary is None:
            return
        assert layer.keys is not None
        assert layer.positions is not None
        real = layer.real if shown is None else shown
        here = torch.ones_like(layer.positions, dtype=torch.bool) if real is None else real
        behind = here.long().flip(2).cumsum(2).flip(2)
        shift = (layer.seen - behind) - layer.positions
        before = layer.tracks.get("shift")
        turn = shift if before is None else shift - before
        layer.tracks["shift"] = shift
        layer.keys = self._rotary.turn(layer.keys, turn.masked_fill(~here, 0))

    def _counts(self, layer: SelectiveLayer) -> Tensor:
        """Tokens of each head of a layer when the budget is shared evenly, [batch]."""
        method, counted = self.method, layer.notes["counted"]
        keep = method.keep
        if isinstance(keep, str) and keep.endswith("bytes"):
            count = self._affordable(int(keep.split()[0]), layer)
            return counted.clamp_max(count)
        rows = [max(kept_count(keep, seen), min(method.protects, seen)) for seen in counted.tolist()]
        return torch.tensor(rows, device=counted.device)

    def _affordable(self, limit: int, layer: SelectiveLayer) -> int:
        """Tokens of each head that fit in so many bytes, beside the layers that see a window."""
        token = layer.token_nbytes
        fixed = 0
        for index, other in enumerate(self.layers):
            if index not in self._attentions:
                window = getattr(other, "sliding_window", None)
                tokens = layer.seen if window is None else min(layer.seen, window - 1)
                fixed += tokens * token
        count = (limit - fixed) // (token * len(self._places))
        if count < max(self.method.protects, 1):
            raise InputError(
                Problem(
                    f"{type(self.method).__name__}.keep",
                    f"{limit} bytes hold {max(count, 0)} tokens of this batch, and {max(self.method.protects, 1)} must "
                    f"stay ({token * len(self._places)} bytes each"
                    + (f", beside {fixed} bytes of layers with a window)." if fixed else ")."),
                    "Keep more, or read fewer rows at once.",
                )
            )
        return count

    def _mean_stored(self) -> float:
        sizes = [self._selective(index).mean_stored() for index in self._places if self._selective(index).seen]
        return sum(sizes) / max(len(sizes), 1)

    def _full_bytes(self) -> int:
        full = 0
        for index, layer in enumerate(self.layers):
            if index not in self._attentions:
                full += _nbytes(layer)
            elif layer.seen:
                full += layer.token_nbytes * layer.seen
        return full


def _listener(cache: weakref.ref[EvictingCache], index: int) -> Any:
    def hear(call: AttentionCall) -> None:
        found = cache()
        if found is not None:
            found._attended(index, call)

    return hear


def _repairer(cache: weakref.ref[EvictingCache]) -> Any:
    def repair(module: nn.Module, args: Any) -> None:
        found = cache()
        if found is not None:
            found._repair()

    return repair


def _layers(model: nn.Module) -> list[Any]:
    """Layers as transformers makes them for this model, those that store all tokens replaced."""
    config: Any = model.config
    stock = DynamicCache(config=config).layers
    return [SelectiveLayer() if type(layer) is DynamicLayer else layer for layer in stock]


def _nbytes(layer: Any) -> int:
    if isinstance(layer, SelectiveLayer):
        return layer.nbytes()
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(values.nbytes for values in held if isinstance(values, Tensor))


def _without_hidden(layer: SelectiveLayer) -> SelectiveLayer:
    """The layer without the tokens that do not count; the track ``place`` says where the others stood."""
    assert layer.real is not None
    other = _shared(layer)
    shown = layer.real.expand(-1, layer.key_heads, -1)
    other.tracks["place"] = torch.arange(layer.stored, device=shown.device).expand_as(shown)
    return RaggedLayer.of(other, shown).padded()


def _shared(layer: Any) -> Any:
    """The layer once more, with the same tensors."""
    other = copy.copy(layer)
    if isinstance(layer, SelectiveLayer):
        other.tracks, other.notes = dict(layer.tracks), dict(layer.notes)
    return other
