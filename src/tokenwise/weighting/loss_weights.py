"""Weights that come with the data."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tokenwise.method import Card
from tokenwise.weighting.base import State, TokenBatch, TokenWeighter


class LossWeights(TokenWeighter):
    """Weigh each token by the batch's own column ``loss_weights``: rules, annotations, anything computed beforehand."""

    card: ClassVar[Card] = Card(
        id="weighting/loss_weights",
        needs=("a column loss_weights, aligned with labels",),
        status="VERIFIED",
        checked="the formula on worked numbers",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"loss_weights"})

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.loss_weights is not None
        return batch.loss_weights
