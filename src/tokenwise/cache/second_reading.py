"""What has been read with a cache is read a second time, for its method to look on, and this is forgotten again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenwise.cache.padding import in_front
from tokenwise.errors import InputError, Problem
from tokenwise.models.selective_kv import SelectiveLayer

if TYPE_CHECKING:
    from tokenwise.cache.evicting import EvictingCache

_IDS, _MASK, _LAST = "unrepeated", "unrepeated_mask", "unrepeated_last"


class SecondReading:
    """Has a model repeat what it has read with a cache.

    What is still to be repeated is in the notes of the first layer that is evicted from, so that it follows the rows of
    the batch: ``unrepeated``, the ids of the last tokens seen, -1 for each that is not to be, [batch, tokens]; and,
    where the model was given them, ``unrepeated_mask``, which columns count, [batch, seen], and ``unrepeated_last``,
    the positions of the last token, [batch, ..., 1].

    Args:
        cache: what is read with it is noted, and it is told then (`EvictingCache.has_read`), until it is undone or
            dropped.
        decoder: the innermost module of its model, which is called however the model is.
    """

    def __init__(self, cache: EvictingCache, decoder: nn.Module):
        self._decoder = decoder
        self._repeats: Tensor | None = None
        mine = weakref.ref(cache)
        cache.on_undo(decoder.register_forward_pre_hook(_checker(mine), with_kwargs=True).remove)
        cache.on_undo(decoder.register_forward_hook(_noter(mine), with_kwargs=True).remove)

    @property
    def under_way(self) -> bool:
        """Whether the pass that the model is in is a repetition."""
        return self._repeats is not None

    def repeat(self, cache: EvictingCache, rows: Tensor) -> None:
        """Read the tokens of some rows that have not been a second time; those of the others go on waiting.

        Args:
            cache: its layers store what has been read.
            rows: which, [batch], bool.
        """
        first: SelectiveLayer = cache.layers[cache.places[0]]
        ids, mask, last = (first.notes.get(name) for name in (_IDS, _MASK, _LAST))
        if ids is None:
            return
        rows = rows.to(ids.device).unsqueeze(1)
        real = rows & (ids >= 0)
        # In each row what counts is moved to the front.
        order = (~real).long().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
        columns = first.seen - ids.shape[1] + order
        windows = {index: layer for index, layer in enumerate(cache.layers) if index not in cache.places}
        try:
            for more, repeats in cache.method.repetitions(ids.clamp_min(0).gather(1, order), real.gather(1, order)):
                for index, layer in windows.items():
                    cache.layers[index] = copy.copy(layer)
                found = in_front(first.notes, columns.gather(1, repeats.clamp_min(0)).unsqueeze(1), first.seen)
                self._repeats = torch.where(repeats < 0, repeats, found.squeeze(1))
                options: dict[str, Tensor] = {}
                if mask is not None:
                    options["attention_mask"] = torch.cat([mask, (repeats > -2).to(mask.dtype)], 1)
                if last is not None:
                    following = last + 1 + torch.arange(more.shape[1], device=last.device)
                    options["position_ids"] = following.movedim(0, -2)
                self._decoder(input_ids=more, past_key_values=cache, use_cache=True, **options)
        finally:
            self._repeats = None
            for index, layer in windows.items():
                cache.layers[index] = layer
        _leave(first.notes, ids.masked_fill(rows, -1))

    @contextmanager
    def repeating(self, layer: SelectiveLayer, queries: Tensor) -> Iterator[None]:
        """While the method looks at a layer's attention, say what its queries ([batch, heads, queries, head_dim])
        repeat; then let the layer forget their tokens."""
        assert self._repeats is not None
        layer.notes["repeats"] = self._repeats.to(queries.device)
        try:
            yield
        finally:
            del layer.notes["repeats"]
            layer.take_back(layer.seen - queries.shape[2])


def _note(notes: dict[str, Tensor], ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
    """Note tokens that have been read, to be repeated.

    Args:
        notes: of the first layer.
        ids: [batch, tokens].
        mask: which of all columns seen count, [batch, seen], or None.
        positions: of the tokens, [..., batch or 1, tokens], or None.
    """
    here = ids if mask is None else ids.masked_fill(~mask[:, -ids.shape[1] :].bool(), -1)
    notes[_IDS] = torch.cat([notes[_IDS], here], 1) if _IDS in notes else here
    last = None
    if positions is not None:
        # Notes have the rows in front, and positions that are counted in several ways do not.
        last = positions[..., -1:].movedim(-2, 0)
        last = last.expand(len(ids), *last.shape[1:])
    for name, values in ((_MASK, mask), (_LAST, last)):
        if values is None:
            notes.pop(name, None)
        else:
            notes[name] = values


def forget_last(notes: dict[str, Tensor], tokens: int) -> None:
    """Forget the last tokens, which are to be read once more.

    Args:
        notes: of the first layer.
        tokens: how many of those seen.
    """
    if _IDS not in notes:
        return
    _leave(notes, notes[_IDS][:, : max(notes[_IDS].shape[1] - tokens, 0)])
    if _MASK in notes:
        notes[_MASK] = notes[_MASK][:, : notes[_MASK].shape[1] - tokens]
    if _LAST in notes:
        notes[_LAST] = notes[_LAST] - tokens


def _leave(notes: dict[str, Tensor], ids: Tensor) -> None:
    """Note what is left to be repeated, from the first column on that has any of it."""
    waiting = (ids >= 0).any(0)
    if bool(waiting.any()):
        notes[_IDS] = ids[:, int(waiting.long().argmax()) :]
    else:
        for name in (_IDS, _MASK, _LAST):
            notes.pop(name, None)


def _told(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Ids and mask that the decoder is called with.

    Raises:
        InputError: when it is given no ids, or a mask that does not say which tokens count.
    """
    ids, mask = (options.get(name) for name in ("input_ids", "attention_mask"))
    ids = args[0] if ids is None and args else ids
    if not isinstance(ids, Tensor) or (mask is not None and getattr(mask, "ndim", 0) != 2):
        raise InputError(
            Problem(
                "input_ids",
                f"{name} reads the prompt a second time: it needs the tokens' ids, and a mask of [batch, tokens], if "
                "any.",
                "Pass input_ids, or use a method such as snap_kv.",
            )
        )
    return ids, mask


def _read_with(mine: weakref.ref[EvictingCache], args: tuple[Any, ...], options: Any) -> EvictingCache | None:
    """The cache, where a pass of the decoder reads with it what is to be repeated."""
    cache = mine()
    # A hook that is removed while hooks are running is called once more, without the options.
    if cache is None or options is None or cache.second is None or cache.second.under_way:
        return None
    return cache if any(value is cache for value in (*args, *options.values())) else None


def _checker(mine: weakref.ref[EvictingCache]) -> Any:
    def check(module: nn.Module, args: tuple[Any, ...], options: Any = None) -> None:
        cache = _read_with(mine, args, options)
        if cache is not None:
            _told(type(cache.method).__name__, args, options)

    return check


def _noter(mine: weakref.ref[EvictingCache]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], *others: Any) -> None:
        options: Any = others[0] if len(others) == 2 else None
        cache = _read_with(mine, args, options)
        if cache is not None:
            ids, mask = _told(type(cache.method).__name__, args, options)
            _note(cache.layers[cache.places[0]].notes, ids, mask, options.get("position_ids"))
            cache.has_read(ids.shape[1])

    return note
