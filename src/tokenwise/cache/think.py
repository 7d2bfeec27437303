"""Fewer channels of each key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tokenwise.cache.base import StoredTokens
from tokenwise.cache.snap_kv import SnapKV
from tokenwise.method import Card, Paper
from tokenwise.policies.budget import KeepOrBytes, kept_count

if TYPE_CHECKING:
    from torch import Tensor


class ThinK(SnapKV):
    """Keeps of each key the channels that weigh most in its products with queries, and of the tokens what SnapKV does.

    Channels are chosen once, when the first prompt has been read; keys that follow are stored with the same.
    """

    card: ClassVar[Card] = Card(
        id="cache/think",
        paper=Paper(title="ThinK: Thinner Key Cache by Query-Driven Pruning", arxiv="2407.21018", venue="ICLR 2025"),
        status="VERIFIED",
        checked="the channels that the authors' code and kvpress 0.5.5 choose; as in kvpress all keys lose channels, "
        "where the authors' code leaves the last 32 and those that follow whole, and chooses by the keys that "
        "stay where tokens go, too",
        control="cache/random",
    )
    dense_at_full: ClassVar[bool] = False

    keep: KeepOrBytes = 1.0
    """What stays of the tokens seen, in each layer and head, as a mean; or memory for the keys and values of the whole
    batch before channels are dropped."""
    channels: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the channels of each key that stays."""
    queries: Annotated[int, Field(ge=1)] = 32
    """The last queries that are read; a shorter prompt has all of them read."""
    positions: Literal["original"] = "original"
    """Tokens keep their positions: a key without all of its channels cannot be turned."""

    def key_channels(self, tokens: StoredTokens) -> Tensor:

        queries = tokens.over_queries(tokens.notes["queries"].float()).square()
        asked = tokens.notes.get("asked")
        if asked is not None:
            queries = queries * asked[:, None, None, :, None]
        keys = tokens.keys.float().square()
        if tokens.real is not None:
            keys = keys * tokens.real.unsqueeze(3)
        # Sums rank as means do.
        weights = queries.sum((2, 3)) * keys.sum(2)
        count = kept_count(self.channels, weights.shape[2])
        return weights.argsort(dim=2, descending=True, stable=True)[..., :count].sort(dim=2).values
