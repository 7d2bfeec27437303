"""Dominant patches, and the context of the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.reduction.merge import Mixture


class VisionZip(InputReducer):
    """Keeps the patches that the class token attends to most, and merges the others into a few by their keys.

    Each merged patch takes the place of one patch, and each tile of a tiled image gets as many. The class token itself
    is passed on only by models that do so anyway.
    """

    card: ClassVar[Card] = Card(
        id="reduction/vision_zip",
        paper=Paper(
            title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
            arxiv="2412.04467",
            venue="CVPR 2025",
        ),
        needs=("a vision tower with a class token",),
        status="VERIFIED",
        checked="dvlab-research/VisionZip, without its class token and in the order of the patches",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})
    merges: ClassVar[bool] = True
    before_projector: ClassVar[bool] = True

    keep: Keep = 0.111
    """What stays of each image's rows, merged ones included."""
    contextual: Annotated[float, Field(ge=0, lt=1)] = 0.15625
    """Share of what stays that is merged of the patches that are not dominant."""
    average: bool = False
    """Whether a merged patch is the mean of all that go into it. The paper adds the mean of those assigned to a patch
    to that patch, which makes it about twice as long."""
    layer: int = -2
    """Block of the vision tower whose attention and keys are read, from 0, or from the end with -1 for the last."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import Signal

        return Signal("class_row", self.layer, "sum"), Signal("keys", self.layer)

    def score(self, image: EncodedImage) -> Tensor:
        return image.signals[self.signals()[0]]

    def select(self, image: EncodedImage, count: int) -> Mixture:
        import torch

        from tokenwise.policies.apportion import apportion
        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import Mixture
        from tokenwise.reduction.patches import room, tiles, together

        attention, keys = (image.signals[signal] for signal in self.signals())
        groups = tiles(image)
        counts = apportion(room(image, count), [1] * len(groups), [len(rows) for rows in groups])
        chosen, merged = [], []
        for rows, most in zip(groups, counts, strict=True):
            contextual = 0 if most in (0, len(rows)) else min(math.floor(most * self.contextual + 0.5), most - 1)
            dominant = largest(attention[rows].unsqueeze(0), most - contextual)[0]
            rest = torch.ones_like(rows, dtype=torch.bool).index_fill(0, dominant, False)
            chosen.append(rows[dominant])
            if contextual:
                rest = rows[rest]
                target, others, assigned = context(keys[rest], contextual)
                chosen.append(rest[target])
                merged.append((rest[target], rest[others], assigned))
        kept = together(image, torch.cat(chosen))
        place = torch.full_like(image.patch, -1, dtype=torch.long).index_copy(0, kept[0], torch.arange(count).to(kept))
        mixing = torch.zeros(count, len(image.patch), device=kept.device)
        mixing[place[kept[0]], kept[0]] = 1
        for target, others, assigned in merged:
            into = place[target[assigned]]
            members = torch.zeros(count, device=kept.device).index_add(
                0, into, torch.ones_like(into, dtype=torch.float)
            )
            share = 1 / (members + 1 if self.average else members.clamp_min(1))
            mixing[into, others] = share[into]
            if self.average:
                mixing[place[target], target] = share[place[target]]
        return Mixture(kept, mixing.unsqueeze(0))


def context(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every so manieth patch as a target, and for each other one the target with the most similar keys.

    Args:
        keys: [patches, channels]; similarity is the cosine.
        count: of targets.

    Returns:
        The targets [count], the others [patches - count], and for each of those the place of its target among the
        targets; of equally similar ones the first.
    """
    import torch

    from tokenwise.policies.matching import normalized

    keys = normalized(keys)
    target = torch.arange(0, len(keys), max(1, len(keys) // count), device=keys.device)[:count]
    others = torch.ones(len(keys), dtype=torch.bool, device=keys.device).index_fill(0, target, False).nonzero()[:, 0]
    return target, others, (keys[others] @ keys[target].T).argmax(dim=1)
