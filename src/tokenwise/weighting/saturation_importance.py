"""Unlearning weights from a token's own probability: saturation ``p^b1`` and importance ``(1-p)^b2``."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import group_mean, group_sum
from tokenwise.signals.losses import probability_power
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.objective import Term
from tokenwise.weighting.unlearning import OPEN_UNLEARNING, Unlearner, ascent

_PAPER = Paper(
    title="Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", arxiv="2505.11953", venue="ICML 2025"
)
_OFFICIAL = "the official code at 51314c0, all granularities: losses and gradients on random inputs"

Granularity = Literal["token", "group", "instance", "batch"]


class _Reweighted(Unlearner):
    granularity: Granularity = "token"
    """What has one weight: a token; a group of tokens of a sequence that are alike in weight; a sequence (``instance``,
    from its summed loss, so that long ones weigh next to nothing); or the sequences of a micro-batch (``batch``,
    which depends on its size by definition)."""
    group_size: int = Field(10, ge=1)
    """Tokens in a group of granularity ``group``."""

    @abstractmethod
    def _exponents(self) -> tuple[float, float]:
        """Exponents of p and of 1 - p."""

    def forget_term(self) -> Term:
        unit: Literal["token", "sequence"] = "token" if self.granularity in ("token", "group") else "sequence"
        whole = self.granularity != "token"
        return Term("forget", "forget", self.forget_coefficient, self._losses, unit, whole=whole)

    def _losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert batch.nll is not None
        if self.granularity in ("token", "group"):
            weights = probability_power(batch.nll, *self._exponents())
            if self.granularity == "group":
                weights = mean_of_groups(weights, batch.sequence, batch.sequences, self.group_size)
        else:
            per_sequence = probability_power(group_sum(batch.nll, batch.sequence, batch.sequences), *self._exponents())
            if self.granularity == "batch" and batch.sequences:
                per_sequence = per_sequence.mean().expand(batch.sequences)
            weights = per_sequence[batch.sequence]
        return ascent(batch.nll, weights)


class SatImp(_Reweighted):
    """Gradient ascent weighted by ``p^b1 (1-p)^b2``: most where a token is known but not yet certain."""

    card: ClassVar[Card] = Card(
        id="weighting/sat_imp", paper=_PAPER, needs=("a column forget",), status="VERIFIED",
        checked=f"{OPEN_UNLEARNING} (token); {_OFFICIAL}",
    )  # fmt: skip
    forget_coefficient: float = Field(0.1, gt=0)
    """Factor of the forget term."""

    b1: float = Field(5.0, ge=0)
    """Exponent of p, the saturation."""
    b2: float = Field(1.0, ge=0)
    """Exponent of 1 - p, the importance; the authors recommend 0.1."""

    def _exponents(self) -> tuple[float, float]:
        return self.b1, self.b2


class SimSat(_Reweighted):
    """Gradient ascent weighted by ``p^beta``: most where the model is certain."""

    card: ClassVar[Card] = Card(
        id="weighting/sim_sat", paper=_PAPER, needs=("a column forget",), status="VERIFIED", checked=_OFFICIAL
    )

    beta: float = Field(5.0, ge=0)
    """Exponent of p."""

    def _exponents(self) -> tuple[float, float]:
        return self.beta, 0.0


class SimImp(_Reweighted):
    """Gradient ascent weighted by ``(1-p)^beta``: most where the model is least certain."""

    card: ClassVar[Card] = Card(
        id="weighting/sim_imp", paper=_PAPER, needs=("a column forget",), status="VERIFIED", checked=_OFFICIAL
    )

    beta: float = Field(5.0, ge=0)
    """Exponent of 1 - p."""

    def _exponents(self) -> tuple[float, float]:
        return 0.0, self.beta


def mean_of_groups(weights: Tensor, sequence: Tensor, sequences: int, size: int) -> Tensor:
    """Each weight replaced by the mean of its group: `size` at a time in descending order within a sequence.

    Args:
        weights: [tokens].
        sequence: of each token, [tokens], int64, numbered in order.
        sequences: how many there are.
        size: tokens per group; the last of a sequence may be smaller.
    """
    descending = torch.argsort(weights, descending=True, stable=True)
    order = descending[torch.argsort(sequence[descending], stable=True)]
    lengths = torch.bincount(sequence, minlength=sequences)
    groups = -(-lengths // size)
    rank = torch.arange(weights.shape[0], device=weights.device) - (lengths.cumsum(0) - lengths)[sequence[order]]
    group = torch.empty_like(sequence)
    group[order] = (groups.cumsum(0) - groups)[sequence[order]] + rank // size
    return group_mean(weights, group, int(groups.sum()))[group]
