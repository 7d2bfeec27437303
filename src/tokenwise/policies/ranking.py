"""Which units stay, ranked over many tensors at once without ever putting them side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokenwise.policies.budget import kept_count

_CHUNK = 1 << 22
_BINS = 1 << 16


def top_share_across(scores: Mapping[str, Tensor], keep: float | str) -> dict[str, Tensor]:
    """Masks of the units with the largest scores over all tensors together.

    The threshold is exact: two histograms, of the upper and of the lower half of the bits that order a float. Beside
    the masks this takes a few times four million numbers, whatever the size of the tensors.

    Args:
        scores: tensors of any shapes and devices, compared in fp32; larger matters more.
        keep: a share in (0, 1], or ``"N tokens"``, of all units together.

    Returns:
        A boolean mask for each tensor, of its shape and on its device, with exactly `kept_count(keep, n)` of the n
        units. Of equal scores those that come first stay, in the order of the mapping and then of the index. NaN
        counts as the largest score, so that it shows rather than hides.
    """
    available = sum(values.numel() for values in scores.values())
    count = kept_count(keep, available)
    if count == available:
        return {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    threshold, above = _threshold(scores, count)
    missing = count - above
    masks = {}
    for name, values in scores.items():
        parts = []
        for keys in _chunks(values):
            mask, equal = keys > threshold, keys == threshold
            ties = int(equal.sum()) if missing else 0
            if ties:
                mask |= equal if ties <= missing else equal & (equal.cumsum(0) <= missing)
                missing -= min(ties, missing)
            parts.append(mask)
        masks[name] = torch.cat(parts).view(values.shape) if parts else torch.ones_like(values, dtype=torch.bool)
    return masks


def _threshold(scores: Mapping[str, Tensor], count: int) -> tuple[int, int]:
    """The key of the unit at place `count`, and how many have a larger one."""
    histogram = torch.zeros(_BINS, dtype=torch.int64)
    for values in scores.values():
        for keys in _chunks(values):
            histogram += torch.bincount((keys >> 16) + _BINS // 2, minlength=_BINS).cpu()
    upper, above = _bin_of_place(histogram, count)
    histogram.zero_()
    for values in scores.values():
        for keys in _chunks(values):
            inside = keys[(keys >> 16) + _BINS // 2 == upper]
            histogram += torch.bincount(inside & (_BINS - 1), minlength=_BINS).cpu()
    lower, above_inside = _bin_of_place(histogram, count - above)
    return (upper - _BINS // 2) * _BINS + lower, above + above_inside


def _bin_of_place(histogram: Tensor, place: int) -> tuple[int, int]:
    """The bin that holds the unit at `place`, counted from the largest and from 1, and how many are in bins above."""
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, place))
    return _BINS - 1 - index, int(from_top[index - 1]) if index else 0


def _chunks(values: Tensor) -> Iterator[Tensor]:
    """Whole numbers in the order of the values, int32, a few million at a time."""
    for part in values.detach().reshape(-1).split(_CHUNK) if values.numel() else ():
        numbers = part.float() + 0.0  # -0.0 becomes 0.0
        bits = torch.where(numbers.isnan(), torch.nan, numbers).view(torch.int32)
        yield bits ^ ((bits >> 31) & 0x7FFFFFFF)
