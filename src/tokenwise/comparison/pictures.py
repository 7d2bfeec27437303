"""What a reduction kept of an image, drawn over it."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tokenwise.models.images import ImageInputs

WIDTH = 224
"""Drawings are at least so many pixels wide."""
_GREY = 128.0
_DIMMED, _MIXED = 0.12, 0.3
"""How much of the image is left where patches were dropped, and where they were merged."""


def picture_of(handle: Any, model: Any, inputs: ImageInputs, pixels: Tensor, place: int) -> dict[str, Any] | None:
    """An image of the last pass of an encoder's reduction, with what was kept, as plain values.

    Args:
        handle: the reduction.
        model: the model it acts on.
        inputs: what made the pixels.
        pixels: of the pass, [images, 3, height, width].
        place: which of them.

    Returns:
        ``image``: what the model saw, as PNG in base64; ``grid``: rows and columns of patches; ``group``: for each
        patch the token it ended in, -1 where it was dropped; None where tokens are not a plain grid.
    """
    from tokenwise.models.images import patch_grid

    prefix = handle.encoder.prefix
    group = handle.last.group[place, prefix:].tolist()
    grid = patch_grid(model, pixels, len(group))
    if grid is None:
        return None
    from PIL import Image

    seen = Image.fromarray(inputs.shown(pixels[place]))
    return {"image": encode(seen), "grid": list(grid), "group": group}


def selected(kept: Tensor, patches: int) -> Tensor:
    """The group of each patch, [patches], where those at `kept` stay and the others are dropped."""
    import torch

    places = torch.arange(len(kept), device=kept.device)
    return torch.full((patches,), -1, device=kept.device).index_copy_(0, kept, places)


def selection_of(group: Tensor, model: Any, pixels: Tensor, image: Image) -> dict[str, Any] | None:
    """As `picture_of`, of an image that a language model reads.

    Args:
        group: for each of its rows the token it ended in, -1 where it was dropped, [patches].
        model: a vision-language model.
        pixels: what its vision tower read, [1, 3, height, width].
        image: what they were made of.
    """
    from tokenwise.models.images import patch_grid

    grid = patch_grid(model, pixels, len(group))
    if grid is None:
        return None
    seen = image.convert("RGB").resize((pixels.shape[-1], pixels.shape[-2]))
    return {"image": encode(seen), "grid": list(grid), "group": group.tolist()}


def draw(picture: dict[str, Any]) -> Image:
    """The image with dropped patches greyed out, and merged ones in their mean colour with a border around them."""
    from PIL import Image

    seen = Image.open(io.BytesIO(base64.b64decode(picture["image"]))).convert("RGB")
    return Image.fromarray(_drawn(np.asarray(seen), tuple(picture["grid"]), np.array(picture["group"])))


def _drawn(image: NDArray[np.uint8], grid: tuple[int, int], group: NDArray[np.int64]) -> NDArray[np.uint8]:
    scale = max(1, math.ceil(WIDTH / image.shape[1]))
    whole = image.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.float64)
    rows = np.arange(whole.shape[0]) * grid[0] // whole.shape[0]
    columns = np.arange(whole.shape[1]) * grid[1] // whole.shape[1]
    where = group.reshape(grid)[rows[:, None], columns]
    drawn = whole.copy()
    names, counts = np.unique(group, return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        mine = where == name
        if name < 0:
            drawn[mine] = _DIMMED * whole[mine].mean(axis=1, keepdims=True) + (1 - _DIMMED) * _GREY
        elif count > 1:
            drawn[mine] = _MIXED * whole[mine] + (1 - _MIXED) * whole[mine].mean(axis=0)
    merged = np.isin(where, names[(counts > 1) & (names >= 0)])
    border = np.zeros(where.shape, dtype=bool)
    border[:, 1:] |= (where[:, 1:] != where[:, :-1]) & (merged[:, 1:] | merged[:, :-1])
    border[1:] |= (where[1:] != where[:-1]) & (merged[1:] | merged[:-1])
    drawn[border] = 0.25 * drawn[border] + 0.75 * 255
    return np.clip(np.rint(drawn), 0, 255).astype(np.uint8)


def encode(image: Image) -> str:
    """A picture as PNG in base64."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
