"""Dropping and merging at rates that were learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import EncoderReducer, LayerTokens

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class DiffRate(EncoderReducer):
    """In every block drops the tokens that the class token attends to least, then merges the next ones into those most
    like them.

    How many of each is what the paper learns: `learn_rates` makes such a plan. Without one, every block takes out as
    many, half of them by dropping.
    """

    card: ClassVar[Card] = Card(
        id="reduction/diff_rate",
        paper=Paper(
            title="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
            arxiv="2305.17997",
            venue="ICCV 2023",
        ),
        needs=("a class token", "a plan from learn_rates, for the paper's rates"),
        status="VERIFIED",
        checked="the official merging, counts, masks and their gradients on seeded numbers; in learning, hidden tokens "
        "do not attend to themselves, and a merged token of negative similarity adds nothing to the size",
        control="reduction/random_drop",
    )
    merges: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})
    proportional: ClassVar[bool] = True

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""

    def counts(self, shape: Shape) -> list[int]:
        from tokenwise.policies.allocators import counts_by_weight
        from tokenwise.policies.plans import fit

        def plan(rate: float) -> list[int]:
            return counts_by_weight(shape, rate, [1.0] * shape.layers)

        return fit(plan, self.keep, shape, between=True, largest=shape.tokens)

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens.class_row().masked_fill(tokens.protected(), float("inf"))

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        import torch

        from tokenwise.policies.matching import normalized
        from tokenwise.reduction.merge import Merge

        planned = None if self.plan is None else self.plan.dropped_to
        left = (tokens.hidden.shape[1] + count + 1) // 2 if planned is None else planned[tokens.layer]
        order = self.score(tokens).argsort(dim=1, descending=True, stable=True)
        kept, merging = order[:, :count].sort(1).values, order[:, count:left]

        metric = normalized(tokens.hidden)

        def rows(index: torch.Tensor) -> torch.Tensor:
            return metric.gather(1, index.unsqueeze(2).expand(-1, -1, metric.shape[2]))

        similarity = rows(merging) @ rows(kept).transpose(1, 2)
        similarity[:, :, : tokens.prefix] = float("-inf")
        similarity, partner = similarity.max(2)

        places = torch.arange(count, device=kept.device).expand_as(kept)
        target = torch.full_like(order, -1).scatter_(1, kept, places).scatter_(1, merging, partner)
        adds = tokens.size.gather(1, merging) * similarity.clamp_min(0).to(tokens.size)
        return Merge(kept, target, weights=torch.ones_like(tokens.size), sizes=tokens.size.scatter(1, merging, adds))
