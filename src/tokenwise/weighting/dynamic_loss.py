"""Dynamic loss-based sample reweighting: LinUpper, Quadratic, Extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import group_mean, softmax_weights
from tokenwise.signals.losses import centred_min_max
from tokenwise.weighting.base import State, TokenBatch, TokenWeighter

SHAPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "lin_upper": lambda h, bound: torch.clamp(h + bound, max=bound),
    "quadratic": lambda h, bound: 1 - (h / bound) ** 2,
    "extremes": lambda h, bound: h.abs(),
}
"""What the position of a sample's loss in its batch, h in [-bound, bound], is worth."""


class DynamicLoss(TokenWeighter):
    """Weigh each sequence by where its loss stands in the batch: damp the easy, the extreme or the middle ones.

    Mean loss per sequence, mapped linearly to [-bound, bound] over the scope, shaped by `strategy`, then a softmax
    with `temperature`; weights average to 1 over the sequences.
    """

    card: ClassVar[Card] = Card(
        id="weighting/dynamic_loss",
        paper=Paper(
            title="Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
            arxiv="2502.06733",
            venue="ICLR 2025",
        ),
        needs=("several sequences in each scope",),
        status="VERIFIED",
        checked="worked numbers of the official formulas, with the mapping in its numerically stable form",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll"})
    compares_sequences: ClassVar[bool] = True

    strategy: Literal["lin_upper", "quadratic", "extremes"] = "lin_upper"
    """Which sequences gain: all but the easy ones, the middle ones, or both ends."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature (r in the paper): large is uniform; the paper uses 1.0 (124M) and 0.4 (large)."""
    bound: float = Field(1.0, gt=0)
    """Losses are mapped to [-bound, bound] (d in the paper)."""
    burn_in: int = Field(0, ge=0)
    """Optimizer steps with uniform weights at the start; the paper uses 5% of training."""
    scope: Literal["micro_batch", "step"] = "micro_batch"
    """Over which sequences the losses are mapped and the weights normalised."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.nll is not None
        if batch.step < self.burn_in or batch.sequences == 0:
            return torch.ones_like(batch.nll)
        losses = group_mean(batch.nll, batch.sequence, batch.sequences)
        position = self.bound * centred_min_max(losses)
        return softmax_weights(SHAPES[self.strategy](position, self.bound), self.temperature)[batch.sequence]
