"""What changes the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from tokenwise.cache.base import StoredTokens
from tokenwise.cache.snap_kv import SnapKV
from tokenwise.errors import Problem
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor


class CriticalKV(SnapKV):
    """Keeps first what SnapKV finds, and then what also has a value that the output projection makes large."""

    card: ClassVar[Card] = Card(
        id="cache/critical_kv",
        paper=Paper(
            title="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
            arxiv="2502.03805",
        ),
        needs=("attention with an output projection that is not quantized",),
        status="VERIFIED",
        checked="the formula in fp64, and the numbers of kvpress 0.5.5",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"window", "values"})

    first: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the budget that goes to the best scores alone, protected tokens among them."""
    epsilon: Annotated[float, Field(ge=0)] = 1e-4
    """What is added to the scores before they are multiplied."""

    def refuses(self, module: Any) -> Problem | None:
        from tokenwise.models.decoders import output_projection

        if output_projection(module) is not None:
            return None
        return Problem(
            "model",
            f"{type(module).__name__} has no output projection with a plain weight (o_proj, out_proj or dense).",
            "Use snap_kv, or load the model without quantization.",
        )

    def score(self, tokens: StoredTokens) -> Tensor:
        import torch

        from tokenwise.models.decoders import output_projection
        from tokenwise.signals.projected_values import projected_value_norms

        projection = output_projection(tokens.module)
        assert projection is not None
        found = super().score(tokens)
        ranked = found.masked_fill(self.protected(tokens), float("inf"))
        if tokens.real is not None:
            ranked = ranked.masked_fill(~tokens.real, float("-inf"))
        rank = ranked.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        count = torch.tensor([int(count * self.first) for count in tokens.counts], device=rank.device).view(-1, 1, 1)
        changed = (found + self.epsilon) * projected_value_norms(tokens.values, projection)
        return changed.masked_fill(rank < count, torch.finfo(changed.dtype).max)
