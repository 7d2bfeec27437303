"""Patches that attention gathers on: in a middle block with their neighbours, and in a late one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.reduction.merge import Merge


class HiPrune(InputReducer):
    """Keeps patches that receive attention in a middle block, with their neighbours, and others that do in a late one.

    Needs no class token. Each tile of a tiled image gets as many patches.
    """

    card: ClassVar[Card] = Card(
        id="reduction/hi_prune",
        paper=Paper(
            title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
            arxiv="2508.00553",
        ),
        status="VERIFIED",
        checked="Danielement321/HiPrune (the neighbours of patches at the edge of the picture included)",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    keep: Keep = 0.334
    """What stays of each image's rows."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of what stays that are patches chosen in the middle block and their neighbours."""
    object_layer: int = 8
    """The middle block of the vision tower, from 0, or from the end with -1 for the last."""
    layer: int = -2
    """The late block."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import Signal

        return Signal("columns", self.object_layer), Signal("columns", self.layer)

    def select(self, image: EncodedImage, count: int) -> Merge:
        import torch

        from tokenwise.policies.apportion import apportion
        from tokenwise.reduction.merge import keep_only
        from tokenwise.reduction.patches import room, tiles, together, width

        middle, late = (image.signals[signal] for signal in self.signals())
        groups = tiles(image)
        counts = apportion(room(image, count), [1] * len(groups), [len(rows) for rows in groups])
        chosen = [
            rows[anchors_and_registers(middle[rows], late[rows], most, self.alpha, width(image, rows))]
            for rows, most in zip(groups, counts, strict=True)
        ]
        return keep_only(together(image, torch.cat(chosen)))


def anchors_and_registers(middle: Tensor, late: Tensor, count: int, alpha: float, width: int | None) -> Tensor:
    """Anchors, the largest of `middle`, with the patches beside, above and below, and the largest of `late`.

    Left and right are the patch before and after, also where that is on another line; at the first and the last patch
    they end.

    Args:
        middle: [patches].
        late: [patches].
        count: of all.
        alpha: share that anchors and their neighbours make at most.
        width: patches in a line; None takes no patch above or below.

    Returns:
        Indices in rising order, [count], int64.
    """
    import torch

    from tokenwise.policies.matching import largest

    # Five patches stand together; where rounding up would exceed the budget, one group fewer.
    groups = min(round(count * alpha / 5), count // 5)
    anchors = largest(middle.unsqueeze(0), groups)[0]
    steps = torch.tensor([0, -1, 1] if width is None else [0, -1, 1, -width, width], device=middle.device)
    first = (anchors.unsqueeze(1) + steps).clamp(0, len(middle) - 1).flatten()
    return largest(late.float().index_fill(0, first, torch.inf).unsqueeze(0), count)[0]
