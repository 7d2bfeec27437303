"""How far two choices, or two rankings, agree."""

from __future__ import annotations

import torch
from torch import Tensor


def jaccard(first: Tensor, second: Tensor) -> float:
    """What two sets of indices have in common, as a share of what is in either of them, in [0, 1].

    Args:
        first: indices without repetition, [kept], int64.
        second: as `first`, of any length.

    Returns:
        1 for equal sets, two empty ones included.
    """
    common = int(torch.isin(first, second).sum())
    either = first.numel() + second.numel() - common
    return common / either if either else 1.0


def kendall_tau(first: Tensor, second: Tensor) -> float:
    """Kendall's tau-b: how many more pairs two rankings order alike than otherwise, corrected for ties, in [-1, 1].

    Args:
        first: scores, [units], finite.
        second: of the same units.

    Returns:
        NaN where all scores of one of them are equal, so that it ranks nothing.
    """
    # One row at a time of the units x units pairs would be slow, all of them at once large: some rows at a time.
    rows = max(1, (1 << 22) // max(first.numel(), 1))
    agreeing = ordered_first = ordered_second = 0
    for start in range(0, first.numel(), rows):
        a = (first[start : start + rows, None] - first).sign().long()
        b = (second[start : start + rows, None] - second).sign().long()
        agreeing += int((a * b).sum())
        ordered_first += int(a.abs().sum())
        ordered_second += int(b.abs().sum())
    pairs = (ordered_first * ordered_second) ** 0.5
    return agreeing / pairs if pairs else float("nan")
