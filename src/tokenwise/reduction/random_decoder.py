"""The control of what takes tokens out of a decoder: tokens by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card
from tokenwise.reduction.staged import Share, StagedReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.reduction.base import DecoderTokens


class RandomDecoder(StagedReducer):
    """Keeps image tokens by chance from an early layer of the language model on: what a method must beat to be worth
    anything."""

    card: ClassVar[Card] = Card(id="reduction/random_decoder", status="VERIFIED", checked="its definition")
    of_text: ClassVar[bool] = True
    paper_ratios: ClassVar[tuple[float, ...]] = (0.5,)

    layer: Annotated[int, Field(ge=1)] = 2
    """Layer from which on tokens are gone, counted from 0."""
    ratios: tuple[Share, ...] | None = None
    """Share of the image tokens that stays from that layer on; instead of `keep`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw; the same for every prompt."""

    def starts(self, layers: int) -> list[int]:
        return [min(self.layer, layers - 1)]

    def score(self, tokens: DecoderTokens) -> Tensor:
        import torch

        score = torch.zeros(tokens.candidates.shape, device=tokens.hidden.device)
        for row, candidates in zip(score, tokens.candidates, strict=True):
            drawn = torch.rand(int(candidates.sum()), generator=torch.Generator().manual_seed(self.seed))
            row[candidates] = drawn.to(row.device)
        return score
