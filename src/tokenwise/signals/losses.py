"""What matters, read off losses: pure functions of token statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def probability_power(nll: Tensor, power: float, complement_power: float) -> Tensor:
    """``p ** power * (1 - p) ** complement_power`` with p = exp(-nll), stable at both ends.

    Args:
        nll: negative log-likelihood in nats, any shape, at least 0.
        power: exponent of p.
        complement_power: exponent of 1 - p.

    Returns:
        A tensor like `nll`, in [0, 1] for exponents of at least 0; 0 ** 0 is 1.
    """
    weight = torch.exp(-power * nll) if power else torch.ones_like(nll)
    if complement_power:
        # -expm1(-nll) is 1 - p without cancellation where p is close to 1.
        weight = weight * (-torch.expm1(-nll)).pow(complement_power)
    return weight


def probability_power_slope(nll: Tensor, power: float, complement_power: float) -> Tensor:
    """The derivative of `probability_power` with respect to `nll`.

    With q = 1 - p: ``-power * p**a * q**b + complement_power * p**(a + 1) * q**(b - 1)``. Where p is 1 and b below 1
    the derivative is unbounded; it is then taken as 0, because p = 1 leaves nothing to learn.
    """
    slope = -power * probability_power(nll, power, complement_power)
    if complement_power:
        q = -torch.expm1(-nll)
        inner = complement_power * torch.exp(-(power + 1) * nll) * q.pow(complement_power - 1)
        slope = slope + inner.masked_fill(inner.isinf(), 0)
    return slope


def centred_min_max(values: Tensor, floor: float = 1e-6) -> Tensor:
    """Values mapped linearly so that the smallest becomes -1 and the largest 1; equal values become 0.

    Args:
        values: [units].
        floor: ranges below it count as it, so that equal values do not blow rounding up.
    """
    low, high = values.min(), values.max()
    return (2 * values - high - low) / (high - low).clamp_min(floor)
