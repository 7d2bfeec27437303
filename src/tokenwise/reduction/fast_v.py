"""Image tokens by the attention of the prompt's last token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.reduction.staged import Share, StagedReducer, places_of

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.reduction.base import DecoderTokens


class FastV(StagedReducer):
    """Keeps, from an early layer of the language model on, the image tokens that the prompt's last token attends to
    most in the layer before."""

    card: ClassVar[Card] = Card(
        id="reduction/fast_v",
        paper=Paper(
            title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
            "Vision-Language Models",
            arxiv="2403.06764",
            venue="ECCV 2024",
        ),
        status="VERIFIED",
        checked="the eager attention map of the layer, and the dense model with the dropped tokens masked",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    of_text: ClassVar[bool] = True
    paper_ratios: ClassVar[tuple[float, ...]] = (0.5,)

    layer: Annotated[int, Field(ge=1)] = 2
    """Layer from which on tokens are gone, counted from 0; the attention of the one before is read."""
    ratios: tuple[Share, ...] | None = None
    """Share of the image tokens that stays from that layer on (0.5 in the paper); instead of `keep`."""

    def starts(self, layers: int) -> list[int]:
        return [min(self.layer, layers - 1)]

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        return {"attention": tuple(start - 1 for start in self.starts(layers))}

    def see_attention(self, tokens: DecoderTokens, call: AttentionCall) -> None:
        tokens.memory["last_row"] = call.rows(tokens.last()).mean(1)[:, 0]

    def score(self, tokens: DecoderTokens) -> Tensor:
        return tokens.memory["last_row"]


class PyramidDrop(StagedReducer):
    """Keeps, at three places in the depth of the language model, fewer image tokens each time: those that the prompt's
    last token would attend to most in the layer to come."""

    card: ClassVar[Card] = Card(
        id="reduction/pyramid_drop",
        paper=Paper(
            title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
            arxiv="2410.17247",
            venue="CVPR 2025",
        ),
        status="VERIFIED",
        checked="the eager attention map of the layer, and the dense model with the dropped tokens masked; tokens keep "
        "their positions, where the official code numbers them anew",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    of_text: ClassVar[bool] = True
    paper_ratios: ClassVar[tuple[float, ...]] = (0.5, 0.25, 0.125)

    places: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5, 0.75)
    """Where in the depth tokens are dropped, as shares of it: before layers 8, 16 and 24 of 32."""

    def starts(self, layers: int) -> list[int]:
        return places_of(self.places, layers)

    def score(self, tokens: DecoderTokens) -> Tensor:
        return tokens.next_attention().rows(tokens.last()).mean(1)[:, 0]
