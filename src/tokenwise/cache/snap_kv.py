"""What the end of the prompt looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"is even, and as many tokens are read on either side; write {value - 1} or {value + 1}")
    return value


class SnapKV(CachePolicy):
    """Keeps what the last queries of the prompt attend to, smoothed over neighbours."""

    card: ClassVar[Card] = Card(
        id="cache/snap_kv",
        paper=Paper(title="SnapKV: LLM Knows What You are Looking for Before Generation", arxiv="2404.14469"),
        status="VERIFIED",
        checked="the tokens that the authors' code keeps, and the numbers of kvpress 0.5.5, which averages over heads "
        "that share keys",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"window"})

    queries: Annotated[int, Field(ge=1)] = 64
    """The last queries whose attention is read; a shorter prompt has all of them read."""
    kernel: Annotated[int, Field(ge=1), AfterValidator(_odd)] = 5
    """Tokens over which scores are averaged; odd."""

    @property
    def window(self) -> int:
        return self.queries

    def score(self, tokens: StoredTokens) -> Tensor:
        from torch.nn.functional import avg_pool1d

        rows, asked = tokens.window_rows(), tokens.notes.get("asked")
        found = rows.mean((2, 3))
        if asked is not None:
            # A mean over the queries there are.
            found *= (asked.shape[1] / asked.sum(1).clamp_min(1)).view(-1, 1, 1)
        # The window stays anyway: what it looks at within itself is not spread to those before it.
        found = found.masked_fill(tokens.positions >= tokens.seen - self.window, 0)
        return avg_pool1d(found, self.kernel, stride=1, padding=self.kernel // 2)
