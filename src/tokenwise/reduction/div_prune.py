"""Patches that differ from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from tokenwise.models.vision_language import EncodedImage
    from tokenwise.reduction.merge import Merge


class DivPrune(InputReducer):
    """Keeps patches one by one, each the one least similar to those already kept."""

    card: ClassVar[Card] = Card(
        id="reduction/div_prune",
        paper=Paper(
            title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
            arxiv="2503.02175",
            venue="CVPR 2025",
        ),
        status="VERIFIED",
        checked="vbdi/divprune (of equal patches one is chosen once; there it may be chosen twice)",
        control="reduction/random",
    )

    keep: Keep = 0.098
    """What stays of each image's rows."""

    def select(self, image: EncodedImage, count: int) -> Merge:
        from tokenwise.policies.diversity import cosine_distance, farthest_first
        from tokenwise.reduction.merge import keep_only
        from tokenwise.reduction.patches import patches, room, together

        rows = patches(image)
        distance = cosine_distance(image.features[rows].detach())
        return keep_only(together(image, rows[farthest_first(distance, room(image, count))]))
