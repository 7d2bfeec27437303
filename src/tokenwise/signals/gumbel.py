"""Gumbel noise that belongs to a query and a key, wherever and in whatever order they are looked at."""

from __future__ import annotations

import torch
from torch import Tensor


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
    rows = _mixed(_mixed(lanes.int() + start) + queries.int())
    bits = _mixed(rows + _mixed(keys.int()))
    # 24 of the bits as a number inside (0, 1).
    uniform = bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(2**-24)
    return uniform.log_().neg_().log_().neg_()


def _mixed(values: Tensor) -> Tensor:
    """32 bits mixed so that each depends on all: the finalizer of MurmurHash3."""
    values = values ^ (values >> 16).bitwise_and_(0xFFFF)
    values *= 0x85EBCA6B - 2**32
    values ^= (values >> 13).bitwise_and_(0x7FFFF)
    values *= 0xC2B2AE35 - 2**32
    values ^= (values >> 16).bitwise_and_(0xFFFF)
    return values
