"""Token merging that protects what is unlike everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import EncoderReducer, LayerTokens

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class PiToMe(EncoderReducer):
    """Merges tokens of large clusters: those with the highest energy, which grows with the number of similar tokens."""

    card: ClassVar[Card] = Card(
        id="reduction/pi_to_me",
        paper=Paper(
            title="Accelerating Transformers with Spectrum-Preserving Token Merging",
            arxiv="2405.16148",
            venue="NeurIPS 2024",
        ),
        status="VERIFIED",
        checked="the official functions for images and for texts on seeded keys; attention is not proportional, as in "
        "their timm path; merged texts are weighted by size, which the official path for texts is not",
        control="reduction/random_drop",
    )
    merges: ClassVar[bool] = True
    halving: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""
    ratio: Annotated[float, Field(ge=0.5, le=1)] | None = None
    """Share of the patches kept in each block, as the paper has it (0.9 to 0.95); instead of `keep`."""
    variant: Literal["image", "text"] = "image"
    """How energy is measured and who may merge: ``image`` counts similarity above the margin, and tokens of adjacent
    energy face each other; ``text`` weighs it by a Gaussian, and the upper half goes into the lower."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Cosine from which tokens count as similar, in the first block."""
    decline: Annotated[float, Field(ge=0, le=1)] = 0.9
    """By how much the margin falls over the blocks, in a line; 0.25 is the paper's for texts."""

    def counts(self, shape: Shape) -> list[int]:
        import math

        from tokenwise.policies.plans import counts_after_merging, fit

        def plan(ratio: float) -> list[int]:
            removed, patches = [], shape.tokens - shape.prefix
            for _ in range(shape.layers):
                removed.append(min(math.floor(patches - patches * ratio), patches // 2))
                patches -= removed[-1]
            return counts_after_merging(shape, removed)

        if self.ratio is not None:
            return plan(self.ratio)
        return fit(lambda gone: plan(1 - gone), self.keep, shape, between=True, largest=0.5)

    def energy(self, similarity: Tensor, layer: int, layers: int) -> Tensor:
        """What each pair of tokens adds to the energy of both, from its cosine, in the shape of `similarity`."""
        from torch.nn import functional

        margin = self.margin - self.decline * layer / layers
        if self.variant == "image":
            return functional.elu(similarity - margin)
        # The Gaussian's constant factor changes no order.
        return (-0.5 * ((1 - similarity) / (1 - margin)).square()).exp()

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        import torch

        from tokenwise.policies.matching import merge_into_partners, normalized
        from tokenwise.reduction.merge import Merge

        metric = normalized(tokens.keys())
        similarity = metric @ metric.transpose(1, 2)
        excluded = tokens.protected()
        pairs = self.energy(similarity, tokens.layer, tokens.layers).masked_fill(excluded.unsqueeze(1), 0)
        energy = pairs.sum(2) / (~excluded).sum(1, keepdim=True).clamp_min(1)
        order = energy.masked_fill(excluded, float("-inf")).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)

        available = energy.shape[1]
        removed = available - count
        padding = torch.zeros_like(excluded) if tokens.padding is None else tokens.padding
        dropped = padding & (padding.long().cumsum(1) <= removed)
        merged = removed - dropped.sum(1, keepdim=True)
        facing = rank % 2 == 1 if self.variant == "image" else rank >= merged
        candidate = rank < 2 * merged
        source, destination = candidate & ~facing, candidate & facing
        partner = similarity.masked_fill(~destination.unsqueeze(1), float("-inf")).argmax(2)
        partner = partner.masked_fill(dropped, -1)
        gone = (source | dropped).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :removed]
        kept, target = merge_into_partners(gone, partner.gather(1, gone), available)
        return Merge(kept, target)
