"""Patches by the attention of the class token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.reduction.merge import Merge


class FasterVLM(InputReducer):
    """Keeps the patches that the vision tower's class token attends to most."""

    card: ClassVar[Card] = Card(
        id="reduction/faster_vlm",
        paper=Paper(
            title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
            arxiv="2412.01818",
        ),
        needs=("a vision tower with a class token",),
        status="VERIFIED",
        checked="the eager attention map of the same layer",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})

    keep: Keep = 0.5
    """What stays of each image's patches."""
    layer: int = -2
    """Block of the vision tower whose attention is read, from 0, or from the end with -1 for the last."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import Signal

        return (Signal("class_row", self.layer),)

    def score(self, image: EncodedImage) -> Tensor:
        [signal] = self.signals()
        # Rows that are no patches, such as newlines, stay.
        return image.signals[signal].nan_to_num(float("inf"))

    def select(self, image: EncodedImage, count: int) -> Merge:
        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import keep_only

        return keep_only(largest(self.score(image).unsqueeze(0), count))
