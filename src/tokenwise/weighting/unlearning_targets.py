"""Unlearning towards another distribution: what the model would say without the label."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.signals.logit_losses import distillation, inverted_hinge
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.logit_objective import LogitObjective
from tokenwise.weighting.objective import Term
from tokenwise.weighting.unlearning import OPEN_UNLEARNING, Unlearner


class UNDIAL(Unlearner):
    """Self-distillation: learn the distribution the model had before, with the label's logit lowered.

    It ends at a known distribution, so it stays stable for as long as one trains.
    """

    card: ClassVar[Card] = Card(
        id="weighting/undial",
        paper=Paper(
            title="UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
            arxiv="2402.10052",
            venue="NAACL 2025",
        ),
        needs=("a column forget", "the model before unlearning"),
        status="VERIFIED",
        checked=f"{OPEN_UNLEARNING}, without ignored positions, which that code averages over as well",
    )
    retain_coefficient: float = Field(0.0, ge=0)
    """Factor of the retain term."""

    beta: float = Field(10.0, ge=0)
    """By how much the label's logit is lowered."""

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, _Adjusted(self.beta), reference=True)


class _Adjusted(LogitObjective):
    def __init__(self, beta: float):
        self.beta = beta

    def tile(self, logits: Tensor, batch: TokenBatch, reference_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference_logits is not None
        label = batch.labels.unsqueeze(1)
        lowered = reference_logits.scatter_add(1, label, logits.new_full((1, 1), -self.beta).expand_as(label))
        return distillation(logits, lowered.softmax(1))


class CEU(Unlearner):
    """Cross-entropy unlearning: learn the model's own present distribution with the label struck out."""

    card: ClassVar[Card] = Card(
        id="weighting/ceu",
        paper=Paper(title="CE-U: Cross Entropy Unlearning", arxiv="2503.01224"),
        needs=("a column forget",),
        status="VERIFIED",
        checked=OPEN_UNLEARNING,
    )
    retain: Literal["nll", "kl", "none"] = "none"
    """The retain term: the loss of what is to be kept, its divergence from the reference, or none."""

    skip: int = Field(1, ge=0)
    """How many tokens at the beginning of each answer are left alone."""

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, _Without(), skip=self.skip)


class _Without(LogitObjective):
    def tile(self, logits: Tensor, batch: TokenBatch, reference_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        return distillation(logits, logits.scatter(1, batch.labels.unsqueeze(1), -float("inf")).softmax(1))


class InvertedHinge(Unlearner):
    """Inverted hinge loss (LoKU): lower the label's probability and raise its strongest rival's, within bounds."""

    card: ClassVar[Card] = Card(
        id="weighting/inverted_hinge",
        paper=Paper(
            title="Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs",
            arxiv="2408.06621",
            venue="ICLR 2025",
        ),
        needs=("a column forget",),
        status="VERIFIED",
        checked="the paper's formula on worked numbers; its gradient against autograd in fp64",
    )

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, _Hinge())


class _Hinge(LogitObjective):
    def tile(self, logits: Tensor, batch: TokenBatch, reference_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        return inverted_hinge(logits, batch.labels)
