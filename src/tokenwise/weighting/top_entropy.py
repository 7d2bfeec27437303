"""Selection of the tokens at which the model is most undecided."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.selection import top_quantile
from tokenwise.weighting.base import Reduction, Scope, State, TokenBatch, TokenWeighter


class TopEntropy(TokenWeighter):
    """Train on the tokens where the next-token distribution has the highest entropy: the forks in the road."""

    card: ClassVar[Card] = Card(
        id="weighting/top_entropy",
        paper=Paper(
            title="Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for "
            "LLM Reasoning",
            arxiv="2506.01939",
            venue="NeurIPS 2025",
        ),
        status="VERIFIED",
        checked="TRL 1.16 get_high_entropy_mask on the same entropies; the paper selects in policy optimisation, "
        "here the rule selects in the cross-entropy",
        control="weighting/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"entropy"})
    reduction: ClassVar[Reduction] = "nonzero_mean"
    selects: ClassVar[bool] = True

    keep: float = Field(0.2, gt=0, le=1)
    """The share that stays of each scope's tokens: those at or above the entropy's quantile 1 - keep."""
    scope: Scope = "micro_batch"
    """Within which tokens the quantile is taken."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.entropy is not None
        return top_quantile(batch.entropy, self.keep, batch.groups(self.scope)).float()
