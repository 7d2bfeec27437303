"""Selective language modelling by excess loss (RHO-1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.policies.selection import top_share
from tokenwise.weighting.base import Reduction, Scope, State, TokenBatch, TokenWeighter


class ExcessLoss(TokenWeighter):
    """Train on the tokens whose loss exceeds a reference model's most: learnable, worth learning, not yet learnt.

    The score of a token is its loss under the current model minus its loss under a frozen reference trained on clean
    data; the top share trains with weight 1, and the loss is their mean.
    """

    card: ClassVar[Card] = Card(
        id="weighting/excess_loss",
        paper=Paper(
            title="Rho-1: Not All Tokens Are What You Need", arxiv="2404.07965", venue="NeurIPS 2024"
        ),
        needs=("a reference model with the same vocabulary",),
        status="VERIFIED",
        checked="the paper's formula on worked numbers; the official training code is not released",
        control="weighting/random",
    )  # fmt: skip
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "reference_nll"})
    reduction: ClassVar[Reduction] = "nonzero_mean"
    selects: ClassVar[bool] = True

    keep: Keep = 0.6
    """What stays of each scope's tokens."""
    reference: str
    """The reference model: a local directory, a hub id, or in a plan the name of one of its references."""
    scope: Scope = "micro_batch"
    """Within which tokens the ranking is made; the paper ranks within the batch."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.nll is not None
        assert batch.reference_nll is not None
        return top_share(batch.nll - batch.reference_nll, self.keep, batch.groups(self.scope)).float()
