"""Tokens by the attention they have received so far."""

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


class SpAtten(EncoderReducer):
    """Drops the tokens that all tokens of all blocks so far attended to least; what is gone stays gone."""

    card: ClassVar[Card] = Card(
        id="reduction/sp_atten",
        paper=Paper(
            title="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
            arxiv="2012.09852",
            venue="HPCA 2021",
        ),
        status="RECONSTRUCTION",
        checked="the importance against sums over whole attention maps in fp64; the plan over the blocks and that the "
        "class token stays are ours; heads, values and bits are not pruned",
        control="reduction/random_drop",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    sees_every_block: ClassVar[bool] = True

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""
    spared: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Share of the blocks, at the beginning, in which none goes."""

    def counts(self, shape: Shape) -> list[int]:
        from tokenwise.policies.plans import counts_after_dropping, fit, removed_evenly

        spared = int(self.spared * shape.layers + 0.5)

        def plan(rate: float) -> list[int]:
            return counts_after_dropping(shape, [0] * spared + removed_evenly(rate, shape.layers - spared))

        return fit(plan, self.keep, shape, between=True, largest=shape.tokens)

    def decide(self, tokens: LayerTokens, counts: list[int]) -> int:
        assert tokens.attention is not None
        queries = tokens.hidden.shape[1] if tokens.padding is None else (~tokens.padding).sum(1, keepdim=True)
        received = tokens.columns() * queries * tokens.attention.query.shape[1]
        if "importance" in tokens.memory:
            received = tokens.memory["importance"] + received
        tokens.memory["importance"] = received
        return counts[tokens.layer]

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens.ranked(tokens.memory["importance"])

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import keep_only

        return keep_only(largest(self.score(tokens), count))
