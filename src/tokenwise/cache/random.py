"""Chance, the control of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card

if TYPE_CHECKING:
    from torch import Tensor


class Random(CachePolicy):
    """Keeps tokens by chance, in each head others: the control."""

    card: ClassVar[Card] = Card(
        id="cache/random", status="VERIFIED", checked="counts and determinism by property tests"
    )

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the random numbers."""

    def score(self, tokens: StoredTokens) -> Tensor:
        import torch

        generator = torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + tokens.layer * 1009 + tokens.seen)
        batch, heads = tokens.keys.shape[:2]
        # A number for each token seen, so that chance does not depend on what is stored beside it.
        found = torch.rand(batch, heads, tokens.seen, generator=generator).to(tokens.keys.device)
        return found.gather(2, tokens.positions.expand(-1, heads, -1))
