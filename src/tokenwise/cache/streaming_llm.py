"""The first and the last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class StreamingLLM(CachePolicy):
    """Keeps the first tokens, on which attention rests, and the last; what is stored stands close together."""

    card: ClassVar[Card] = Card(
        id="cache/streaming_llm",
        paper=Paper(
            title="Efficient Streaming Language Models with Attention Sinks", arxiv="2309.17453", venue="ICLR 2024"
        ),
        status="VERIFIED",
        checked="the logits of the authors' code while it generates, and the formula in fp64",
        control="cache/random",
    )
    ordered: ClassVar[bool] = False

    sink: Annotated[int, Field(ge=0)] = 4
    """Tokens at the beginning that stay, within the budget."""
    interval: Annotated[int, Field(ge=1)] | None = 1
    """Evict while generating, too, every so many tokens; None: only when a prompt, or a part of one, has been read."""
    positions: Literal["original", "compact"] = "compact"
    """Whether tokens keep their positions, or stand as close together as what is stored."""

    def score(self, tokens: StoredTokens) -> Tensor:
        return tokens.positions.float()
