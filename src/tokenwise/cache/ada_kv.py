"""Heads that need more get more."""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenwise.cache.snap_kv import SnapKV
from tokenwise.method import Card, Paper


class AdaKV(SnapKV):
    """Keeps the best tokens of all heads of a layer together, by SnapKV's scores: some heads store more than others."""

    card: ClassVar[Card] = Card(
        id="cache/ada_kv",
        paper=Paper(
            title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
            arxiv="2407.11550",
            venue="NeurIPS 2025",
        ),
        status="VERIFIED",
        checked="what heads keep against a plain allocation and kvpress 0.5.5; the authors' code mixes the counts of "
        "heads with the floor instead",
        control="cache/random",
    )

    allocate: Literal["evenly", "pyramid", "heads", "layers_and_heads"] = "heads"
    """How the budget is shared out: as much to every head; less to later layers; or to the best tokens of all heads of
    a layer, or of all layers and heads."""
