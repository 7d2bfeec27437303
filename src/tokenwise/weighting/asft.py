"""Anchored supervised fine-tuning: weights by the token's own probability, held near a reference."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.signals.logit_losses import divergence_from
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.logit_objective import LogitObjective
from tokenwise.weighting.objective import Objective, Term


class ASFT(Objective):
    """Anchored supervised fine-tuning: DFT plus alpha times the divergence KL(reference || current), per token.

    Both terms are divided by the labels of the whole optimizer step. LLaMA-Factory divides them by the labels of each
    micro-batch and adds these averages up, so that its update grows with the number of accumulation steps, and is not
    a number where a micro-batch has no label; on one batch the two are the same.
    """

    card: ClassVar[Card] = Card(
        id="weighting/asft",
        paper=Paper(title="Anchored Supervised Fine-Tuning", arxiv="2509.23753"),
        needs=("the model before training",),
        status="VERIFIED",
        checked="LLaMA-Factory's asft_loss_func on one batch, loss and gradients on stored numbers; autograd in fp64",
    )

    alpha: float = Field(0.1, ge=0)
    """Factor of the divergence; 0 is DFT."""
    reference: str | None = None
    """The model before training: a local directory or a hub id; by default the model in training as it is now."""

    def terms(self) -> list[Term]:
        return [Term("loss", "all", 1.0, _Anchored(self.alpha), reference=True)]


class _Anchored(LogitObjective):
    def __init__(self, alpha: float):
        self.alpha = alpha

    def tile(self, logits: Tensor, batch: TokenBatch, reference_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference_logits is not None
        label = batch.labels.unsqueeze(1)
        log_probabilities = logits.log_softmax(1)
        divergence, slope = divergence_from(logits, reference_logits)
        nll = -log_probabilities.gather(1, label)
        weight = (-nll).exp()
        own = log_probabilities.exp_()
        own.scatter_add_(1, label, own.new_full((1, 1), -1.0).expand_as(label))
        return (weight * nll).squeeze(1) + self.alpha * divergence, own.mul_(weight).add_(slope, alpha=self.alpha)
