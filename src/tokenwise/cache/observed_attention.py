"""What has been looked at, by those that could."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall


class ObservedAttention(CachePolicy):
    """Keeps the tokens that receive the most attention from each query that sees them: early ones have no advantage."""

    card: ClassVar[Card] = Card(
        id="cache/observed_attention",
        paper=Paper(
            title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
            arxiv="2306.14048",
            venue="NeurIPS 2023",
        ),
        status="VERIFIED",
        checked="the formula in fp64, and the numbers of kvpress 0.5.5, whose mean stands for the paper's sum",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"received"})

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        super().observe(tokens, call)
        asking, since = tokens.asking(call), tokens.seen - tokens.positions
        most = call.query.shape[2] if asking is None else asking.sum(1).view(-1, 1, 1)
        tokens.accumulate("observers", since.clamp_max(most))

    def score(self, tokens: StoredTokens) -> Tensor:
        shared = tokens.query_heads // tokens.keys.shape[1]
        return tokens.tracks["received"] / (tokens.tracks["observers"] * shared).clamp_min(1)
