"""Heads that need more get more."""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenwise.cache.snap_kv import SnapKV
from tokenwise.method import Card, Paper


class AdaKV(SnapKV):
    """Lets the heads of a layer share its budget by how many of its best tokens each has, by SnapKV's scores.

    `floor` of the budget is shared evenly. The authors' runs read 32 queries and smooth by the largest of 7 neighbours,
    where this one scores as SnapKV does, so that both can be compared.
    """

    card: ClassVar[Card] = Card(
        id="cache/ada_kv",
        paper=Paper(
            title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
            arxiv="2407.11550",
            venue="NeurIPS 2025",
        ),
        status="VERIFIED",
        checked="the tokens that the authors' code keeps, which rounds the count of each head by itself: here they "
        "add up to the budget; kvpress 0.5.5 gives the floor alone to a head that has fewer, and all else to "
        "the best tokens",
        control="cache/random",
    )

    allocate: Literal["evenly", "pyramid", "heads", "layers_and_heads"] = "heads"
    """How the budget is shared out: as much to every head; less to later layers; or to the best tokens of all heads of
    a layer, or of all layers and heads."""
