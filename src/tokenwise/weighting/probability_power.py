"""Weights that are powers of the label's probability, ``p^a (1-p)^b``: one family with many names."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import mean_one
from tokenwise.signals.losses import probability_power, probability_power_slope
from tokenwise.weighting.base import PointwiseWeighter, State, TokenBatch, TokenWeighter


class ProbabilityPower(PointwiseWeighter):
    """Weigh each token by ``p^power (1-p)^complement_power`` of its own probability p.

    power > 0 favours what the model believes already, complement_power > 0 what it does not.
    """

    card: ClassVar[Card] = Card(
        id="weighting/probability_power",
        status="VERIFIED",
        checked="gradient identities in fp64: p^a equals the gradient of (1 - p^a) / a; DFT, focal and SatImp values",
    )

    power: float = Field(1.0, ge=0)
    """Exponent of p."""
    complement_power: float = Field(0.0, ge=0)
    """Exponent of 1 - p."""
    detach: bool = True
    """Whether the weight is a constant to the gradient."""

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return _power_loss(batch, self.power, self.complement_power, self.detach)


class ReferenceProbabilityPower(PointwiseWeighter):
    """Weigh each token by ``p^power (1-p)^complement_power`` of its probability p under a reference model."""

    card: ClassVar[Card] = Card(
        id="weighting/reference_probability_power",
        needs=("a reference model with the same vocabulary",),
        status="VERIFIED",
        checked="the formula on worked numbers",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "reference_nll"})

    power: float = Field(0.0, ge=0)
    """Exponent of the reference's p."""
    complement_power: float = Field(1.0, ge=0)
    """Exponent of the reference's 1 - p."""
    reference: str
    """The reference model: a local directory, a hub id, or in a plan the name of one of its references."""

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        assert batch.reference_nll is not None
        weight = probability_power(batch.reference_nll, self.power, self.complement_power)
        return weight * batch.nll, weight


class DFT(PointwiseWeighter):
    """Dynamic fine-tuning: weigh each token by its own probability, undoing the 1/p in the gradient of its loss.

    Meant for fine-tuning strong models; from-scratch and weak models usually lose by it.
    """

    card: ClassVar[Card] = Card(
        id="weighting/dft",
        paper=Paper(
            title="On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
            arxiv="2508.05629",
        ),
        status="VERIFIED",
        checked="TRL 1.16 loss_type='dft' and LLaMA-Factory's dft_loss_func, losses and gradients; the gradient of "
        "mean(-p)",
    )

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return _power_loss(batch, 1.0, 0.0, detach=True)


class PowerAlpha(PointwiseWeighter):
    """Weigh each token by ``p^alpha``: between plain cross-entropy (0) and DFT (1)."""

    card: ClassVar[Card] = Card(
        id="weighting/power_alpha",
        paper=Paper(
            title="Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model "
            "Capability Continuum",
            arxiv="2510.00526",
        ),
        status="VERIFIED",
        checked="the gradient of mean((1 - p^alpha) / alpha), in fp64",
    )

    alpha: float = Field(0.5, ge=0)
    """Exponent of p; 0 is plain cross-entropy, 1 is DFT."""

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return _power_loss(batch, self.alpha, 0.0, detach=True)


class Focal(PointwiseWeighter):
    """Focal loss: weigh each token by ``(1-p)^gamma``, so that what is known already counts less."""

    card: ClassVar[Card] = Card(
        id="weighting/focal",
        paper=Paper(title="Focal Loss for Dense Object Detection", arxiv="1708.02002", venue="ICCV 2017"),
        status="VERIFIED",
        checked="worked numbers; gradients with and without detach against autograd in fp64",
    )

    gamma: float = Field(2.0, ge=0)
    """Exponent of 1 - p; 0 is plain cross-entropy."""
    detach: bool = False
    """Whether the weight is a constant to the gradient; in the paper it is not."""

    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return _power_loss(batch, 0.0, self.gamma, self.detach)


class Prior(TokenWeighter):
    """PRIOR: weigh each token by ``(1-p_ref)^alpha`` of a reference that sees less, averaging to 1 in each sequence.

    What the reference predicts without the context (an image, a retrieved text) teaches little about the context.
    """

    card: ClassVar[Card] = Card(
        id="weighting/prior",
        paper=Paper(
            title="Prioritizing Image-Related Tokens Enhances Vision-Language Pre-Training", arxiv="2505.08971"
        ),
        needs=("a reference model with the same vocabulary",),
        status="VERIFIED",
        checked="the paper's formula on worked numbers; no official code is released, and the reduction over the "
        "batch (mean over labels) is ours",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"reference_nll"})
    scope: ClassVar[str] = "sequence"

    alpha: float = Field(1.0, ge=0)
    """Exponent of 1 - p_ref; 0 is plain cross-entropy."""
    reference: str
    """The reference model: a local directory, a hub id, or in a plan the name of one of its references."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.reference_nll is not None
        return mean_one(probability_power(batch.reference_nll, 0.0, self.alpha), batch.sequence, batch.sequences)


def _power_loss(batch: TokenBatch, power: float, complement_power: float, detach: bool) -> tuple[Tensor, Tensor]:
    assert batch.nll is not None
    weight = probability_power(batch.nll, power, complement_power)
    value = weight * batch.nll
    if detach:
        return value, weight
    return value, weight + batch.nll * probability_power_slope(batch.nll, power, complement_power)
