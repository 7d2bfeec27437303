"""Patches that differ from all that are kept, beginning with the one that matters most."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.reduction.merge import Merge


class ToDRE(InputReducer):
    """Keeps patches one by one, each the one least similar to all kept together, from the one with most attention on.

    The paper's first stage; tiled images begin in the overview.
    """

    card: ClassVar[Card] = Card(
        id="reduction/to_dre",
        paper=Paper(
            title="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arxiv="2505.18757"
        ),
        needs=("a vision tower with a class token",),
        status="RECONSTRUCTION",
        checked="the paper's formulas, of which there is no official code",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})

    keep: Keep = 0.1
    """What stays of each image's rows."""
    rule: Literal["sum", "nearest"] = "sum"
    """Which patch differs most: by the ``sum`` of its distances to all kept, or by the distance to the ``nearest`` of
    them (k-center, the paper's first version)."""
    layer: int = -1
    """Block of the vision tower whose attention chooses the first, from 0, or from the end with -1 for the last."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import Signal

        return (Signal("class_row", self.layer, "one"),)

    def select(self, image: EncodedImage, count: int) -> Merge:
        from tokenwise.policies.diversity import cosine_distance, farthest_first, largest_sum
        from tokenwise.reduction.merge import keep_only
        from tokenwise.reduction.patches import patches, room, tiles, together

        [signal] = self.signals()
        rows = patches(image)
        first = tiles(image)[0]
        start = (rows == first[image.signals[signal][first].argmax()]).nonzero()[0, 0]
        choose = largest_sum if self.rule == "sum" else farthest_first
        distance = cosine_distance(image.features[rows].detach())
        return keep_only(together(image, rows[choose(distance, room(image, count), start)]))
