"""How well tokens side by side, a page of them, answer a query, without reading each of them."""

from __future__ import annotations

import torch
from torch import Tensor


def page_bounds(query: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """The largest score that a query could have with any key of a page, as Quest has it.

    Args:
        query: [..., queries, channels].
        least, most: the smallest and the largest value of each channel among the keys of each page, [..., pages,
            channels].

    Returns:
        At least the largest product of the query with a key of the page, [..., queries, pages], fp32.
    """
    query = query.float()
    return query.clamp_min(0) @ most.float().mT + query.clamp_max(0) @ least.float().mT


def votes(query: Tensor, keys: Tensor, candidates: Tensor | None = None) -> Tensor:
    """How much of all heads' attention each key gets, every head having one vote, as TokenSelect has it.

    Args:
        query: one of each head, [batch, heads, channels]; heads is a multiple of key heads.
        keys: [batch, key heads, keys, channels].
        candidates: keys that can be voted for, [batch, keys], bool; all unless given.

    Returns:
        [batch, keys], fp32, summing to heads; 0 for the others. The scores are not scaled.
    """
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys.float().mT
    if candidates is not None:
        scores = scores.masked_fill(~candidates[:, None, None], torch.finfo(scores.dtype).min)
    found: Tensor = scores.softmax(-1).sum((1, 2))
    return found if candidates is None else found.masked_fill(~candidates, 0)
