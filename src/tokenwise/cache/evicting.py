"""The cache that evicts: a transformers Cache whose layers store what a method keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from tokenwise.cache.attaching import ListeningCache
from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.cache.padding import (
    at_places,
    given_places,
    in_front,
    note_padding,
    note_queries,
    refuse_padded_ends,
    take_padding,
)
from tokenwise.cache.refusals import (
    expected_token_nbytes,
    narrows,
    problems_of,
    protection_problems,
    repeats,
    rotaries_for,
)
from tokenwise.cache.second_reading import SecondReading, forget_last
from tokenwise.errors import InputError, Problem
from tokenwise.models.cache_memory import layer_nbytes
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.ragged_kv import RaggedLayer
from tokenwise.models.selective_kv import SelectiveLayer, take_channels, take_heads
from tokenwise.models.tap import AttentionCall
from tokenwise.models.tiered_kv import TieredLayer
from tokenwise.policies.budget import kept_count
from tokenwise.policies.eviction import (
    best_of_all,
    best_of_each_head,
    best_of_shared,
    protected,
    pyramid_counts,
    tier_counts,
    worst_of_each_head,
)
from tokenwise.signals.packing import packed_nbytes


class EvictingCache(ListeningCache):
    """A cache that stores the tokens a method keeps, and a handle that ends it.

    Layers that see a window of the tokens are left as they are: they store no more than their window anyway.

    Attributes:
        model: the model whose attention it listens to.
        method: the method.
        masked: whether all tokens stay stored and the others are hidden.
        protect: tokens of the prompt that stay whatever their score, or None.
        second: how the prompt is read a second time, or None where the method does not need it.
        stats: as of the last time that tokens were, or could have been, evicted: ``tokens_seen`` (columns, padding
            included), ``tokens_stored`` (mean over rows, layers and heads), ``bytes``, and ``full_bytes``, what a cache
            of all tokens would take.
    """

    works_in: ClassVar[tuple[str, ...]] = ("_computed", "_evict_from_all")

    def __init__(self, model: nn.Module, method: CachePolicy, masked: bool = False, protect: Tensor | None = None):
        attentions = cached_attentions(model)
        super().__init__(_layers(model))
        self.model = model
        self.method = method
        self.masked = masked
        self.protect = protect
        self._places = [
            index for index, layer in enumerate(self.layers) if type(layer) is SelectiveLayer and index in attentions
        ]
        self._attentions: dict[int, Any] = {index: attentions[index] for index in self._places}
        self._calls: dict[int, tuple[float, float | None, int, Tensor | None]] = {}
        self._pending: dict[int, tuple[Tensor, list[int]]] = {}
        self._pads: dict[int, tuple[Tensor, list[int]]] = {}
        self._evicted_at: dict[int, int] = {}
        self._observed_at: dict[int, int] = {}
        self._earlier: dict[str, Tensor] = {}
        self._held_until: float | None = None
        self._narrows = narrows(method)
        self._idle = not masked and method.keep == 1.0 and method.dense_at_full
        self._key_width = 0
        problems = problems_of(model, method, self.layers, self._attentions, masked)
        problems += protection_problems(protect)
        if problems:
            raise InputError(problems)
        self._rotaries = rotaries_for(model, method, self._attentions)
        decoder = self.attach(model, self._attentions)
        self.second = SecondReading(self, decoder) if repeats(method, masked) else None

    @property
    def places(self) -> tuple[int, ...]:
        """The layers whose cache is evicted from, by their index in the model."""
        return tuple(self._places)

    def nbytes(self) -> int:
        """Bytes that the stored keys and values take, of layers with a window, too."""
        return sum(
            layer.nbytes() if isinstance(layer, SelectiveLayer) else layer_nbytes(layer) for layer in self.layers
        )

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
    def held(self, until: int | None = None) -> Iterator[Self]:
        """Evict nothing while a prompt is read in pieces of whatever length, and then as if it had been read in one.

        Args:
            until: columns of the whole prompt (``prompt.shape[1]``), earlier turns included: with the piece that
                reaches it the prompt ends, so that the block may stand around `generate` with ``prefill_chunk_size``.
                None, or where fewer are read: it ends with the block.

        Raises:
            InputError: when the cache has seen so many tokens already.
        """
        if until is not None and until <= self.get_seq_length():
            message = f"{until} is no more than the {self.get_seq_length()} tokens that the cache has seen."
            raise InputError(Problem("until", message, "Count the tokens of earlier turns, too."))
        self._held_until = math.inf if until is None else until
        try:
            yield self
            if self._heard and self.get_seq_length() < self._held_until:
                self._release()
        finally:
            self._held_until = None

    def _holds(self, seen: int) -> bool:
        """Whether a prompt of which so many tokens have been seen is still being read in pieces."""
        return self._held_until is not None and seen < self._held_until

    def _evict_from_all(self) -> None:
        place = self._places[0]
        first = self._selective(place)
        # Of a masked cache with a full budget scores are wanted.
        dense = self.method.dense_at_full and not (self.masked and self.method.keep == 1.0)
        fits = _fits(self._counts(place, first), self._counted(place, first))
        if dense and all(fits):
            return
        if self.second is not None:
            # As alone: a row that fits waits until it no longer does.
            self.second.repeat(self, torch.tensor([not (dense and fit) for fit in fits]))
        for index in self._places:
            self._evict(index)
        self._note_sizes()

    def has_read(self, tokens: int) -> None:
        """After a pass whose tokens are to be repeated: do so, and evict, where it was not a generated one.

        Args:
            tokens: how many of them.
        """
        seen = self.get_seq_length()
        reading = tokens > 1 or seen == 1 or self._holds(seen - tokens)
        if reading and not self._holds(seen):
            self._release()

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
        other = EvictingCache(self.model, self.method.replace(keep=keep), masked=True, protect=self.protect)
        for index, layer in enumerate(self.layers):
            other.layers[index] = _shared(layer)
        other._calls, other._observed_at = dict(self._calls), dict(self._observed_at)
        # What is protected, and some scores, depend on the budget.
        for index in self._places:
            other._evict(index)
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
                forget_last(layer.notes, tokens)
                layer.take_back(layer.seen - tokens)
                self._evicted_at[index] = min(self._evicted_at.get(index, 0), layer.seen)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any) -> Any:
        if not self._heard and layer_idx in self._attentions and self._changed(self._selective(layer_idx)):
            raise InputError(
                Problem(
                    "past_key_values",
                    "is a cache that was undone: nothing tells the model any more which tokens it stores.",
                    "Begin with a new one, or undo it when you are through.",
                )
            )
        if layer_idx in self._attentions:
            key_states = self._narrowed(self._selective(layer_idx), key_states)
        return super().update(key_states, value_states, layer_idx, *args, **options)

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back without a trace, as they can where none is ever evicted."""
        return self._idle and super().is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        if self._idle and tokens_to_remove < 0:
            self.take_back(-tokens_to_remove)
        else:
            super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        if self._idle:
            return super().activate_past_recording()
        raise InputError(
            Problem(
                "past_key_values",
                "cannot take back tokens for which others have left, as assisted decoding does.",
                "Generate without an assistant.",
            )
        )

    def reset(self) -> None:
        super().reset()
        for index in self._places:
            if isinstance(self.layers[index], RaggedLayer | TieredLayer):
                self.layers[index] = SelectiveLayer()
        self._pending.clear()
        self._evicted_at.clear()
        self._observed_at.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Of a pass that broke off, some layers have seen the tokens and others have not.
        return min((self._selective(index).seen for index in self._places), default=0)

    def _selective(self, index: int) -> SelectiveLayer:
        layer = self.layers[index]
        assert isinstance(layer, SelectiveLayer)
        return layer

    def _thinned(self, layer: SelectiveLayer) -> bool:
        return layer.stored != layer.seen or layer.real is not None or isinstance(layer, TieredLayer)

    @torch.no_grad()
    def _release(self) -> None:
        if self.get_seq_length():
            shown = self._selective(self._places[0]).notes.get("shown")
            if shown is not None:
                refuse_padded_ends(shown)
            self._evict_from_all()

    def _changed(self, layer: SelectiveLayer) -> bool:
        return self._thinned(layer) or "channels" in layer.notes

    def _narrowed(self, layer: SelectiveLayer, states: Tensor) -> Tensor:
        """Queries or keys with the channels that the layer's keys have."""
        channels = layer.notes.get("channels")
        if channels is None:
            return states
        if self.masked:
            shown = torch.zeros(*channels.shape[:2], 1, states.shape[3], dtype=torch.bool, device=states.device)
            shown.scatter_(3, channels.unsqueeze(2), True)
            return states * shown.repeat_interleave(states.shape[1] // channels.shape[1], 1)
        return take_channels(states, channels)

    def _narrow(self, index: int, layer: SelectiveLayer) -> None:
        """Drop the channels of the keys that the method does not keep."""
        channels = self.method.key_channels(self._tokens(index, layer))
        if channels is not None:
            assert layer.keys is not None
            layer.notes["channels"], self._key_width = channels, layer.keys.shape[3]
            layer.replace_keys(self._narrowed(layer, layer.keys))
            if "queries" in layer.notes:
                layer.notes["queries"] = self._narrowed(layer, layer.notes["queries"])

    def begin(self) -> None:
        """After a pass that broke off: forget what only some layers have seen."""
        seen = [self._selective(index).seen for index in self._places]
        if len(set(seen)) > 1:
            self._pending.clear()
            for index in self._places:
                layer = self._selective(index)
                if min(seen) == 0:
                    self.layers[index] = SelectiveLayer()
                elif layer.seen > min(seen):
                    # Of each row as much is padding in every layer.
                    behind = self._selective(self._places[seen.index(min(seen))])
                    take_padding(layer.notes, behind.notes)
                    layer.take_back(min(seen))
            for index, layer in enumerate(self.layers):
                if index not in self._attentions:
                    if min(seen) == 0:
                        layer.reset()
                    elif layer.get_seq_length() > min(seen):
                        layer.crop(min(seen) - layer.get_seq_length())

    def admit(self, rows: int, tokens: int) -> None:
        keep = self.method.keep
        if isinstance(keep, str) and keep.endswith("bytes") and not self.get_seq_length():
            token = rows * expected_token_nbytes(self.model, self._attentions[self._places[0]])
            self._fitting(int(keep.split()[0]), token, tokens, max(self.method.protects, 1))

    def attended(self, index: int, call: AttentionCall) -> None:
        layer = self._selective(index)
        method, tokens, whole = self.method, call.query.shape[2], call.mask
        again = self.second if self.second is not None and self.second.under_way else None
        reading = tokens > 1 or layer.seen == tokens or again is not None or self._holds(layer.seen - tokens)
        if reading and again is None:
            note_padding(layer.notes, call, layer.seen, ends=not self._holds(layer.seen))
            self._note_given(index, layer)
        call.query = self._narrowed(layer, call.query)
        if isinstance(layer, RaggedLayer):
            call.answer = layer.attend(call, whole)
        elif self._thinned(layer):
            mask = layer.mask_of_last(whole, tokens)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.repeat_interleave(call.query.shape[1] // mask.shape[1], 1)
            call.mask = mask
        if not self._idle and (reading or method.interval is not None):
            if again is not None:
                with again.repeating(layer, call.query):
                    self._look_on(index, layer, call, whole)
            else:
                sinks = None if call.sinks is None else call.sinks.detach()
                self._calls[index] = (call.scaling, call.softcap, call.query.shape[1], sinks)
                alone = call.answer is None and call.key_bias is None and not torch.is_grad_enabled()
                if alone and not reading and method.reads & {"received", "last"}:
                    call.compute()
                call.after.append(lambda: self._computed(index, call, whole, reading))
        elif self._idle and reading and index == self._places[-1]:
            self._note_sizes()
        if isinstance(layer, TieredLayer):
            call.after.append(layer.release)

    @torch.no_grad()
    def _computed(self, index: int, call: AttentionCall, whole: Tensor | None, reading: bool) -> None:
        """After the attention of a layer: what its tokens are scored by, and what becomes of them."""
        layer, method = self._selective(index), self.method
        self._observe(index, layer, call, whole)
        since = layer.seen - self._evicted_at.get(index, 0)
        due = reading or (method.interval is not None and since >= method.interval)
        if due and not self._holds(layer.seen) and self.second is None:
            self._evict(index)
        if index == self._places[-1]:
            self._note_sizes()

    def _note_sizes(self) -> None:
        self.stats.update(
            tokens_seen=self.get_seq_length(),
            tokens_stored=self._mean_stored(),
            bytes=self.nbytes(),
            full_bytes=self.full_nbytes(),
        )

    def _note_given(self, index: int, layer: SelectiveLayer) -> None:
        """Note which tokens of each row the user protects, once, when the first of them have been stored."""
        if self.protect is None or "given" in layer.notes:
            return
        pads = layer.notes["pads"]
        given = self.protect.to(pads.device).reshape(-1, self.protect.shape[-1])
        if not len(given) or len(pads) % len(given):
            message = f"has {len(given)} rows, and the batch {len(pads)}."
            raise InputError(Problem("protect", message, "Give one row, or one for each."))
        # Beams and several answers of a row stand beside each other.
        layer.notes["given"] = given = given.repeat_interleave(len(pads) // len(given), 0)
        keep, most = self.method.keep, max(self._protected_counts(index, layer, max(layer.seen, given.shape[1])))
        if isinstance(keep, str) and keep.endswith("tokens") and int(keep.split()[0]) < most:
            message = f"{keep!r} is less than the {most} tokens of a row that stay whatever their score."
            raise InputError(Problem(f"{type(self.method).__name__}.keep", message, "Keep more, or protect less."))

    def _counted(self, index: int, layer: SelectiveLayer) -> list[int]:
        """Of each row how many tokens seen count: padding does not."""
        pads = layer.notes["pads"]
        known = self._pads.get(index)
        if known is None or known[0] is not pads:
            # Asked for when it changes, not at each token: on a GPU to ask is to wait.
            known = self._pads[index] = pads, pads.tolist()
        return [layer.seen - some for some in known[1]]

    def _protected_counts(self, index: int, layer: SelectiveLayer, seen: int) -> list[int]:
        """Of each row how many of the tokens seen stay whatever their score and the budget."""
        method, pads, given = self.method, layer.notes["pads"], given_places(layer.notes, seen)
        if given is None:
            return [min(count, method.protects) for count in self._counted(index, layer)]
        places = torch.arange(seen, device=pads.device).expand(len(pads), 1, -1)
        recent = [max(method.recent, method.window)] * len(pads)
        counts: list[int] = protected(places, pads, seen, method.sink, recent, given).sum((1, 2)).tolist()
        return counts

    def _observe(self, index: int, layer: SelectiveLayer, call: AttentionCall, whole: Tensor | None) -> None:
        method = self.method
        if method.window:
            # Queries of generated tokens may not have been read: what stood before them is no longer among the last.
            follows = self._observed_at.get(index) == layer.seen - call.query.shape[2]
            note_queries(layer.notes, call.query, method.window, layer.seen, follows)
        self._observed_at[index] = layer.seen
        self._look_on(index, layer, call, whole)

    def _look_on(self, index: int, layer: SelectiveLayer, call: AttentionCall, whole: Tensor | None) -> None:
        """Let the method look at the attention of a layer."""
        even = layer
        if isinstance(layer, RaggedLayer):
            even, call = layer.padded(), layer.padded_call(call, whole)
        self.method.observe(self._tokens(index, even), call)
        if isinstance(layer, RaggedLayer):
            layer.set_tracks(even.tracks)

    def _tokens(self, index: int, layer: SelectiveLayer, counts: Sequence[int] = ()) -> StoredTokens:
        scaling, softcap, heads, sinks = self._calls[index]
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
            in_front(layer.notes, layer.positions, layer.seen),
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
            rotary=self._rotaries.get(index),
            sinks=sinks,
            earlier=self._earlier,
            given=given_places(layer.notes, layer.seen),
            counts=counts,
        )

    def _evict(self, index: int) -> None:
        """Evict from one layer, or from all once the last has been scored, where they share a budget."""
        layer = self._selective(index)
        self._evicted_at[index] = layer.seen
        counts = self._counts(index, layer)
        if index == self._places[0]:
            self._earlier = {}
        if self.method.dense_at_full and not self.masked and all(_fits(counts, self._counted(index, layer))):
            return
        if self.method.allocate == "pyramid":
            counts = self._pyramid(counts, index, layer)
        if self._stores_no_more(layer, counts):
            return
        one = self._has_one_too_many(layer, counts)
        if not layer.rising and not one:
            # Of equal scores the first stay.
            layer.sort()
        if "places" in layer.notes and "shown" in layer.notes:
            # Padding between tokens goes to the front: what stands side by side may be scored together.
            layer = self._even(index)
            assert layer.positions is not None
            places = in_front(layer.notes, layer.positions, layer.seen)
            places = places if layer.real is None else places.masked_fill(~layer.real, -1)
            layer.keep(places.argsort(dim=2, stable=True))
            layer.rising = False
        scores = self._scores(index, layer, counts)
        if not (one and self._drops_one(index, layer, scores)):
            self._choose(index, layer, scores, counts)
        if "earlier" in self.method.reads:
            self._earlier["kept"] = at_places(layer.notes, self.kept(index).any(1))
        if index == self._places[-1]:
            self._earlier = {}

    def _choose(self, index: int, layer: SelectiveLayer, scores: Tensor, counts: list[int]) -> None:
        """Let a layer keep what the budget allows, or all layers once the last has been scored."""
        if bool(scores.isnan().any()):
            raise FloatingPointError(f"{type(self.method).__name__} gives NaN as a score in layer {index}")
        if not layer.rising:
            scores = take_heads(scores, layer.sort())
        self._pending[index] = scores, counts
        if self._narrows and "channels" not in layer.notes:
            self._narrow(index, layer)
        if self.method.allocate != "layers_and_heads" or index == self._places[-1]:
            pending, self._pending = self._pending, {}
            self._keep_best(pending)

    def _stores_no_more(self, layer: SelectiveLayer, counts: list[int]) -> bool:
        """Whether every head may keep all that it stores: then nothing need be scored."""
        method = self.method
        alone = method.allocate in ("evenly", "pyramid") and "earlier" not in method.reads
        return alone and self._is_plain(layer) and min(counts) >= layer.stored

    def _has_one_too_many(self, layer: SelectiveLayer, counts: list[int]) -> bool:
        """Whether one token of each head has to go, as after each generated one, and order does not matter."""
        method = self.method
        if method.ordered or method.bits is not None or method.allocate not in ("evenly", "pyramid"):
            return False
        assert layer.keys is not None
        # What a gradient is to flow through is not written over.
        return set(counts) == {layer.stored - 1} and self._is_plain(layer) and not layer.keys.requires_grad

    def _is_plain(self, layer: SelectiveLayer) -> bool:
        """Whether all that a layer stores counts, and as much in every head."""
        whole = layer.real is None and "shown" not in layer.notes and type(layer) is SelectiveLayer
        return whole and not self.masked and not self._narrows

    def _scores(self, index: int, layer: SelectiveLayer, counts: list[int]) -> Tensor:
        """The method's scores, with what is protected above and what does not count below all others."""
        # Scores are of tokens in the order of their positions.
        layer = layer.whole() if isinstance(layer, TieredLayer) else layer
        method, even = self.method, layer
        if self.masked and layer.real is not None:
            # A method sees what it would if the hidden ones were gone.
            even = _without_hidden(layer)
        tokens = self._tokens(index, even, counts)
        scores = method.score(tokens).float()
        heads = max(scores.shape[1], tokens.positions.shape[1])
        scores = scores.expand(-1, heads, -1)
        scores = scores.masked_fill(method.protected(tokens), float("inf"))
        if tokens.real is not None:
            scores = scores.masked_fill(~tokens.real, float("-inf"))
        if even is not layer:
            assert tokens.real is not None
            places = even.tracks["place"].masked_fill(~tokens.real, layer.stored)
            found = scores.new_full((*places.shape[:2], layer.stored + 1), float("-inf"))
            scores = found.scatter_(2, places, scores)[..., : layer.stored]
        return scores

    def _keep_best(self, pending: dict[int, tuple[Tensor, list[int]]]) -> None:
        """Let the layers keep what the budget allows, by the scores and the counts of each."""
        method = self.method
        for index in pending:
            self._selective(index).notes.pop("shown", None)
        if method.allocate == "layers_and_heads":
            scores, budgets = zip(*pending.values(), strict=True)
            counts = torch.tensor(budgets[0], device=scores[0].device)
            # Where all heads scored alike each still stores its own.
            whole = [
                score.expand(-1, self._selective(index).key_heads, -1)
                for index, score in zip(pending, scores, strict=True)
            ]
            totals = counts * sum(score.shape[1] for score in whole)
            floors = (counts * method.floor).long().clamp_min(1)
            for index, shown in zip(pending, best_of_all(whole, totals, floors), strict=True):
                self._keep_ragged(index, shown)
            return
        for index, (score, budget) in pending.items():
            layer = self._selective(index)
            counts = torch.tensor(budget, device=score.device)
            if method.allocate == "heads":
                score = score.expand(-1, layer.key_heads, -1)
                self._keep_ragged(index, best_of_shared(score, counts, method.floor))
                continue
            if method.bits is not None:
                self._keep_tiers(index, score, budget)
                continue
            counts = counts.minimum((score > float("-inf")).sum(2).amin(1))
            if bool((counts == layer.stored).all()):
                continue
            places, real = best_of_each_head(score, counts)
            if self.masked:
                shown = torch.zeros_like(score, dtype=torch.bool)
                real = torch.ones_like(places, dtype=torch.bool) if real is None else real.expand_as(places)
                shown.scatter_(2, places, real)
                # A place that fills up may be the same as one that counts.
                layer.hide(shown | torch.zeros_like(shown).scatter_add(2, places, real))
            elif places.shape[2] < layer.stored or real is not None:
                self._even(index).keep(places, real)
            self._close_up(index, self._selective(index))

    def _drops_one(self, index: int, layer: SelectiveLayer, scores: Tensor) -> bool:
        """Let the worst token of each head go, unless scores are no numbers or of no token."""
        assert layer.keys is not None
        assert layer.positions is not None
        gone = worst_of_each_head(scores, layer.positions)
        if gone is None:
            return False
        if self.method.positions == "compact":
            # Those before it come one closer.
            turn = (layer.positions < take_heads(layer.positions, gone)).long()
            before = layer.tracks.get("shift")
            layer.tracks["shift"] = turn if before is None else before + turn
            self._rotaries[index].turn(layer.keys, turn, in_place=True)
        layer.drop(gone)
        return True

    def _keep_tiers(self, index: int, score: Tensor, limits: list[int]) -> None:
        """Let a layer keep exact tokens, and others in few bits, in the bytes of so many exact ones of each row."""
        method, layer = self.method, self._even(index)
        assert method.bits is not None
        assert layer.keys is not None
        assert layer.values is not None
        widths = [values.shape[3] for values in (layer.keys, layer.values)]
        sizes = sum(widths) * layer.keys.element_size(), sum(packed_nbytes(width, method.bits) for width in widths)
        available = (score > float("-inf")).sum(2).amin(1).tolist()
        if isinstance(method.keep, str) and method.keep.endswith("bytes"):
            # The memory is that of the batch, where each row takes as much as the longest.
            limits, available = [max(limits)] * len(limits), [max(available)] * len(limits)
        protects = self._protected_counts(index, layer, layer.seen)
        rows = [
            tier_counts(limit, there, method.exact, stay, *sizes)
            for limit, there, stay in zip(limits, available, protects, strict=True)
        ]
        exact, stored = torch.tensor(rows, device=score.device).unbind(1)
        places, real = best_of_each_head(score, stored.minimum((score > float("-inf")).sum(2).amin(1)))
        found = take_heads(score, places)
        if real is not None:
            found = found.masked_fill(~real, float("-inf"))
        rank = found.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        layer.keep(places, real)
        self.layers[index] = TieredLayer.of(layer, rank < exact.view(-1, 1, 1), method.bits)

    def _pyramid(self, counts: list[int], index: int, layer: SelectiveLayer) -> list[int]:
        layers, place = len(self._places), self._places.index(index)
        sizes = counts, self._counted(index, layer), self._protected_counts(index, layer, layer.seen)
        return [
            pyramid_counts(count, available, layers, protects, self.method.beta)[place]
            for count, available, protects in zip(*sizes, strict=True)
        ]

    def _even(self, index: int) -> SelectiveLayer:
        """The layer, with as many places for each head."""
        layer = self._selective(index)
        if isinstance(layer, RaggedLayer):
            layer = layer.padded()
            self.layers[index] = layer
        elif isinstance(layer, TieredLayer):
            layer = layer.whole()
            self.layers[index] = layer
        return layer

    def _keep_ragged(self, index: int, shown: Tensor) -> None:
        layer = self._even(index)
        if self.masked:
            layer.hide(shown)
            self._close_up(index, layer)
            return
        self._close_up(index, layer, shown)
        self.layers[index] = RaggedLayer.of(layer, shown)

    def _close_up(self, index: int, layer: SelectiveLayer, shown: Tensor | None = None) -> None:
        """Where positions are compact, turn the keys to where they stand among those that are left.

        Keys move towards the next token rather than the next token towards them: a rotary embedding knows distances
        alone, and the model goes on counting as it does.
        """
        if self.method.positions != "compact":
            return
        assert layer.keys is not None
        assert layer.positions is not None
        real, places = layer.real if shown is None else shown, in_front(layer.notes, layer.positions, layer.seen)
        standing = places if real is None else places.masked_fill(~real, -1)
        behind = standing.argsort(dim=2, descending=True).argsort(dim=2) + 1
        shift = (layer.seen - behind) - places
        before = layer.tracks.get("shift")
        turn = shift if before is None else shift - before
        layer.tracks["shift"] = shift
        turn = turn if real is None else turn.masked_fill(~real, 0)
        layer.replace_keys(self._rotaries[index].turn(layer.keys, turn))

    def _counts(self, index: int, layer: SelectiveLayer) -> list[int]:
        """Tokens of each head of a layer when the budget is shared evenly, of each row."""
        method, counted = self.method, self._counted(index, layer)
        keep = method.keep
        if isinstance(keep, str) and keep.endswith("bytes"):
            most = min(self._affordable(int(keep.split()[0]), index, layer), layer.seen)
            return [min(count, most) for count in counted]
        counts = [max(kept_count(keep, count), min(method.protects, count)) for count in counted]
        if "given" in layer.notes:
            stay = self._protected_counts(index, layer, layer.seen)
            counts = [max(count, least) for count, least in zip(counts, stay, strict=True)]
        return counts

    def _affordable(self, limit: int, index: int, layer: SelectiveLayer) -> int:
        """Tokens of each head that fit in so many bytes, beside the layers that see a window."""
        least = max(*self._protected_counts(index, layer, layer.seen), self.method.protects, 1)
        return self._fitting(limit, self._token_nbytes(layer), layer.seen, least)

    def _fitting(self, limit: int, token: int, seen: int, least: int) -> int:
        """Tokens that fit when `seen` have been read, a token of all rows takes so many bytes in each layer, and so
        many tokens must stay at least."""
        fixed = 0
        for index, other in enumerate(self.layers):
            if index not in self._attentions:
                window = getattr(other, "sliding_window", None)
                fixed += token * (seen if window is None else min(seen, window - 1))
        count = (limit - fixed) // (token * len(self._places))
        if count < least:
            raise InputError(
                Problem(
                    f"{type(self.method).__name__}.keep",
                    f"{limit} bytes hold {max(count, 0)} tokens of this batch, and {least} must stay "
                    f"({token * len(self._places)} bytes each"
                    + (f", beside {fixed} bytes of layers with a window)." if fixed else ")."),
                    "Keep more, or read fewer rows at once.",
                )
            )
        return count

    def _mean_stored(self) -> float:
        sizes = [self._selective(index).mean_stored() for index in self._places if self._selective(index).seen]
        return sum(sizes) / max(len(sizes), 1)

    def full_nbytes(self) -> int:
        """Bytes that a cache of all tokens seen would take."""
        full = 0
        for index, layer in enumerate(self.layers):
            if index not in self._attentions:
                full += layer_nbytes(layer)
            elif layer.seen:
                full += self._token_nbytes(layer) * layer.seen
        return full

    def _token_nbytes(self, layer: SelectiveLayer) -> int:
        """Bytes that one token of every row takes with all of its channels."""
        channels = layer.notes.get("channels")
        if channels is None or self.masked:
            return layer.token_nbytes
        dropped = self._key_width - channels.shape[2]
        return layer.token_nbytes + channels.shape[0] * channels.shape[1] * dropped * layer.dtype.itemsize


def _fits(counts: list[int], counted: list[int]) -> list[bool]:
    """Of each row whether it may keep as many tokens as count."""
    return [count >= there for count, there in zip(counts, counted, strict=True)]


def _layers(model: nn.Module) -> list[Any]:
    """Layers as transformers makes them for this model, those that store all tokens replaced."""
    config: Any = model.config
    stock = DynamicCache(config=config).layers
    return [SelectiveLayer() if type(layer) is DynamicLayer else layer for layer in stock]


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
        other.leave_room()
        other.tracks, other.notes = dict(layer.tracks), dict(layer.notes)
    return other
