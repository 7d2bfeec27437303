"""Tokens by the attention they have received so far, in a cascade."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.method import Card, Paper
from tokenwise.reduction.staged import StagedReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.reduction.base import DecoderTokens


class SpAttenDecoder(StagedReducer):
    """Drops tokens before every layer but the first: those that received least attention in all layers so far, over
    all heads and queries."""

    card: ClassVar[Card] = Card(
        id="reduction/sp_atten_decoder",
        paper=Paper(
            title="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
            arxiv="2012.09852",
            venue="HPCA 2021",
        ),
        status="RECONSTRUCTION",
        checked="a short reference of the accumulated attention, and the dense model with the dropped tokens masked; "
        "that the counts fall in a line is ours",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    of_text: ClassVar[bool] = True

    ratios: None = None
    """Not for this method: the shares fall in a line, bent so that they meet `keep`."""

    def starts(self, layers: int) -> list[int]:
        return list(range(1, layers))

    def shares(self, layers: int) -> tuple[float, ...]:
        return tuple(1 - layer / layers for layer in range(1, layers))

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        return {"attention": tuple(range(layers - 1))}

    def see_attention(self, tokens: DecoderTokens, call: AttentionCall) -> None:
        received = call.columns(tokens.real).sum(1) * tokens.real.sum(1, keepdim=True)
        tokens.memory["received"] = tokens.memory.get("received", 0) + received

    def score(self, tokens: DecoderTokens) -> Tensor:
        return tokens.memory["received"]
