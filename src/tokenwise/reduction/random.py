"""Controls: tokens by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import EncoderReducer, InputReducer, LayerTokens

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.vision_language import EncodedImage
    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class Random(InputReducer):
    """Keeps patches by chance: what a method must beat to be worth anything."""

    card: ClassVar[Card] = Card(id="reduction/random", status="VERIFIED", checked="its definition")

    keep: Keep = 0.5
    """What stays of each image's patches."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw; the same for every image of as many patches."""

    def score(self, image: EncodedImage) -> Tensor:
        import torch

        drawn = torch.rand(len(image.features), generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(image.features.device).masked_fill(~image.patch, float("inf"))

    def select(self, image: EncodedImage, count: int) -> Merge:
        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import keep_only

        return keep_only(largest(self.score(image).unsqueeze(0), count))


class RandomDrop(EncoderReducer):
    """Drops as many patches by chance in every block of an encoder: what a method must beat to be worth anything."""

    card: ClassVar[Card] = Card(id="reduction/random_drop", status="VERIFIED", checked="its definition")

    keep: Keep = 0.7
    """What stays of the tokens: the share that the feed-forward layers work on, averaged over the blocks; or
    ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense encoder's."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws; the same for every image."""

    def counts(self, shape: Shape) -> list[int]:
        from tokenwise.policies.plans import counts_after_dropping, fit, removed_evenly

        def plan(rate: float) -> list[int]:
            return counts_after_dropping(shape, removed_evenly(rate, shape.layers))

        return fit(plan, self.keep, shape, between=True, largest=shape.tokens)

    def score(self, tokens: LayerTokens) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1000 + tokens.layer)
        drawn = torch.rand(tokens.hidden.shape[1], generator=generator).to(tokens.hidden.device)
        return tokens.ranked(drawn.expand(tokens.hidden.shape[:2]))

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import keep_only

        return keep_only(largest(self.score(tokens), count))
