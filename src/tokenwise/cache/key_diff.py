"""Keys unlike the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class KeyDiff(CachePolicy):
    """Keeps the tokens whose keys point elsewhere than keys do as a mean."""

    card: ClassVar[Card] = Card(
        id="cache/key_diff",
        paper=Paper(
            title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
            "Resource-Constrained Environments",
            arxiv="2504.15364",
            venue="NeurIPS 2025",
        ),
        status="VERIFIED",
        checked="the numbers of kvpress 0.5.5",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"keys"})
    ordered: ClassVar[bool] = False

    def score(self, tokens: StoredTokens) -> Tensor:
        from torch.nn.functional import normalize

        directions = normalize(tokens.keys.float(), dim=-1)
        if tokens.real is None:
            mean = directions.mean(2, keepdim=True)
        else:
            real = tokens.real.unsqueeze(3)
            mean = (directions * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
        return -(directions * normalize(mean, dim=-1)).sum(-1)
