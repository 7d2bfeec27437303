"""Vectors in 8 or 4 bits a channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Packed:
    """Vectors whose channels are whole numbers between the smallest and the largest of the vector.

    Args:
        codes: [..., bytes], uint8; with 4 bits the first of two channels in the lower half.
        low: smallest channel of each vector, [..., 1], fp32.
        step: how far codes lie apart, [..., 1], fp32.
        bits: 8 or 4.
        channels: of a vector.
        dtype: of the vectors.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int
    channels: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes


def packed_nbytes(channels: int, bits: int) -> int:
    """Bytes that one vector takes."""
    return -(-channels * bits // 8) + 8


def pack(values: Tensor, bits: int) -> Packed:
    """Round each channel to the nearest of ``2 ** bits`` numbers spread evenly over its vector's range.

    Args:
        values: [..., channels]; finite.
        bits: 8 or 4.
    """
    exact = values.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((exact - low) / step.masked_fill(step == 0, 1)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return Packed(codes, low, step, bits, values.shape[-1], values.dtype)


def unpack(packed: Packed, into: Tensor | None = None) -> Tensor:
    """The vectors again, each channel within half a step of what it was, and what the rounding of their type adds.

    Args:
        packed: what `pack` made.
        into: where to write them, [..., channels]; new memory unless given.
    """
    codes = packed.codes
    if packed.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., : packed.channels]
    if into is None:
        into = packed.low.new_empty(*packed.low.shape[:-1], packed.channels, dtype=packed.dtype)
    if into.dtype == torch.float32:
        return into.copy_(codes).mul_(packed.step).add_(packed.low)
    return into.copy_(packed.low + packed.step * codes)
