"""Which tokens lie far from each other: greedy choices by distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenwise.policies.matching import normalized


def cosine_distance(vectors: Tensor) -> Tensor:
    """1 minus the cosine of each pair, [tokens, tokens] in fp32 (fp64 for fp64); a zero vector is 1 from every other.

    Args:
        vectors: [tokens, channels].
    """
    unit = normalized(vectors)
    return 1 - unit @ unit.T


def farthest_first(distance: Tensor, count: int, start: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Tokens chosen one by one, each the farthest from the nearest that is chosen (greedy max-min).

    Args:
        distance: [tokens, tokens], symmetric.
        count: how many to choose, at most as many as there are.
        start: the first one, an index; unless given the one whose nearest neighbour is farthest.
        weights: factor on each token's distance, [tokens].

    Returns:
        Indices in the order they were chosen, [count], int64; of equal ones the first is chosen.
    """
    if start is None:
        alone = distance.clone()
        alone.fill_diagonal_(torch.inf)
        start = alone.amin(dim=1).argmax()
    return _greedy(distance, count, start, torch.minimum, weights)


def largest_sum(distance: Tensor, count: int, start: Tensor) -> Tensor:
    """As `farthest_first`, each the one whose distances to all that are chosen have the largest sum (max-sum)."""
    return _greedy(distance, count, start, torch.add, None)


def _greedy(
    distance: Tensor, count: int, start: Tensor, fold: Callable[[Tensor, Tensor], Tensor], weights: Tensor | None
) -> Tensor:
    # The running minimum, or sum, makes each step linear; nothing is read back from the device on the way.
    chosen = [start.reshape(1)]
    taken = torch.zeros(distance.shape[0], dtype=torch.bool, device=distance.device)
    reached = None
    while len(chosen) < count:
        taken.index_fill_(0, chosen[-1], True)
        row = distance.index_select(0, chosen[-1])[0]
        reached = row if reached is None else fold(reached, row)
        score = reached if weights is None else reached * weights
        chosen.append(score.masked_fill(taken, -torch.inf).argmax(dim=0, keepdim=True))
    return torch.cat(chosen)
