"""The cache as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card

if TYPE_CHECKING:
    from torch import Tensor


class Full(CachePolicy):
    """Evicts nothing: the cache as it is, which comparisons measure the others against."""

    card: ClassVar[Card] = Card(id="cache/full", status="VERIFIED", checked="its definition")

    keep: Annotated[float, Field(ge=1, le=1)] = 1.0
    """All of it stays."""

    def score(self, tokens: StoredTokens) -> Tensor:
        return tokens.positions.float()
