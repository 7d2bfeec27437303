"""Tokens by their rank in the graph of attention, and by likeness to tokens of higher rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import EncoderReducer, LayerTokens

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class ZeroTPrune(EncoderReducer):
    """Drops tokens that a more important one resembles, and those that little attention flows to."""

    card: ClassVar[Card] = Card(
        id="reduction/zero_tprune",
        paper=Paper(
            title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained "
            "Transformers",
            arxiv="2305.17328",
            venue="CVPR 2024",
        ),
        status="RECONSTRUCTION",
        checked="the importance against powers of the whole attention map in fp64; who of two alike tokens goes, how "
        "many go for likeness and the plan over the blocks are ours, and no head is filtered out by its variance",
        control="reduction/random_drop",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""
    alike: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the dropped tokens that go for their likeness to a more important one."""
    iterations: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (
        30,
        5,
        1,
    )
    """Steps along the graph in the first quarter of the blocks, in the middle, and in the last quarter; 1 step is the
    mean attention a token receives."""

    def counts(self, shape: Shape) -> list[int]:
        from tokenwise.policies.plans import counts_after_dropping, fit, removed_evenly

        def plan(rate: float) -> list[int]:
            return counts_after_dropping(shape, removed_evenly(rate, shape.layers))

        return fit(plan, self.keep, shape, between=True, largest=shape.tokens)

    def importance(self, tokens: LayerTokens) -> Tensor:
        """The rank of each token, as the root of the mean square over heads, [batch, tokens], fp32."""
        assert tokens.attention is not None
        first, middle, last = self.iterations
        quarter = tokens.layers / 4
        steps = first if tokens.layer < quarter else middle if tokens.layer < tokens.layers - quarter else last
        rank = tokens.attention.rank(steps, None if tokens.padding is None else ~tokens.padding)
        return rank.square().mean(1).sqrt()

    def score(self, tokens: LayerTokens) -> Tensor:
        """The importance; what goes for its likeness goes whatever its rank."""
        return tokens.ranked(self.importance(tokens))

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        import torch

        from tokenwise.policies.matching import largest, normalized
        from tokenwise.reduction.merge import keep_only

        importance = self.importance(tokens)
        excluded = tokens.protected()
        metric = normalized(tokens.keys())
        similarity = metric @ metric.transpose(1, 2)
        order = importance.masked_fill(excluded, float("-inf")).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        half = ((~excluded).sum(1, keepdim=True) + 1) // 2
        upper = rank < half
        likeness = similarity.masked_fill(~upper.unsqueeze(1), float("-inf")).amax(2)
        likeness = likeness.masked_fill(upper | excluded, float("-inf"))
        removed = int(self.alike * (importance.shape[1] - count) + 0.5)
        redundant = torch.zeros_like(excluded).scatter_(1, largest(likeness, removed), True) & likeness.isfinite()
        # Importance is above 0, so what is redundant goes first, and of it the most alike.
        score = torch.where(redundant, -2 - likeness, importance)
        return keep_only(largest(tokens.ranked(score), count))
