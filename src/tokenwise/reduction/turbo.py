"""Token merging that spares what the class token attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.reduction.base import LayerTokens
from tokenwise.reduction.tome import ToMe

if TYPE_CHECKING:
    from torch import Tensor


class Turbo(ToMe):
    """Merges tokens that are similar to another and matter little: as ToMe, less the attention each receives."""

    card: ClassVar[Card] = Card(
        id="reduction/turbo",
        paper=Paper(
            title="Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models",
            arxiv="2407.11717",
            venue="ECCV 2024",
        ),
        status="RECONSTRUCTION",
        checked="ToMe at alpha 0 and a short fp64 reference; the size of alpha and the plan over the blocks are ours, "
        "and what the paper restores for generation is left out",
        control="reduction/random_drop",
    )

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """How much the attention a token receives counts against merging it: of the class token, or where there is none
    the mean over all queries; shares that sum to 1 over the tokens."""

    def edges(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        similarity, partner = super().edges(tokens)
        attention = tokens.class_row() if tokens.has_class_token else tokens.columns()
        return similarity - self.alpha * attention[:, ::2], partner
