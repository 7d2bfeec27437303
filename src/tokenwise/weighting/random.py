"""A random share of the tokens: the control of every selecting method."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tokenwise.method import Card
from tokenwise.policies.budget import Keep
from tokenwise.policies.selection import top_share
from tokenwise.weighting.base import Reduction, Run, Scope, TokenBatch, TokenWeighter


class RandomState:
    """The generator of a run, so that a resumed run draws what the uninterrupted one would have drawn.

    Args:
        run: the run.
        alike: whether all processes draw the same.
    """

    def __init__(self, run: Run, alike: bool = False):
        self.generator = torch.Generator().manual_seed(run.seed * 1_000_003 + (0 if alike else run.rank))

    def tensors(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.generator.set_state(tensors["generator"])


class Random(TokenWeighter):
    """Train on a random share of the tokens: what a selecting method at the same budget must beat."""

    card: ClassVar[Card] = Card(id="weighting/random", status="VERIFIED", checked="exact counts, uniform frequencies")
    reduction: ClassVar[Reduction] = "nonzero_mean"
    selects: ClassVar[bool] = True

    keep: Keep = 0.6
    """What stays of each scope's tokens."""
    scope: Scope = "micro_batch"
    """Within which tokens the share is drawn."""

    def start(self, run: Run) -> RandomState:
        # Each process decides over the tokens of all: the share is exact if they agree.
        return RandomState(run, alike=self.scope == "step")

    def weights(self, batch: TokenBatch, state: RandomState) -> Tensor:  # type: ignore[override]
        scores = torch.rand(batch.labels.shape[0], generator=state.generator).to(batch.labels.device)
        return top_share(scores, self.keep, batch.groups(self.scope)).float()
