"""Whole chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import StoredTokens
from tokenwise.cache.snap_kv import SnapKV
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class ChunkKV(SnapKV):
    """Keeps whole chunks of neighbouring tokens, by the mean of their scores in SnapKV."""

    card: ClassVar[Card] = Card(
        id="cache/chunk_kv",
        paper=Paper(
            title="ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
            arxiv="2502.00299",
            venue="NeurIPS 2025",
        ),
        status="VERIFIED",
        checked="the order of the tokens against loops over chunks in fp64, and the chunks that kvpress 0.5.5 keeps; "
        "that the last one is kept in part, so that budgets are exact, is ours",
        control="cache/random",
    )

    chunk: Annotated[int, Field(ge=1)] = 20
    """Tokens of a chunk. Of the last one that fits into the budget in part, the best tokens stay; chunks with
    protected tokens come first."""

    def score(self, tokens: StoredTokens) -> Tensor:
        """Ranks, so that layers that share a budget each keep as much."""
        from torch.nn.functional import pad

        found = tokens.summed_over_heads(super().score(tokens))
        places = ((tokens.positions - tokens.pads.view(-1, 1, 1)) // self.chunk).clamp_min(0)
        chunks = tokens.seen // self.chunk + 1
        # What is no token belongs to a chunk behind all others.
        if tokens.real is not None:
            places = places.masked_fill(~tokens.real, chunks)
        totals = found.new_zeros(*places.shape[:2], chunks + 1)
        counts = totals.scatter_add(2, places, totals.new_ones(()).expand_as(found))
        totals.scatter_add_(2, places, found.masked_fill(self.protected(tokens), float("inf")))
        means = totals[..., :-1] / counts[..., :-1].clamp_min(1)
        rank = means.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        rank = pad(rank, (0, 1), value=chunks)
        by_score = found.argsort(dim=2, descending=True, stable=True)
        by_chunk = rank.gather(2, places).gather(2, by_score).argsort(dim=2, stable=True)
        return -by_score.gather(2, by_chunk).argsort(dim=2).to(found.dtype)
