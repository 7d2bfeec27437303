"""Gumbel noise that belongs to a query and a key, wherever and in whatever order they are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**17
"""Numbers drawn at a time on a CPU: what stays in its cache is several times as fast."""


def gumbel_noise(seed: int, lanes: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Numbers from the standard Gumbel distribution, one for each lane, query and key.

    Each is a function of the seed and the three numbers alone: blocks, batches and devices do not change it.

    Args:
        seed: not negative.
        lanes: what is independent of what (a head of a layer), whole numbers.
        queries: their positions, whole numbers.
        keys: their positions, whole numbers.

    Returns:
        fp32, of the shape that the three broadcast to.
    """
    start = _mixed(torch.tensor((seed * 0x9E3779B9 + 0x7F4A7C15) % 2**31, dtype=torch.int32, device=lanes.device))
    rows = torch.atleast_2d(_mixed(_mixed(lanes.int() + start) + queries.int()))
    columns = torch.atleast_2d(_mixed(keys.int()))
    found = torch.empty(torch.broadcast_shapes(rows.shape, columns.shape), device=rows.device)
    lines = found.shape[-2]
    size = max(_BLOCK * lines // max(found.numel(), 1), 1) if found.device.type == "cpu" else lines
    for first in range(0, lines, size):
        one, other = (part[..., first : first + size, :] if part.shape[-2] > 1 else part for part in (rows, columns))
        # Both are mixed already, so that half of the work is enough for each pair of them.
        bits = one + other
        bits *= 0x85EBCA6B - 2**32
        bits ^= bits >> 15
        bits *= 0xC2B2AE35 - 2**32
        # 23 of the bits as a number inside (0, 1): of 24 the largest would be rounded to 1.
        uniform = bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2**-23)
        found[..., first : first + size, :] = uniform.log_().neg_().log_().neg_()
    return found.view(torch.broadcast_shapes(lanes.shape, queries.shape, keys.shape))


def _mixed(values: Tensor) -> Tensor:
    """32 bits mixed so that each depends on all: the finalizer of MurmurHash3."""
    values = values ^ (values >> 16).bitwise_and_(0xFFFF)
    values *= 0x85EBCA6B - 2**32
    values ^= (values >> 13).bitwise_and_(0x7FFFF)
    values *= 0xC2B2AE35 - 2**32
    values ^= (values >> 16).bitwise_and_(0xFFFF)
    return values
