"""What stands out against the tokens that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class LagKV(CachePolicy):
    """Keeps the tokens whose keys and values vary most over the channels, on the scale of the block that follows."""

    card: ClassVar[Card] = Card(
        id="cache/lag_kv",
        paper=Paper(
            title="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arxiv="2504.04704"
        ),
        status="VERIFIED",
        checked="the numbers of kvpress 0.5.5, and the tokens that the authors' code keeps",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    sink: Annotated[int, Field(ge=0)] = 4
    """Tokens at the beginning that stay, within the budget; blocks begin behind them. The authors' code has 16, and
    kvpress 4."""
    lag: Annotated[int, Field(ge=2)] = 128
    """Tokens of a block. The last whole block, and what follows it, score above all others. The authors' code has 1024
    unless told, and 128 in its example."""

    def score(self, tokens: StoredTokens) -> Tensor:
        import torch

        from tokenwise.models.selective_kv import take_rows

        batch, heads, stored, _ = tokens.keys.shape
        real = torch.ones(batch, heads, stored, dtype=torch.bool, device=tokens.keys.device)
        if tokens.real is not None:
            real = tokens.real.expand_as(real)
        # Blocks are counted among the tokens that count.
        order = (~real).long().argsort(dim=2, stable=True)
        counts = real.sum(2, keepdim=True)
        places = torch.arange(stored, device=order.device)
        scores = torch.ones(batch, heads, stored, device=order.device)
        blocks, lag = (stored - self.sink) // self.lag, self.lag
        if blocks > 1:
            end = self.sink + blocks * lag
            keys, values = (
                _lag_spread(take_rows(each, order)[:, :, self.sink : end].float().unflatten(2, (blocks, lag)))
                for each in (tokens.keys, tokens.values)
            )
            rank = (keys + values).argsort(dim=-1, stable=True).argsort(dim=-1).flatten(2) / lag
            judged = places[: rank.shape[2]] // lag < (counts - self.sink) // lag - 1
            scores[:, :, self.sink : end - lag] = rank.where(judged, 1.0)
        rising = torch.where(places < self.sink, 1.0, (places - self.sink) / (counts - self.sink).clamp_min(1))
        scores = torch.where(counts < self.sink + 2 * lag, rising, scores)
        return torch.zeros_like(scores).scatter_(2, order, scores)


def _lag_spread(blocks: Tensor) -> Tensor:
    """How much each token varies over its channels, as a share within its block.

    Args:
        blocks: [batch, heads, blocks, lag, channels].

    Returns:
        [batch, heads, blocks - 1, lag]: the last block has none behind it.
    """
    following, these = blocks[:, :, 1:], blocks[:, :, :-1]
    least, most = following.amin(3, keepdim=True), following.amax(3, keepdim=True)
    return ((these - least) / (most - least).clamp_min(1e-12)).std(-1).softmax(-1)
