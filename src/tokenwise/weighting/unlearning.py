"""Unlearning by raising the loss of what is to be forgotten: gradient ascent, its weighted and its bounded forms."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import group_sum
from tokenwise.signals.logit_losses import divergence_from
from tokenwise.signals.losses import probability_power
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.logit_objective import LogitObjective
from tokenwise.weighting.objective import REFERENCE_COLUMN, Objective, Term

OPEN_UNLEARNING = "open-unlearning at d3d7cf9: losses and gradients on random inputs"


class Unlearner(Objective):
    """Forgets some tokens and keeps others: ``forget_coefficient * forget term + retain_coefficient * retain term``."""

    reads: ClassVar[frozenset[str]] = frozenset({"forget"})

    forget_coefficient: float = Field(1.0, gt=0)
    """Factor of the forget term."""
    retain_coefficient: float = Field(1.0, ge=0)
    """Factor of the retain term."""
    retain: Literal["nll", "kl", "none"] = "nll"
    """The retain term: the loss of what is to be kept, its divergence from the reference, or none."""
    reference: str | None = None
    """The model before unlearning: a local directory, a hub id, or where only its losses are read a folder of token
    scores; by default the model in training as it is now."""

    @abstractmethod
    def forget_term(self) -> Term:
        """The forget term."""

    def terms(self) -> list[Term]:
        found = [self.forget_term()]
        if self.retain == "nll":
            found.append(Term("retain", "retain", self.retain_coefficient))
        elif self.retain == "kl":
            found.append(Term("retain", "retain", self.retain_coefficient, Divergence(), reference=True))
        return [term for term in found if term.coefficient]

    def retains(self) -> bool:
        """Whether there is a retain term at all."""
        return len(self.terms()) > 1


class Divergence(LogitObjective):
    """KL(reference || current)."""

    def tile(self, logits: Tensor, batch: TokenBatch, reference_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference_logits is not None
        return divergence_from(logits, reference_logits)


def ascent(nll: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The losses that raise `nll` by detached weights, and their derivative: [tokens] each."""
    return -weights * nll, -weights


def _plain_ascent(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    assert batch.nll is not None
    return ascent(batch.nll, torch.ones_like(batch.nll))


def _fading_ascent(risen: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``2 / beta * softplus(-beta * risen)`` and its derivative: ascent that fades as the loss has risen."""
    return functional.softplus(-beta * risen) * (2 / beta), -2 * torch.sigmoid(-beta * risen)


class GradientAscent(Unlearner):
    """Gradient ascent: raise the loss of what is to be forgotten, without bound and without a thought for the rest.

    It ruins the model if run for long: a baseline, not a tool.
    """

    card: ClassVar[Card] = Card(
        id="weighting/gradient_ascent",
        paper=Paper(
            title="Knowledge Unlearning for Mitigating Privacy Risks in Language Models",
            arxiv="2210.01504",
            venue="ACL 2023",
        ),
        needs=("a column forget",),
        status="VERIFIED",
        checked=OPEN_UNLEARNING,
    )
    retain: Literal["nll", "kl", "none"] = "none"
    """The retain term: the loss of what is to be kept, its divergence from the reference, or none."""

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, _plain_ascent)


class GradientDifference(Unlearner):
    """Gradient difference: raise the loss of what is to be forgotten, lower that of what is to be kept."""

    card: ClassVar[Card] = Card(
        id="weighting/gradient_difference",
        paper=Paper(title="Continual Learning and Private Unlearning", arxiv="2203.12817", venue="CoLLAs 2022"),
        needs=("a column forget",),
        status="VERIFIED",
        checked=OPEN_UNLEARNING,
    )

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, _plain_ascent)


class NPO(Unlearner):
    """Negative preference optimisation: gradient ascent that fades for each sequence as its loss rises above before.

    The loss is ``2 / beta * softplus(-beta * D)``, D being what the sequence's loss gained over the reference; its
    gradient is that of ascent times ``2 * sigmoid(-beta * D)``.
    """

    card: ClassVar[Card] = Card(
        id="weighting/npo",
        paper=Paper(
            title="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
            arxiv="2404.05868",
            venue="COLM 2024",
        ),
        needs=("a column forget", "the model before unlearning"),
        status="VERIFIED",
        checked=OPEN_UNLEARNING,
    )

    beta: float = Field(0.1, gt=0)
    """How fast the ascent fades, per nat of a sequence; towards 0 it is gradient ascent."""
    reference: str | None = None
    """The model before unlearning: a local directory, a hub id, a folder of token scores, or ``reference_nll`` for
    losses that come with the data in the column of that name; by default the model in training as it is now."""

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, self._losses, "sequence", whole=True, reference=True)

    @model_validator(mode="after")
    def _has_what_it_reads(self) -> NPO:
        if self.reference == REFERENCE_COLUMN and self.retain == "kl":
            raise ValueError("reference='reference_nll' gives losses, but retain='kl' needs the model itself")
        return self

    def _losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        assert batch.reference_nll is not None
        gained = group_sum(batch.nll - batch.reference_nll, batch.sequence, batch.sequences)
        values, slopes = _fading_ascent(gained, self.beta)
        return values, slopes[batch.sequence]


class SimNPO(Unlearner):
    """NPO without a reference: the ascent fades as the sequence's mean loss per token rises above `delta`."""

    card: ClassVar[Card] = Card(
        id="weighting/sim_npo",
        paper=Paper(
            title="Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
            arxiv="2410.07163",
            venue="NeurIPS 2025",
        ),
        needs=("a column forget",),
        status="VERIFIED",
        checked=OPEN_UNLEARNING,
    )
    forget_coefficient: float = Field(0.125, gt=0)
    """Factor of the forget term."""

    beta: float = Field(4.5, gt=0)
    """How fast the ascent fades, per nat per token."""
    delta: float = 0.0
    """The mean loss, in nats per token, around which it fades."""

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, self._losses, "sequence", whole=True)

    def _losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        lengths = torch.bincount(batch.sequence, minlength=batch.sequences)
        mean = group_sum(batch.nll, batch.sequence, batch.sequences) / lengths
        values, slopes = _fading_ascent(mean - self.delta, self.beta)
        return values, (slopes / lengths)[batch.sequence]


class WGA(Unlearner):
    """Weighted gradient ascent: each token's ascent times ``p^beta``, so that it fades with the token's probability."""

    card: ClassVar[Card] = Card(
        id="weighting/wga",
        paper=Paper(
            title="Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond",
            arxiv="2502.19301",
            venue="ICLR 2025",
        ),
        needs=("a column forget",),
        status="VERIFIED",
        checked=OPEN_UNLEARNING,
    )

    beta: float = Field(1.0, ge=0)
    """Exponent of the token's probability; 0 is gradient ascent."""

    def forget_term(self) -> Term:
        return Term("forget", "forget", self.forget_coefficient, self._losses)

    def _losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        return ascent(batch.nll, probability_power(batch.nll, self.beta, 0.0))
