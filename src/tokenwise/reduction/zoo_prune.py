"""Patches that the projector is sensitive to, and that differ from each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.reduction.merge import Merge


class ZooPrune(InputReducer):
    """Keeps patches one by one by the projector's sensitivity to them times their distance to those already kept.

    Costs two projections of the image for each direction. A linear projector is as sensitive to each patch: then the
    distance alone decides.
    """

    card: ClassVar[Card] = Card(
        id="reduction/zoo_prune",
        paper=Paper(
            title="ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language "
            "Models",
            arxiv="2509.24837",
            venue="CVPR 2026",
        ),
        needs=("a projector that reads each patch by itself",),
        status="RECONSTRUCTION",
        checked="the paper's formulas, of which there is no official code, and the projector's Jacobian; that "
        "sensitivities within a thousandth count as equal is ours",
        control="reduction/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"projector"})

    keep: Keep = 0.111
    """What stays of each image's rows."""
    directions: Annotated[int, Field(ge=1)] = 64
    """Directions in which the projector's inputs are moved."""
    step: Annotated[float, Field(gt=0)] = 0.01
    """How far they are moved."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the directions; the same for every image."""

    def signals(self) -> tuple[Signal, ...]:
        from tokenwise.models.vision_language import PROJECTOR_INPUTS

        return (PROJECTOR_INPUTS,)

    def select(self, image: EncodedImage, count: int) -> Merge:
        import torch

        from tokenwise.policies.diversity import cosine_distance, farthest_first
        from tokenwise.reduction.merge import keep_only
        from tokenwise.reduction.patches import patches, room, together
        from tokenwise.signals.sensitivity import sensitivity

        assert image.projector is not None
        [signal] = self.signals()
        rows = patches(image)
        inputs = image.signals[signal][rows]
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        found = sensitivity(_in_type(image.projector, inputs), inputs, self.directions, self.step, self.seed)
        low, high = found.aminmax()
        flat = high - low <= 1e-3 * high
        weights = torch.where(flat, torch.ones_like(found), (found - low) / (high - low))
        start = None if bool(flat) else weights.argmax()
        distance = cosine_distance(image.features[rows].detach())
        return keep_only(together(image, rows[farthest_first(distance, room(image, count), start, weights)]))


def _in_type(projector: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The projector as a function in the type of `inputs`."""
    from torch.func import functional_call

    tensors = {name: tensor.to(inputs.dtype) for name, tensor in projector.state_dict().items()}
    return lambda values: functional_call(projector, tensors, (values,))
