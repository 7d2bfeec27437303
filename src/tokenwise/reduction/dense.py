"""The model as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card
from tokenwise.reduction.base import EncoderReducer, LayerTokens

if TYPE_CHECKING:
    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class Dense(EncoderReducer):
    """Takes nothing out: the model as it is, which comparisons measure the others against."""

    card: ClassVar[Card] = Card(id="reduction/dense", status="VERIFIED", checked="its definition")

    keep: Annotated[float, Field(ge=1, le=1)] = 1.0
    """All of it stays."""

    def counts(self, shape: Shape) -> list[int]:
        return [shape.tokens] * shape.layers

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        import torch

        from tokenwise.reduction.merge import keep_only

        batch, available = tokens.hidden.shape[:2]
        return keep_only(torch.arange(available, device=tokens.hidden.device).expand(batch, -1))
