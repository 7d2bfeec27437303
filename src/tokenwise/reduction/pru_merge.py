"""Patches whose attention is an outlier, with what is near them added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import parse_keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.reduction.merge import Mixture


def _parse(value: object) -> float | str:
    return "adaptive" if value == "adaptive" else parse_keep(value)


AdaptiveKeep = Annotated[
    float | str,
    BeforeValidator(_parse),
    Field(json_schema_extra={"range": '"adaptive", a share in (0, 1], or "N tokens"'}),
]

_PAPER = Paper(
    title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    arxiv="2403.15388",
    venue="ICCV 2025",
)


class PruMerge(InputReducer):
    """Keeps patches whose attention from the class token is an outlier, and adds their nearest patches to them.

    One more row is the sum of all patches that go; it takes the place of the one among them with the most attention.
    """

    card: ClassVar[Card] = Card(
        id="reduction/pru_merge",
        paper=_PAPER,
        needs=("a vision tower with a class token",),
        status="VERIFIED",
        checked="42Shawn/LLaVA-PruMerge, in the order of the patches; outliers of each image for itself, one at least, "
        "and none lost to rounding",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})
    merges: ClassVar[bool] = True
    before_projector: ClassVar[bool] = True

    keep: AdaptiveKeep = "adaptive"
    """What stays of each image's rows, the one more included; ``adaptive`` lets the outliers of each image decide."""
    neighbours: Annotated[int, Field(ge=1)] = 32
    """How many of the patches with the most similar keys are added to each."""
    layer: int = -1
    """Block of the vision tower whose queries and keys are read, from 0, or from the end with -1 for the last."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import Signal

        return Signal("class_row", self.layer, "one"), Signal("keys", self.layer, "one")

    def score(self, image: EncodedImage) -> Tensor:
        return image.signals[self.signals()[0]]

    def counts_of(self, images: list[EncodedImage]) -> list[int]:
        if self.keep != "adaptive":
            return super().counts_of(images)
        return [
            min(int(self._adaptive(self._attention(image)).sum() + (~image.patch).sum()) + 1, len(image.patch))
            for image in images
        ]

    def select(self, image: EncodedImage, count: int) -> Mixture:
        import torch

        from tokenwise.reduction.merge import Mixture
        from tokenwise.reduction.patches import patches, room, together

        rows = patches(image)
        most = room(image, count)
        attention, keys = self._attention(image), image.signals[self.signals()[1]][rows]
        if self.keep == "adaptive":
            stays = self._adaptive(attention)
        else:
            # One row is for the rest, unless it would be the only one.
            stays = torch.zeros_like(rows, dtype=torch.bool)
            stays[self._fixed(attention, max(most - 1, 1))] = True
        own = stays.nonzero()[:, 0]
        mixed = add_neighbours(attention, keys, own, min(self.neighbours, len(rows) - 1))
        if most > len(own):
            rest = attention.masked_fill(stays, 0)
            place = attention.masked_fill(stays, -torch.inf).argmax(dim=0, keepdim=True)
            own, mixed = torch.cat([own, place]), torch.cat([mixed, rest.unsqueeze(0)])
        kept = together(image, rows[own])
        mixing = torch.zeros(count, len(image.patch), device=rows.device).scatter(1, kept.T, 1)
        mixing[torch.searchsorted(kept[0], rows[own]).unsqueeze(1), rows] = mixed
        return Mixture(kept, mixing.unsqueeze(0))

    def _attention(self, image: EncodedImage) -> Tensor:
        return image.signals[self.signals()[0]][image.patch].float()

    def _adaptive(self, attention: Tensor) -> Tensor:
        """Which patches stay by themselves, [patches], bool."""
        return outliers(attention)

    def _fixed(self, attention: Tensor, count: int) -> Tensor:
        """The same where their number is given: their indices."""
        from tokenwise.policies.matching import largest

        return largest(attention.unsqueeze(0), count)[0]


class PruMergePlus(PruMerge):
    """As PruMerge, with patches at regular distances beside the outliers."""

    card: ClassVar[Card] = Card(
        id="reduction/pru_merge_plus",
        paper=_PAPER,
        needs=("a vision tower with a class token",),
        status="VERIFIED",
        checked="42Shawn/LLaVA-PruMerge, as PruMerge; the division of a fixed budget (a quarter by attention, as it is "
        "on average in the adaptive one) is ours",
        control="reduction/random",
    )

    def _adaptive(self, attention: Tensor) -> Tensor:
        import torch

        stays = outliers(attention)
        # Three patches of the grid for each outlier; the last patch never is one of them.
        step = max(int(1 / (int(stays.sum()) / len(stays))) // 3, 1)
        index = torch.arange(len(stays), device=stays.device)
        return stays | ((index % step == 0) & (index < len(stays) - 1))

    def _fixed(self, attention: Tensor, count: int) -> Tensor:
        import torch

        from tokenwise.policies.resampling import evenly

        chosen = super()._fixed(attention, max(round(count / 4), 1))
        rest = torch.ones_like(attention, dtype=torch.bool).index_fill(0, chosen, False).nonzero()[:, 0]
        return torch.cat([chosen, rest[evenly(len(rest), count - len(chosen)).to(rest.device)]])


def outliers(values: Tensor) -> Tensor:
    """Which of some values are far above the rest: by 1.5 times the distance of the quartiles above the third.

    Args:
        values: [values].

    Returns:
        [values], bool; the largest (of equal ones the first) where there is no such value.
    """
    import torch

    quartiles = values.quantile(torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))
    first, third = quartiles.unbind()
    found = values > third + 1.5 * (third - first)
    if not bool(found.any()):
        found[values.argmax()] = True
    return found


def add_neighbours(attention: Tensor, keys: Tensor, chosen: Tensor, neighbours: int) -> Tensor:
    """Each chosen patch plus the attention-weighted sum of its nearest, as weights of all patches.

    Args:
        attention: [patches].
        keys: [patches, channels]; the nearest are those with the largest cosine, chosen ones included.
        chosen: indices, [chosen].
        neighbours: how many are added to each.

    Returns:
        [chosen, patches].
    """
    import torch

    from tokenwise.policies.matching import normalized

    unit = normalized(keys)
    similarity = (unit[chosen] @ unit.T).scatter(1, chosen.unsqueeze(1), -torch.inf)
    nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, :neighbours]
    weights = torch.zeros_like(similarity).scatter(1, nearest, attention[nearest].to(similarity.dtype))
    return weights.scatter(1, chosen.unsqueeze(1), 1)
