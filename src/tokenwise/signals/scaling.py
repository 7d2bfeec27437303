"""Scores brought to one scale within groups."""

from __future__ import annotations

import torch
from torch import Tensor


def min_max(values: Tensor, groups: Tensor, count: int, floor: float = 1e-8) -> Tensor:
    """Values mapped linearly so that each group's smallest becomes 0 and its largest 1; equal values become 0.

    Args:
        values: [units].
        groups: group of each unit, [units], int64, numbered from 0.
        count: how many groups there are.
        floor: added to each range, so that equal values divide by it.
    """
    low = values.new_full((count,), torch.inf).scatter_reduce_(0, groups, values, "amin")[groups]
    high = values.new_full((count,), -torch.inf).scatter_reduce_(0, groups, values, "amax")[groups]
    return (values - low) / (high - low + floor)
