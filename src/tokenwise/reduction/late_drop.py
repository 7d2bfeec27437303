"""All image tokens at once, when the text has taken up what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import DecoderReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.reduction.base import DecoderTokens, Stay


class LateDrop(DecoderReducer):
    """Drops all image tokens before one late layer of the language model: the second stage of ToDRE."""

    card: ClassVar[Card] = Card(
        id="reduction/late_drop",
        paper=Paper(
            title="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arxiv="2505.18757"
        ),
        needs=("a vision-language model",),
        status="RECONSTRUCTION",
        checked="the dense model with all image tokens masked; the rule that says at which layer is ours",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    keep: Keep = 0.75
    """What stays: share of image token x layer, and so the share of the layers that see the image, of which there is at
    least one; or ``"X flops"``, a share of the operations of all layers."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Where given, the image goes before the first layer from there on when less than this share of the last token's
    attention, as a mean over heads, fell on it in the layer before."""

    def first(self, candidates: int, layers: int) -> int:
        """The first layer without the image."""
        share = float(self.keep.split()[0]) / candidates if isinstance(self.keep, str) else self.keep
        return min(max(int(share * layers + 1e-9), 1), layers)

    def counts(self, candidates: int, layers: int) -> list[int]:
        first = self.first(candidates, layers) if candidates else layers
        return [candidates] * first + [0] * (layers - first)

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        return {} if self.threshold is None else {"attention": tuple(range(layers - 1))}

    def see_attention(self, tokens: DecoderTokens, call: AttentionCall) -> None:
        tokens.memory["last_row"] = call.rows(tokens.last()).mean(1)[:, 0]

    def choose(self, tokens: DecoderTokens, counts: Tensor) -> Stay:
        from tokenwise.reduction.base import Stay

        goes = counts < tokens.candidates.sum(1)
        if self.threshold is not None:
            seen = (tokens.memory["last_row"] * tokens.candidates).sum(1)
            goes = goes & (seen < self.threshold)
        return Stay(tokens.candidates & ~goes.unsqueeze(1))
