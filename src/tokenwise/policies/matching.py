"""Which tokens are merged with which: matchings on a similarity."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(vectors: Tensor) -> Tensor:
    """Vectors of length 1 in fp32 (fp64 for fp64); zero vectors stay zero."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    length = vectors.norm(dim=-1, keepdim=True)
    made: Tensor = vectors / length.where(length > 0, 1)
    return made


def bipartite_edges(metric: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each token at an even index the most similar one at an odd index.

    Args:
        metric: [batch, tokens, channels]; similarity is the cosine.
        excluded: tokens that take no part, [batch, tokens], bool.

    Returns:
        similarity: [batch, even tokens], fp32; -inf where the token or all its partners are excluded.
        partner: [batch, even tokens], the index among the tokens, int64; of equal ones the first.
    """
    metric = normalized(metric)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if excluded is None:
        similarity, index = scores.max(dim=2)
        return similarity, index * 2 + 1
    similarity, index = scores.masked_fill_(excluded[:, None, 1::2], float("-inf")).max(dim=2)
    return similarity.masked_fill(excluded[:, ::2], float("-inf")), index * 2 + 1


def merge_into_partners(even: Tensor, partner: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The output order and the targets when some tokens are merged into others.

    Args:
        even: tokens that go, [batch, merged], int64, none of them a partner.
        partner: the token each one goes into, [batch, merged]; -1 where it is dropped.
        tokens: how many tokens there are.

    Returns:
        kept: the tokens that stay, in their order, [batch, tokens - merged].
        target: the place among them that each token goes to, [batch, tokens]; -1 where it is dropped.
    """
    batch, merged = even.shape
    gone = torch.zeros(batch, tokens, dtype=torch.bool, device=even.device).scatter_(1, even, True)
    # Stable, so that what stays keeps its order.
    kept = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, : tokens - merged]
    place = (~gone).long().cumsum(1) - 1
    into = place.gather(1, partner.clamp_min(0)).masked_fill(partner < 0, -1)
    return kept, place.scatter(1, even, into)


def merge_best_edges(
    similarity: Tensor, partner: Tensor, tokens: int, removed: int, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge the tokens with the best edges of `bipartite_edges` into their partners; padding is dropped before.

    What stays keeps its order.

    Args:
        similarity, partner: of the tokens at even places, [batch, even tokens].
        tokens: how many there are.
        removed: how many go.
        padding: [batch, tokens], bool.

    Returns:
        As `merge_into_partners`.
    """
    score = similarity.new_full((len(similarity), tokens), float("-inf"))
    score[:, ::2] = similarity
    into = torch.full_like(score, -1, dtype=torch.long)
    into[:, ::2] = partner
    gone = largest(score.masked_fill(padding, float("inf")), removed)
    return merge_into_partners(gone, into.masked_fill(padding, -1).gather(1, gone), tokens)


def merge_evens(similarity: Tensor, partner: Tensor, tokens: int, merged: int, prefix: int) -> tuple[Tensor, ...]:
    """The even tokens most similar to their partners go into them.

    The order of the output is ToMe's, on which the next matching depends: the even tokens that stay, then the odd ones;
    the prefix before them all.

    Args:
        similarity, partner: of the even tokens, as `bipartite_edges` gives them.
        tokens: how many tokens there are.
        merged: how many go.
        prefix: how many at the beginning stand first in the output too; none of them goes.

    Returns:
        kept: the tokens that stay, [batch, tokens - merged].
        target: the place among them that each token goes to, [batch, tokens].
        gone: the tokens that go into others, [batch, merged].
    """
    batch, device = similarity.shape[0], similarity.device
    order = similarity.argsort(dim=1, descending=True, stable=True)
    gone = order[:, :merged] * 2
    stay = order[:, merged:].sort(dim=1).values * 2
    odd = torch.arange(1, tokens, 2, device=device)
    if prefix > 1:
        first, evens, odds = torch.arange(prefix, device=device), (prefix + 1) // 2, prefix // 2
        parts = [first.expand(batch, -1), stay[:, evens:], odd[odds:].expand(batch, -1)]
    else:
        parts = [stay, odd.expand(batch, -1)]
    kept = torch.cat(parts, 1)
    places = torch.arange(kept.shape[1], device=device).expand(batch, -1)
    target = kept.new_empty(batch, tokens).scatter_(1, kept, places)
    into = target.gather(1, partner.gather(1, order[:, :merged]))
    return kept, target.scatter_(1, gone, into), gone


def merge_marked(going: Tensor, partner: Tensor, absent: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `merge_into_partners`, where the rows of a batch lose different numbers of tokens.

    Args:
        going: tokens that go, [batch, tokens], bool, none of them a partner of another.
        partner: the token each one goes into, [batch, tokens], int64; read where `going`.
        absent: places that hold no token, [batch, tokens], bool; they go and are merged into nothing.

    Returns:
        kept: the tokens that stay, in their order, [batch, most that stay in a row].
        target: the place among them that each token goes to, [batch, tokens]; -1 for absent ones.
        empty: places at the end of `kept` that hold nothing, of its shape, bool.
    """
    gone = going if absent is None else going | absent
    left = (~gone).sum(1)
    kept = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, : int(left.max())]
    empty = torch.arange(kept.shape[1], device=kept.device) >= left.unsqueeze(1)
    place = (~gone).long().cumsum(1) - 1
    target = torch.where(going, place.gather(1, partner), place)
    return kept, target if absent is None else target.masked_fill(absent, -1), empty


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores of each row, [batch, count], in rising order of index.

    Of equal scores the first stay.
    """
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
