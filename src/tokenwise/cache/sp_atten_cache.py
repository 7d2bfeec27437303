"""What has been looked at in all layers so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tokenwise.cache.base import StoredTokens
from tokenwise.cache.h2o import H2O
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class SpAttenCache(H2O):
    """Keeps what all heads of all layers so far have attended to most; what one layer evicts, all later ones do."""

    card: ClassVar[Card] = Card(
        id="cache/sp_atten_cache",
        paper=Paper(
            title="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
            arxiv="2012.09852",
            venue="HPCA 2021",
        ),
        status="RECONSTRUCTION",
        checked="the importance against sums over whole attention maps in fp64; the counts of the layers, that the "
        "prompt itself is read whole, and that half of the budget goes to the last tokens are ours; heads, "
        "values and bits are not pruned; the authors' code for language models is another method: it ranks by "
        "the scores of the last step before their softmax, in each layer alone",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"received", "earlier"})

    allocate: Literal["evenly", "pyramid"] = "pyramid"
    """How the budget is shared out: as much to every layer, which then all keep the same tokens; or less to later
    layers. While generating, a layer that must not keep what an earlier one evicted may store fewer than its share."""

    def score(self, tokens: StoredTokens) -> Tensor:
        importance = tokens.by_position(tokens.tracks["received"])
        if "importance" in tokens.earlier:
            importance = importance + tokens.earlier["importance"].to(importance.device)
        tokens.earlier["importance"] = importance
        places = tokens.positions.flatten(1)
        found = importance.gather(1, places).view_as(tokens.positions)
        if "kept" in tokens.earlier:
            gone = ~tokens.earlier["kept"].to(places.device).gather(1, places).view_as(tokens.positions)
            found = found.masked_fill(gone, float("-inf"))
        return found
