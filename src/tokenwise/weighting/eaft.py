"""Entropy-adaptive fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.weighting.base import PointwiseWeighter, TokenBatch

LARGEST = 3.0
"""What the official code takes for ln 20 = 2.9957, the entropy of 20 equally likely tokens."""


class EAFT(PointwiseWeighter):
    """Weigh each token by the entropy of the prediction: learn where the model wavers, spare what it is sure of.

    A label that a confident model finds unlikely contradicts what it knows, and its large gradient makes the model
    forget. The weight is ``(entropy of the 20 likeliest tokens / 3) ** alpha``, between 0 and 1. It falls below 1
    nearly everywhere, and with it the step: compare `mean_weight` before crediting the method.
    """

    card: ClassVar[Card] = Card(
        id="weighting/eaft",
        paper=Paper(
            title="Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
            arxiv="2601.02151",
        ),
        status="VERIFIED",
        checked="LLaMA-Factory's eaft_loss_func, loss and gradients on stored numbers",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "top_entropy"})

    alpha: float = Field(1.0, ge=0)
    """Exponent of the entropy; 0 is plain cross-entropy."""

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        assert batch.top_entropy is not None
        weight = (batch.top_entropy / LARGEST).pow(self.alpha)
        return weight * batch.nll, weight
