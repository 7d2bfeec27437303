"""What queries to come will look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall

_BLOCK = 2048
"""Tokens whose states are held in fp32 at a time."""


class ExpectedAttention(CachePolicy):
    """Keeps the tokens that the queries to come will attend to, if they are distributed as those of the prompt."""

    card: ClassVar[Card] = Card(
        id="cache/expected_attention",
        paper=Paper(
            title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
            arxiv="2510.00636",
        ),
        needs=("rotary position embeddings",),
        status="VERIFIED",
        checked="the numbers of kvpress 0.5.5",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"keys", "values", "rotary"})

    sink: Annotated[int, Field(ge=0)] = 4
    """Tokens at the beginning that stay, within the budget; their queries are left out."""
    future: Annotated[int, Field(ge=1)] = 512
    """Positions ahead for which queries are expected."""
    covariance: bool = True
    """Whether the spread of the queries counts, or their mean alone."""
    value_norm: bool = True
    """Whether the expected attention is multiplied by the length of the value."""
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    """Added to the expected attention before it is multiplied."""

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        import torch

        assert tokens.rotary is not None
        count, notes = call.query.shape[2], tokens.notes
        places = tokens.positions[:, 0, -count:] - tokens.pads.unsqueeze(1)
        counts = places >= self.sink
        if tokens.real is not None:
            counts = counts & tokens.real[:, 0, -count:]
        if "query_mean" not in notes:
            mean = torch.zeros(*call.query.shape[:2], call.query.shape[3], device=call.query.device)
            notes["query_mean"], notes["query_scatter"] = mean, torch.zeros_like(mean).unsqueeze(3) * mean.unsqueeze(2)
            notes["query_count"] = torch.zeros_like(tokens.pads)
        for start in range(0, count, _BLOCK):
            some = slice(start, start + _BLOCK)
            queries = tokens.rotary.turn_back(call.query[:, :, some], places[:, None, some])
            self._add(notes, queries, counts[:, some])

    def _add(self, notes: dict[str, Tensor], queries: Tensor, counts: Tensor) -> None:
        """Add queries ([batch, heads, some, head_dim]) to mean and scatter, those that count ([batch, some])."""
        weights = counts[:, None, :, None]
        added, before = (each.view(-1, 1, 1) for each in (counts.sum(1), notes["query_count"]))
        total = (before + added).clamp_min(1)
        centre = (queries * weights).sum(2) / added.clamp_min(1)
        step = centre - notes["query_mean"]
        notes["query_mean"] = notes["query_mean"] + step * (added / total)
        if self.covariance:
            away = (queries - centre.unsqueeze(2)) * weights
            # The scatter about the common mean: that about either, and what lies between the two.
            apart = step.unsqueeze(3) * step.unsqueeze(2) * (before * added / total).unsqueeze(3)
            notes["query_scatter"] = notes["query_scatter"] + away.mT @ away + apart
        notes["query_count"] = notes["query_count"] + counts.sum(1)

    def score(self, tokens: StoredTokens) -> Tensor:
        import torch

        assert tokens.rotary is not None
        ahead = torch.arange(tokens.seen, tokens.seen + self.future, device=tokens.keys.device)
        turn = tokens.rotary.mean_turn(ahead - tokens.pads.unsqueeze(1), tokens.keys.shape[3])
        mean = tokens.over_queries(tokens.notes["query_mean"] @ turn).unsqueeze(4)
        spread = None
        if self.covariance:
            count = tokens.notes["query_count"].clamp_min(1).view(-1, 1, 1, 1)
            turn = turn.unsqueeze(1)
            spread = tokens.over_queries(turn.mT @ (tokens.notes["query_scatter"] / count) @ turn)
        logits = []
        for keys in tokens.keys.unsqueeze(2).split(_BLOCK, 3):
            keys = keys.float() * tokens.scaling
            expected = (keys @ mean).squeeze(4)
            if spread is not None:
                expected = expected + ((keys @ spread) * keys).sum(4) / 2
            logits.append(expected)
        counts = tokens.positions >= (tokens.pads + self.sink).view(-1, 1, 1)
        if tokens.real is not None:
            counts = counts & tokens.real
        counts = counts.unsqueeze(2)
        attention = torch.cat(logits, 3).masked_fill(~counts, torch.finfo(torch.float32).min).softmax(3)
        # Of a row whose tokens all stay anyway none counts.
        found = (attention * counts).mean(2)
        return (found + self.epsilon) * tokens.values.float().norm(dim=-1) if self.value_norm else found
