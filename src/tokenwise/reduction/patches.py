"""The rows of an image that are patches: how many fit, tile by tile, and what stays beside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from tokenwise.errors import InputError, Problem

if TYPE_CHECKING:
    from tokenwise.models.vision_language import EncodedImage


def patches(image: EncodedImage) -> Tensor:
    """The rows that are patches, [patches], int64."""
    return image.patch.nonzero()[:, 0]


def room(image: EncodedImage, count: int) -> int:
    """How many patches stay when `count` rows do, those that are no patches among them.

    Raises:
        InputError: when none does.
    """
    others = int((~image.patch).sum())
    if count <= others:
        raise InputError(
            Problem(
                "keep",
                f"{count} rows of an image of which {others} are no patches (newlines, class token) leave no patch.",
                f"Keep more than {others}, or use a method that drops them (hi_red).",
            )
        )
    return count - others


def together(image: EncodedImage, chosen: Tensor) -> Tensor:
    """Some patches and every row that is none, in rising order, [1, rows]."""
    stays = ~image.patch
    return stays.index_fill(0, chosen, True).nonzero().T


def tiles(image: EncodedImage) -> list[Tensor]:
    """The rows of each tile's patches, in rising order of the tiles; one group for an untiled image."""
    rows = patches(image)
    if image.tile is None:
        return [rows]
    tile = image.tile[rows]
    return [rows[tile == one] for one in tile.unique().tolist()]


def width(image: EncodedImage, rows: Tensor) -> int | None:
    """Patches in a line of one tile, whose patches are `rows`; None where it cannot be known.

    The lines of tiles side by side alternate, so the first unbroken run of one tile is a line; a tile whose lines
    follow each other is taken for a square.
    """
    if image.grid is not None:
        return image.grid[1]
    breaks = (rows.diff() != 1).nonzero()
    if len(breaks):
        return int(breaks[0]) + 1
    side = math.isqrt(len(rows))
    return side if side * side == len(rows) else None


def rectangles(image: EncodedImage) -> list[tuple[Tensor, tuple[int, int]]]:
    """The rows of each tile's patches, with how many (lines, patches in a line) they are.

    Raises:
        InputError: when they are no rectangle.
    """
    found = []
    for rows in tiles(image):
        columns = width(image, rows)
        if columns is None or len(rows) % columns:
            raise InputError(
                Problem(
                    "model",
                    f"an image of {len(rows)} patches has no grid that is known.",
                    "Use a method that needs none, such as div_prune.",
                )
            )
        found.append((rows, (len(rows) // columns, columns)))
    return found
