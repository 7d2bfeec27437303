"""How much each unit weighs: means per group, normalisation to mean 1, softmax weights."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum of `values` [units] in each of `count` groups: [count]."""
    return values.new_zeros(count).index_add_(0, groups, values)


def group_mean(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean of `values` [units] in each of `count` groups: [count]; 0 for an empty group."""
    sizes = torch.bincount(groups, minlength=count)
    return group_sum(values, groups, count) / sizes.clamp_min(1)


def mean_one(weights: Tensor, groups: Tensor | None = None, count: int = 1) -> Tensor:
    """Weights scaled to mean 1 in each group; a group whose weights are all zero becomes uniform.

    Args:
        weights: [units], at least 0.
        groups: group of each unit, [units], int64; one group unless given.
        count: how many groups there are.
    """
    if weights.numel() == 0:
        return weights
    if groups is None:
        groups = torch.zeros(weights.shape, dtype=torch.int64, device=weights.device)
    means = group_mean(weights, groups, count)[groups]
    return torch.where(means > 0, weights / means.where(means > 0, 1.0), 1.0)


def softmax_weights(values: Tensor, temperature: float) -> Tensor:
    """``softmax(values / temperature)`` times their number: weights of mean 1, [units].

    The maximiser of ``sum(w * values) - temperature * KL(w || uniform)``; a large temperature gives uniform weights.
    """
    return torch.softmax(values / temperature, dim=0) * values.shape[0]
