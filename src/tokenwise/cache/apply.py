"""The verb: `evict` from a model's cache."""

from __future__ import annotations

from typing import overload

from torch import Tensor, nn

from tokenwise.cache.base import CachePolicy, CacheSelector
from tokenwise.cache.evicting import EvictingCache
from tokenwise.cache.selecting import SelectingCache
from tokenwise.errors import InputError, Problem


@overload
def evict(
    model: nn.Module, method: CachePolicy, *, masked: bool = False, protect: Tensor | None = None
) -> EvictingCache: ...
@overload
def evict(model: nn.Module, method: CacheSelector, *, masked: bool = False) -> SelectingCache: ...
def evict(
    model: nn.Module, method: CachePolicy | CacheSelector, *, masked: bool = False, protect: Tensor | None = None
) -> EvictingCache | SelectingCache:
    """A cache that keeps the tokens that matter, to be passed as ``past_key_values`` to `generate` or `forward`.

    It listens to the attention of `model` until it is undone, its ``with`` block left, or it is dropped; while another
    cache is passed it does nothing. A full budget is the stock cache to the bit.

    Args:
        model: a decoder of transformers, or a vision-language model.
        method: which tokens stay; or, of a `CacheSelector`, which of all that stay stored each step reads.
        masked: keep them all stored and hide from attention those that would be gone: the reference for what eviction
            does; with `EvictingCache.with_keep` many budgets from one prompt.
        protect: which tokens of the prompt stay whatever their score, such as those of a system prompt,
            [rows, tokens] or [tokens] where it is the same for all rows, bool, padding included. Within the budget,
            beside `sink` and `recent`; where more tokens are protected than a share would keep, they all stay.

    Raises:
        InputError: when the model or the budget does not fit, before anything is computed.
    """
    if isinstance(method, CacheSelector):
        if protect is not None:
            message = f"{type(method).__name__} stores all tokens: none is to be protected."
            raise InputError(Problem("protect", message, "Leave it out, or use a method that evicts."))
        return SelectingCache(model, method, masked)
    if not isinstance(method, CachePolicy):
        raise InputError(Problem("method", f"{method!r} is no cache policy.", "See `tokenwise methods`."))
    return EvictingCache(model, method, masked, protect)
