"""How many stay when the scores themselves say: up to the bend of their sorted curve."""

from __future__ import annotations

import torch
from torch import Tensor


def above_elbow(scores: Tensor) -> Tensor:
    """Which scores lie above the elbow: the point of the falling curve farthest from the line between its ends.

    Args:
        scores: [units]; larger matters more.

    Returns:
        Boolean mask [units] of those strictly larger than the score at the elbow; all of them where the curve has no
        bend. Of equally far points the first is the elbow.
    """
    falling = scores.double().sort(descending=True).values
    if len(falling) < 3:
        return torch.ones_like(scores, dtype=torch.bool)
    along = torch.linspace(0, 1, len(falling), dtype=falling.dtype, device=falling.device)
    gap = (falling - falling[0] - along * (falling[-1] - falling[0])).abs()
    stays = scores.double() > falling[gap.argmax()]
    return stays if bool(stays.any()) else torch.ones_like(stays)
