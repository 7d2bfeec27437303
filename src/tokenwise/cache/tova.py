"""What the last token looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall


class TOVA(CachePolicy):
    """Keeps what the last token attends to, as a mean over all heads, so that a layer's heads store the same.

    The last token may go, too, where it attends to others more than to itself; `recent` keeps it.
    """

    card: ClassVar[Card] = Card(
        id="cache/tova",
        paper=Paper(title="Transformers are Multi-State RNNs", arxiv="2401.06104", venue="EMNLP 2024"),
        status="VERIFIED",
        checked="the tokens kept and the logits of the authors' code while it generates, the formula in fp64, and the "
        "scores of kvpress 0.5.5, which keeps the last token in any case",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"last"})
    ordered: ClassVar[bool] = False

    interval: Annotated[int, Field(ge=1)] | None = 1
    """Evict while generating, too, every so many tokens; None: only when a prompt, or a part of one, has been read."""

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        import torch

        last = call.query.shape[2] - 1
        row = call.rows(torch.tensor([last], device=call.query.device))[:, :, 0] if last else call.columns()
        tokens.tracks["looked_at"] = tokens.over_queries(row).mean(2)

    def score(self, tokens: StoredTokens) -> Tensor:
        return tokens.summed_over_heads(tokens.tracks["looked_at"]) / tokens.keys.shape[1]
