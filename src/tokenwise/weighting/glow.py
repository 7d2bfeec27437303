"""Weights of the samples by what the last epoch gained on them (GLOW)."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import group_mean
from tokenwise.weighting.base import Reduction, Run, TokenBatch, TokenWeighter


class LossHistory:
    """The mean loss that each sample had when it was last seen, in nats.

    The same on every process, since each is handed the samples of all.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def tensors(self) -> dict[str, Tensor]:
        """``sample_id`` [samples], int64, and ``loss`` [samples], fp64."""
        return {
            "sample_id": torch.tensor(list(self.losses), dtype=torch.int64),
            "loss": torch.tensor(list(self.losses.values()), dtype=torch.float64),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.losses = dict(zip(tensors["sample_id"].tolist(), tensors["loss"].tolist(), strict=True))


class GLOW(TokenWeighter):
    """Weigh each sample by how little its loss fell since it was last seen: move on from what is being memorised.

    With d the fall of a sample's mean loss since the epoch before, the weight is ``alpha * (1 - sigmoid(beta * d))``,
    clamped; a sample seen for the first time weighs 1, which makes the first epoch plain training on sequence means.
    Only from the second epoch on does the method do anything.

    At the defaults a sample whose loss fell weighs 0.5, by however little it fell, and one whose loss rose up to 1:
    the steps of later epochs are about half as large. alpha = 2 gives 1 where nothing changed. Where gradients are
    accumulated or several processes train, the samples of the step are scored together first, at the cost of another
    forward pass. Each sample has one loss: give packed or split sequences the ids of the samples they come from.
    """

    card: ClassVar[Card] = Card(
        id="weighting/glow",
        paper=Paper(
            title="Learning from Mistakes: Negative Reasoning Samples Enhance Out-of-Domain Generalization",
            arxiv="2601.04992",
        ),
        needs=("a column sample_id, aligned with labels, the same in every epoch", "more than one epoch"),
        status="VERIFIED",
        checked="the official code's weights, losses and defaults on worked numbers; where that compares a sample "
        "first seen after the first epoch with the mean of its micro-batch, it weighs 1 here",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "sample_id"})
    reduction: ClassVar[Reduction] = "sequence_mean"
    scope: ClassVar[str] = "step"

    alpha: float = Field(1.0, gt=0)
    """The weight that a sample of rising loss approaches."""
    beta: float = Field(20.0, ge=0)
    """How sharply the weight answers to a fall of the loss, per nat."""
    smallest: float = Field(0.5, ge=0)
    """Weights below it are raised to it."""
    largest: float = Field(5.0, gt=0)
    """Weights above it are lowered to it."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.smallest > self.largest:
            raise ValueError(f"smallest is {self.smallest} and largest {self.largest}; exchange them")
        return self

    def start(self, run: Run) -> LossHistory:
        return LossHistory()

    def weights(self, batch: TokenBatch, state: LossHistory) -> Tensor:  # type: ignore[override]
        assert batch.nll is not None
        assert batch.sample_id is not None
        ids, sample = torch.unique(batch.sample_id, return_inverse=True)
        losses = group_mean(batch.nll, sample, ids.shape[0])
        names = ids.tolist()
        # NaN marks the samples without a history.
        before = losses.new_tensor([state.losses.get(name, torch.nan) for name in names])
        weights = gain_weights(before - losses, self.alpha, self.beta).clamp(self.smallest, self.largest)
        state.losses.update(zip(names, losses.tolist(), strict=True))
        return weights.where(~before.isnan(), 1.0)[sample]


def gain_weights(gain: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * (1 - sigmoid(beta * gain))``: alpha for what got worse, alpha / 2 where nothing changed, then 0.

    Args:
        gain: by how much each loss fell, in nats, any shape.
        alpha: the largest weight.
        beta: steepness, per nat.
    """
    return alpha * torch.sigmoid(-beta * gain)
