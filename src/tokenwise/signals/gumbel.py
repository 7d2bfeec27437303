"""Gumbel noise that belongs to a query and a key, wherever and in whatever order they are looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def lane_bits(seed: int, lanes: Tensor) -> Tensor:
    """What `exponential_noise` needs of the seed, for each lane.

    Args:
        seed: not negative.
        lanes: what is independent of what (a head of a layer), whole numbers.

    Returns:
        int32, of the shape of `lanes`.
    """
    start = torch.tensor((seed * 0x9E3779B9 + 0x7F4A7C15) % 2**31, dtype=torch.int32, device=lanes.device)
    return _mixed(lanes.int() + _mixed(start))


def exponential_noise(lanes: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Numbers from the standard exponential distribution, one for each lane, query and key.

    Minus their logarithm is Gumbel noise: to add that to the scores of a softmax is to divide their exponentials by
    these. Each is a function of the lane's bits and the two numbers alone: blocks, batches and devices do not change
    it.

    Args:
        lanes: `lane_bits` of them.
        queries: their positions, whole numbers.
        keys: their positions, whole numbers.

    Returns:
        fp32, positive, of the shape that the three broadcast to.
    """
    rows = _mixed(lanes + queries.int())
    # Both are mixed already, so that the upper bits of the product of odd numbers depend on all of them.
    bits = (rows | 1) * (_mixed(keys.int() + 0x5BD1E995) | 1)
    # 23 of the bits as a number inside (0, 1): of 24 the largest would be rounded to 1.
    uniform = bits.bitwise_and_(-(2**9)).float()
    centre = torch.tensor(0.5 + 2**-24, device=uniform.device)
    return torch.add(centre, uniform, alpha=2**-32, out=uniform).log_().neg_()


def _mixed(values: Tensor) -> Tensor:
    """32 bits mixed so that each depends on all: the finalizer of MurmurHash3."""
    values = values ^ (values >> 16).bitwise_and_(0xFFFF)
    values *= 0x85EBCA6B - 2**32
    values ^= (values >> 13).bitwise_and_(0x7FFFF)
    values *= 0xC2B2AE35 - 2**32
    values ^= (values >> 16).bitwise_and_(0xFFFF)
    return values
