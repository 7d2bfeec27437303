"""Patches by the attention of the class token, inside the encoder."""

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


class EViT(EncoderReducer):
    """Keeps the patches that the class token attends to most, in a few blocks, and fuses the others into one token."""

    card: ClassVar[Card] = Card(
        id="reduction/evit",
        paper=Paper(
            title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
            arxiv="2202.07800",
            venue="ICLR 2022",
        ),
        needs=("a class token",),
        status="VERIFIED",
        checked="a short fp64 reference of the paper's algorithm, and its counts of tokens per block",
        control="reduction/random_drop",
    )
    merges: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the patches kept in each of the blocks, as the paper has it (0.7); instead of `keep`."""
    places: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.25, 0.5, 0.75)
    """Where in the depth patches are dropped, as shares of it: blocks 3, 6 and 9 of 12."""
    fuse: bool = True
    """Whether the dropped patches leave one token, their sum weighted by the class token's attention."""

    def counts(self, shape: Shape) -> list[int]:
        import math

        from tokenwise.policies.plans import fit

        blocks = {int(place * shape.layers + 0.5) for place in self.places}

        def plan(gone: float) -> list[int]:
            rate, patches, counts = 1 - gone, shape.tokens - shape.prefix, []
            for layer in range(shape.layers):
                if layer in blocks:
                    # Rounding errors must not raise the next whole number.
                    stay = max(math.ceil(rate * patches - 1e-9), 1)
                    patches = min(patches, stay + self.fuse)
                counts.append(shape.prefix + patches)
            return counts

        return plan(1 - self.rate) if self.rate is not None else fit(plan, self.keep, shape, between=True, largest=1)

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens.ranked(tokens.class_row())

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        import torch

        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import Merge, keep_only

        kept = largest(self.score(tokens), count - self.fuse)
        if not self.fuse:
            return keep_only(kept)
        row = tokens.class_row()
        gone = torch.ones_like(row, dtype=torch.bool).scatter_(1, kept, False)
        places = torch.arange(count - 1, device=kept.device).expand(kept.shape[0], -1)
        target = torch.full_like(gone, count - 1, dtype=torch.long).scatter_(1, kept, places)
        # The fused token stands where the strongest of the dropped ones stood.
        first = row.masked_fill(~gone, -1).argmax(1, keepdim=True)
        return Merge(torch.cat([kept, first], 1), target, weights=torch.where(gone, row, 1.0), average=False)
