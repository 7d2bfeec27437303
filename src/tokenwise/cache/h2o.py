"""What has been looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class H2O(CachePolicy):
    """Keeps the heavy hitters: tokens that have received the most attention so far, and the last ones."""

    card: ClassVar[Card] = Card(
        id="cache/h2o",
        paper=Paper(
            title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
            arxiv="2306.14048",
            venue="NeurIPS 2023",
        ),
        status="VERIFIED",
        checked="scores, tokens kept and logits of the authors' code that evicts, while it generates, and the formula "
        "in fp64",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"received"})
    ordered: ClassVar[bool] = False

    recent_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the budget, less `sink`, that goes to the tokens at the end; `recent` of them stay at least."""
    interval: Annotated[int, Field(ge=1)] | None = 1
    """Evict while generating, too, every so many tokens; None: only when a prompt, or a part of one, has been read."""

    def last(self, count: int) -> int:
        # A share such as 0.29 of 100 must not come out just below 29.
        return max(super().last(count), int((count - self.sink) * self.recent_share + 1e-9))

    def score(self, tokens: StoredTokens) -> Tensor:
        return tokens.tracks["received"]
