"""A grid on fewer cells: which shape, and the matrices that make it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grid_within(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The shape of at most `count` cells that a grid is resampled to.

    Of all that fit, the one whose side that shrinks more shrinks least; of equal ones the one with most cells, then the
    one with fewest lines.

    Args:
        grid: (lines, cells in a line).
        count: at least 1.

    Returns:
        (lines, cells in a line), none more than in `grid`.
    """
    lines, columns = grid

    def worth(shape: tuple[int, int]) -> tuple[int, int, int]:
        return min(shape[0] * columns, shape[1] * lines), shape[0] * shape[1], -shape[0]

    shapes = [(high, min(columns, count // high)) for high in range(1, min(lines, count) + 1)]
    return max(shapes, key=worth)


def evenly(length: int, count: int) -> Tensor:
    """`count` of `length` places at even distances, the middle of each of as many parts, [count], int64, rising."""
    place = torch.arange(count)
    return (place * length // count + ((place + 1) * length - 1) // count) // 2


def pooling_matrix(length: int, cells: int) -> Tensor:
    """The means that adaptive average pooling takes along one side, [cells, length] in fp64.

    Cell i is the mean from ``floor(i * length / cells)`` up to ``ceil((i + 1) * length / cells)``; where `cells` does
    not divide `length`, neighbours share a place.
    """
    place, cell = torch.arange(length), torch.arange(cells).unsqueeze(1)
    inside = (place >= cell * length // cells) & (place < -(-(cell + 1) * length // cells))
    return inside.double() / inside.sum(1, keepdim=True)


def low_pass_matrix(length: int, cells: int) -> Tensor:
    """What keeps the `cells` lowest frequencies of one side and samples it at as many places, [cells, length] in fp64.

    The orthonormal cosine transform (DCT-II) of `length` values, its first coefficients, and the inverse of `cells`
    values, scaled so that a constant stays what it is.
    """
    return math.sqrt(cells / length) * _cosines(cells).T @ _cosines(length)[:cells]


def _cosines(length: int) -> Tensor:
    place = torch.arange(length, dtype=torch.float64)
    waves = torch.cos(math.pi / length * torch.outer(place, place + 0.5)) * math.sqrt(2 / length)
    waves[0] *= math.sqrt(0.5)
    return waves
