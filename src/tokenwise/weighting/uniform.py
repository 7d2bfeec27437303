"""Every token weighs 1: the baseline."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tokenwise.method import Card
from tokenwise.weighting.base import PointwiseWeighter, TokenBatch


class Uniform(PointwiseWeighter):
    """Every token weighs 1: plain cross-entropy, the baseline of every comparison."""

    card: ClassVar[Card] = Card(
        id="weighting/uniform",
        status="VERIFIED",
        checked="loss and update of transformers' own causal language modelling loss",
    )

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        return batch.nll, torch.ones_like(batch.nll)
