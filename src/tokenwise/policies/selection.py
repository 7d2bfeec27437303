"""Which units stay: exact counts, ties broken by index."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenwise.policies.budget import kept_count


def top_share(scores: Tensor, keep: float | str, groups: Tensor | None = None) -> Tensor:
    """A mask of the units with the largest scores.

    Args:
        scores: [units]; larger matters more.
        keep: a share in (0, 1] or ``"N tokens"``, of each group.
        groups: group of each unit, [units], int64, numbered from 0; one group unless given.

    Returns:
        Boolean mask [units] with exactly `kept_count(keep, n)` units of each group of n. Of equal scores the one
        with the smaller index stays. NaN counts as the largest score, so that it shows rather than hides.
    """
    return _top(scores, lambda available: kept_count(keep, available), groups)


def top_quantile(scores: Tensor, keep: float, groups: Tensor | None = None) -> Tensor:
    """A mask of the units at or above the quantile 1 - `keep` of their group (linear interpolation).

    The same as comparing with ``torch.quantile(scores, 1 - keep)``, except that of equal scores only as many stay as
    would without ties. ``keep = 0`` keeps the maximum alone.

    Args:
        scores: [units]; larger matters more.
        keep: a share in [0, 1].
        groups: as in `top_share`.
    """
    return _top(scores, lambda available: math.floor(keep * (available - 1) + 1e-9) + 1 if available else 0, groups)


def _top(scores: Tensor, count: Callable[[int], int], groups: Tensor | None) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    order = torch.sort(scores, descending=True, stable=True).indices
    if groups is None:
        mask[order[: count(scores.shape[0])]] = True
        return mask
    order = order[torch.sort(groups[order], stable=True).indices]
    sizes = torch.bincount(groups)
    limits = torch.tensor([count(size) for size in sizes.tolist()], device=scores.device)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(scores.shape[0], device=scores.device) - starts[groups[order]]
    mask[order[rank < limits[groups[order]]]] = True
    return mask


def top_ceiling(scores: Tensor, keep: float, groups: Tensor | None = None) -> Tensor:
    """A mask of the ``ceil(keep * n)`` units with the largest scores of each group of n.

    Args:
        scores: [units]; larger matters more.
        keep: a share in (0, 1].
        groups: as in `top_share`.
    """
    # The small number takes back what the product's rounding adds: 0.7 * 10 is a little more than 7.
    return _top(scores, lambda available: math.ceil(keep * available - 1e-9), groups)
