"""Selection of the tokens that the model finds probable (ProFit)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.weighting.base import PointwiseWeighter, TokenBatch


class ProFit(PointwiseWeighter):
    """Train on the tokens whose own probability reaches a threshold: the core of an answer, not its wording.

    Of many good answers the data has one; where its words are improbable another answer would have other words. The
    loss is divided by all labels, so that a step shrinks with the share that is left out. Meant for fine-tuning:
    an untrained model finds nothing probable, and would learn nothing.
    """

    card: ClassVar[Card] = Card(
        id="weighting/pro_fit",
        paper=Paper(
            title="ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection",
            arxiv="2601.09195",
            venue="Findings of ACL 2026",
        ),
        status="VERIFIED",
        checked="the official loss (direction 'higher'), loss and gradients on stored numbers; the threshold is the "
        "official script's",
    )
    selects: ClassVar[bool] = True

    threshold: float = Field(0.1, ge=0, le=1)
    """The smallest probability of a label that is trained on; 0 is plain cross-entropy."""

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        weight = (torch.exp(-batch.nll) >= self.threshold).to(batch.nll.dtype)
        return weight * batch.nll, weight
