"""Much in the first layers, little in the last."""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenwise.cache.snap_kv import SnapKV
from tokenwise.method import Card, Paper


class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, more of it in the first layers and less in each that follows.

    The defaults are those of the authors' class; their runs read 8 queries.
    """

    card: ClassVar[Card] = Card(
        id="cache/pyramid_kv",
        paper=Paper(
            title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
            arxiv="2406.02069",
        ),
        status="VERIFIED",
        checked="the tokens that the authors' code keeps where its steps are whole: it rounds them down, here they "
        "add up to the budget; and its counts are even where a prompt is shorter than twice the budget",
        control="cache/random",
    )

    allocate: Literal["evenly", "pyramid", "heads", "layers_and_heads"] = "pyramid"
    """How the budget is shared out: as much to every head; less to later layers; or to the best tokens of all heads of
    a layer, or of all layers and heads."""
