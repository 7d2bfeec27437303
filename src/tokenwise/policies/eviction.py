"""Which cached tokens stay: protection, and budgets shared out over layers and heads to the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenwise.policies.apportion import apportion


def protected(
    positions: Tensor, pads: Tensor, seen: int, sink: int, recent: Sequence[int], given: Tensor | None = None
) -> Tensor:
    """Which tokens stay whatever their score: the first, the last, and those that are given.

    Args:
        positions: [batch, heads, stored], int64, counted from the first column, padding included.
        pads: columns of padding in front of each row, [batch].
        seen: columns so far.
        sink: how many of the first tokens.
        recent: how many of the last tokens, of each row.
        given: which columns else, [batch, any], bool.

    Returns:
        [batch, heads, stored], bool; padding is never protected.
    """
    pads = pads.view(-1, 1, 1)
    end: int | Tensor = seen - recent[0]
    if len(set(recent)) > 1:
        end = seen - torch.tensor(recent, device=positions.device).view(-1, 1, 1)
    stay = positions >= end
    if sink:
        stay = stay | (positions < pads + sink)
    if given is not None:
        columns = torch.nn.functional.pad(given, (0, seen - given.shape[1]))
        stay = stay | columns.gather(1, positions.flatten(1)).view_as(positions)
    return stay & (positions >= pads)


def best_of_each_head(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tokens with the largest scores, in every head as many.

    Args:
        scores: [batch, heads, stored]; of equal ones the first is taken. +inf stays; -inf is no token.
        counts: how many stay of each row, [batch], int64; at least 1.

    Returns:
        index: their places, rising, [batch, heads, most of `counts`].
        real: which of these count, where rows keep different numbers, [batch, 1, most of `counts`], bool; else None.
        The places that do not count stand first.
    """
    most = int(counts.max())
    order = scores.argsort(dim=2, descending=True, stable=True)[:, :, :most]
    if bool((counts == most).all()):
        return order.sort(dim=2).values, None
    # What fills up a row stands first, where padding stood.
    taken = torch.arange(most, device=scores.device) < counts.view(-1, 1, 1)
    places = order.masked_fill(~taken, -1).sort(dim=2).values
    real = torch.arange(most, device=scores.device) >= most - counts.view(-1, 1, 1)
    return places.clamp_min(0), real


def worst_of_each_head(scores: Tensor, positions: Tensor) -> Tensor | None:
    """The place of the token with the smallest score, of equal ones the one with the largest position.

    Args:
        scores, positions: [batch, heads, stored], positions in any order; either may have one head.

    Returns:
        [batch, heads, 1], int64; None where the smallest of any head is NaN or -inf.
    """
    least = scores.amin(2, keepdim=True)
    if not bool((least > float("-inf")).all()):
        return None
    return torch.where(scores == least, positions, -1).argmax(2, keepdim=True)


def best_of_all(scores: Sequence[Tensor], totals: Tensor, floors: Tensor) -> list[Tensor]:
    """The tokens with the largest scores over several heads, or layers and heads, together.

    Args:
        scores: one or more of [batch, heads, stored], on any devices; -inf is no token and never stays.
        totals: how many stay of each row over all heads and layers, [batch].
        floors: how many of its best each head keeps anyway, [batch].

    Returns:
        Which stay, one for each of `scores`, of its shape, bool.
    """
    raised = []
    for score in scores:
        rank = score.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        own = (rank < floors.to(score.device).view(-1, 1, 1)) & (score > float("-inf"))
        raised.append(score.masked_fill(own, float("inf")).flatten(1).to(totals.device))
    joined = torch.cat(raised, 1)
    rank = joined.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    shown = (rank < totals.unsqueeze(1)) & (joined > float("-inf"))
    sizes = [part.shape[1] for part in raised]
    parts = zip(shown.split(sizes, 1), scores, strict=True)
    return [part.view(score.shape).to(score.device) for part, score in parts]


def best_of_shared(scores: Tensor, counts: Tensor, floor: float) -> Tensor:
    """The tokens that stay where the heads of a layer share a budget, as Ada-KV has it.

    How many a head keeps lies between an even share and how many of the best tokens of all heads are its own.

    Args:
        scores: [batch, heads, stored]; -inf is no token and never stays.
        counts: how many each head of a row would keep of an even share, [batch], at least 1.
        floor: weight of the even share.

    Returns:
        Which stay, of the shape of `scores`, bool; of each row ``heads * counts`` where it has as many.
    """
    heads, there = scores.shape[1], scores > float("-inf")
    best = best_of_all([scores], counts * heads, torch.ones_like(counts))[0].sum(2)
    weights = (1 - floor) * best.double() + floor * counts.unsqueeze(1)
    rows = zip((counts * heads).tolist(), weights.tolist(), there.sum(2).tolist(), strict=True)
    shares = torch.tensor([apportion(*row) for row in rows], device=scores.device)
    rank = scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return (rank < shares.unsqueeze(2)) & there


def pyramid_counts(count: int, available: int, layers: int, window: int, beta: float) -> list[int]:
    """Tokens of each layer that fall from the first to the last by equal steps, as PyramidKV has it.

    Args:
        count: tokens of each layer if they were shared evenly.
        available: tokens there are.
        layers: how many layers.
        window: tokens that every layer keeps within its count, whatever their score.
        beta: beyond the window the last layer keeps one part in so many of the mean.

    Returns:
        Counts that add up to ``layers * count`` exactly; all `count` where the steps do not fit.
    """
    even = [count] * layers
    if layers == 1 or count >= available or count <= window:
        return even
    least = (count - window) / beta + window
    most = 2 * count - least
    if most > available:
        most = float(available)
        least = 2 * count - most
    if not available >= most >= least >= window:
        return even
    sizes = [most - layer * (most - least) / (layers - 1) for layer in range(layers)]
    return apportion(count * layers, sizes, [available] * layers)


def kept_counts(keep: float | str, available: Tensor) -> Tensor:
    """As `kept_count`, of each row: `available` and what is returned are [batch], int64."""
    if isinstance(keep, str):
        return available.clamp_max(int(keep.split()[0]))
    return torch.floor(keep * available.double() + 0.5).long().clamp_min(1).minimum(available)


def top_places(scores: Tensor, most: int, counts: Tensor | None = None) -> Tensor:
    """The places of the largest scores, rising.

    Args:
        scores: [batch, heads, places]; of equal ones the first is taken.
        most: how many, at most `places`.
        counts: how many of each row where these differ, [batch], at most `most`.

    Returns:
        [batch, heads, most], int64; -1 where a row has fewer, which stand first.
    """
    if counts is None:
        # Which of equal scores `topk` takes is not said: it is asked for the smallest that is taken, and for places. To
        # sort all of them takes several times as long.
        least = scores.topk(most, dim=2, sorted=False).values.amin(2, keepdim=True)
        above, equal = scores > least, scores == least
        taken = above | (equal & (equal.cumsum(2) <= most - above.sum(2, keepdim=True)))
        places = torch.arange(scores.shape[2], device=scores.device).masked_fill(~taken, scores.shape[2])
        return places.topk(most, dim=2, largest=False, sorted=False).values.sort(dim=2).values
    order = scores.argsort(dim=2, descending=True, stable=True)[:, :, :most]
    order = order.masked_fill(torch.arange(most, device=scores.device) >= counts.view(-1, 1, 1), -1)
    return order.sort(dim=2).values


def tier_counts(
    count: int, available: int, share: float, protects: int, exact_nbytes: int, packed_nbytes: int
) -> tuple[int, int]:
    """Tokens that are stored exactly, and tokens stored at all, in the bytes of some exact ones.

    Args:
        count: exact tokens that there are bytes for.
        available: tokens there are.
        share: of the bytes, for exact tokens. Where all tokens fit, more of them are exact as far as the bytes go.
        protects: tokens that are exact anyway.
        exact_nbytes: of an exact token.
        packed_nbytes: of one in few bits.
    """
    exact = min(max(int(share * count + 0.5), protects), count, available)
    left = (count - exact) * exact_nbytes
    stored = exact + min(left // packed_nbytes, available - exact)
    if stored == available and packed_nbytes < exact_nbytes:
        more = (count * exact_nbytes - available * packed_nbytes) // (exact_nbytes - packed_nbytes)
        exact = min(max(exact, more), available)
    return exact, stored
