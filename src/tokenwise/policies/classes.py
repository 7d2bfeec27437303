"""How much each class counts, from how often it occurs: weights, margins and priors."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """``(1 - beta) / (1 - beta ** n)`` of each class, scaled so that they sum to the number of classes.

    Args:
        counts: examples of each class n, [classes], each at least 1.
        beta: in [0, 1); 0 gives equal weights, close to 1 gives ``1 / n``.

    Returns:
        [classes], of mean 1.
    """
    exponents = counts.double() * torch.log(torch.tensor(beta, dtype=torch.float64, device=counts.device))
    # 1 - beta ** n without cancellation where beta is close to 1.
    weights = (1 - beta) / -torch.expm1(exponents)
    return weights / weights.mean()


def inverse_frequency_weights(counts: Tensor, power: float = 1.0) -> Tensor:
    """``n ** -power`` of each class, scaled so that they sum to the number of classes: [classes], of mean 1."""
    weights = counts.double().pow(-power)
    return weights / weights.mean()


def fourth_root_margins(counts: Tensor, largest: float) -> Tensor:
    """Margins in proportion to ``n ** (-1/4)``, the rarest class having `largest`: [classes]."""
    margins = counts.double().pow(-0.25)
    return largest * margins / margins.max()


def log_prior(counts: Tensor) -> Tensor:
    """The logarithm of each class's share of the examples, in nats: [classes]."""
    return (counts.double() / counts.sum()).log()
