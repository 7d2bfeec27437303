"""Token merging."""

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


class ToMe(EncoderReducer):
    """Merges the most similar tokens, some in every block: each token at an even place may go into its best match
    at an odd place."""

    card: ClassVar[Card] = Card(
        id="reduction/tome",
        paper=Paper(title="Token Merging: Your ViT But Faster", arxiv="2210.09461", venue="ICLR 2023"),
        status="VERIFIED",
        checked="facebookresearch/ToMe at af95e4b on timm's VisionTransformer: outputs, groups and counts per block",
        control="reduction/random_drop",
    )
    merges: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    proportional: ClassVar[bool] = True
    halving: ClassVar[bool] = True

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""
    r: Annotated[int, Field(ge=0)] | None = None
    """Tokens merged in each block, as the paper has it; instead of `keep`."""
    inflection: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """-1 merges most in the first blocks, 1 most in the last, 0 the same number in each."""

    def counts(self, shape: Shape) -> list[int]:
        from tokenwise.policies.plans import counts_after_merging, fit, removed_evenly, removed_linearly

        def plan(rate: float) -> list[int]:
            if self.inflection == 0:
                return counts_after_merging(shape, removed_evenly(rate, shape.layers))
            return counts_after_merging(shape, removed_linearly(rate, self.inflection, shape.layers))

        if self.r is not None:
            return plan(self.r)
        return fit(plan, self.keep, shape, between=True, largest=shape.tokens)

    def edges(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """How ready each token at an even place is to be merged, and into which, both [batch, even tokens]."""
        from tokenwise.policies.matching import bipartite_edges

        return bipartite_edges(tokens.keys(), tokens.protected())

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        from tokenwise.policies.matching import merge_best_edges, merge_evens
        from tokenwise.reduction.merge import Merge

        available = tokens.hidden.shape[1]
        similarity, partner = self.edges(tokens)
        if tokens.padding is not None:
            return Merge(*merge_best_edges(similarity, partner, available, available - count, tokens.padding))
        kept, target, gone = merge_evens(similarity, partner, available, available - count, tokens.prefix)
        return Merge(kept, target, joining=gone)
