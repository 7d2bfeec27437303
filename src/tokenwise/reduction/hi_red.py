"""A budget for each tile of a picture, by where the overview is looked at."""

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


class HiRED(InputReducer):
    """Keeps patches with the most attention from the class token, in tiles that the overview's first block looks at.

    For models that read a picture as an overview and tiles. A picture that is one tile has nothing to share out: there
    it keeps the patches with the most attention, as FasterVLM does. Newlines go.
    """

    card: ClassVar[Card] = Card(
        id="reduction/hi_red",
        paper=Paper(
            title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language "
            "Models",
            arxiv="2408.10945",
            venue="AAAI 2025",
        ),
        needs=("a vision tower with a class token",),
        status="VERIFIED",
        checked="hasanar1f/HiRED on stacked tiles (it takes horizontal bands for the regions of every grid), with the "
        "remainders that it loses shared out",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})

    keep: Keep = 0.2
    """What stays of each image's rows; its newlines count among them and go first."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of what stays that is the overview's."""
    layer: int = -2
    """Block of the vision tower whose attention chooses the patches, from 0, or from the end with -1 for the last."""
    budget_layer: int = 0
    """Block whose attention shares the budget out."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import Signal

        return Signal("class_row", self.layer), Signal("class_row", self.budget_layer)

    def score(self, image: EncodedImage) -> Tensor:
        return image.signals[self.signals()[0]]

    def counts_of(self, images: list[EncodedImage]) -> list[int]:
        counts = zip(images, super().counts_of(images), strict=True)
        return [count if count == len(image.patch) else min(count, int(image.patch.sum())) for image, count in counts]

    def select(self, image: EncodedImage, count: int) -> Merge:
        import torch

        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import keep_only
        from tokenwise.reduction.patches import tiles

        attention, early = (image.signals[signal] for signal in self.signals())
        groups = tiles(image)
        sizes = [len(rows) for rows in groups]
        counts = [count]
        if len(groups) > 1:
            counts = tile_budgets(early[groups[0]], sizes, self._grid(image, sizes), count, self.alpha)
        chosen = [
            rows[largest(attention[rows].unsqueeze(0), most)[0]] for rows, most in zip(groups, counts, strict=True)
        ]
        return keep_only(torch.cat(chosen).sort().values.unsqueeze(0))

    def _grid(self, image: EncodedImage, sizes: list[int]) -> tuple[int, int]:
        from tokenwise.errors import InputError, Problem

        grid = image.tile_grid
        if grid is None or grid[0] * grid[1] != len(sizes) - 1:
            message = f"it is not known where the {len(sizes) - 1} tiles of an image lie in its overview."
            raise InputError(Problem("model", message, "Use faster_vlm, which shares no budget out."))
        return grid


def tile_budgets(early: Tensor, sizes: list[int], grid: tuple[int, int], count: int, alpha: float) -> list[int]:
    """How many patches stay of the overview and of each tile.

    Args:
        early: attention that the overview's patches get, a square of them, [patches].
        sizes: patches of the overview and of each tile.
        grid: (rows, columns) of the tiles.
        count: of all.
        alpha: share of the overview; the share of its patches with the least attention does not count for the tiles.

    Returns:
        As `sizes`; the whole adds up to `count` where there are as many patches.
    """
    import math

    from tokenwise.policies.apportion import apportion
    from tokenwise.policies.matching import largest

    side = math.isqrt(len(early))
    whole = min(int(count * alpha), sizes[0])
    # What the tiles cannot take, the overview can.
    whole = max(whole, count - sum(sizes[1:]))
    looked_at = largest(early.unsqueeze(0), int(len(early) * (1 - alpha)))[0]
    tile = looked_at // side * grid[0] // side * grid[1] + looked_at % side * grid[1] // side
    weights = tile.bincount(minlength=grid[0] * grid[1]).tolist()
    return [whole, *apportion(count - whole, weights, sizes[1:])]
