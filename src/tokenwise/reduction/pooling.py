"""Coarser grids: a low pass, means, and single patches at regular distances."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tokenwise.models.vision_language import EncodedImage
    from tokenwise.reduction.merge import Merge, Mixture


def _shapes(image: EncodedImage, count: int) -> list[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """Of each tile the rows of its patches, its grid, and a coarser one of as many cells as fit; a cell takes the place
    of the patch in its middle. Tiles that get no cell are left out."""
    from tokenwise.policies.apportion import apportion
    from tokenwise.policies.resampling import grid_within
    from tokenwise.reduction.patches import rectangles, room

    found = rectangles(image)
    sizes = [len(rows) for rows, _ in found]
    shares = apportion(room(image, count), sizes, sizes)
    return [
        (rows, grid, grid_within(grid, share)) for (rows, grid), share in zip(found, shares, strict=True) if share > 0
    ]


def _middles(rows: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The rows of the patches in the middle of each cell, [cells], line by line."""
    from tokenwise.policies.resampling import evenly

    down, across = evenly(grid[0], cells[0]), evenly(grid[1], cells[1])
    return rows[(down.unsqueeze(1) * grid[1] + across).flatten().to(rows.device)]


def _resampled(image: EncodedImage, count: int, matrix: Callable[[int, int], Tensor]) -> Mixture:
    """Each tile times the `matrix` of both its sides."""
    import torch

    from tokenwise.reduction.merge import Mixture
    from tokenwise.reduction.patches import together

    tiles = _shapes(image, count)
    kept = together(image, torch.cat([_middles(*tile) for tile in tiles]))
    mixing = torch.zeros(kept.shape[1], len(image.patch), device=kept.device).scatter(1, kept.T, 1)
    for rows, grid, cells in tiles:
        place = torch.searchsorted(kept[0], _middles(rows, grid, cells))
        both = torch.kron(matrix(grid[0], cells[0]), matrix(grid[1], cells[1]))
        mixing[place.unsqueeze(1), rows] = both.to(mixing)
    return Mixture(kept, mixing.unsqueeze(0))


class FourierVLM(InputReducer):
    """Keeps the low frequencies of the grid of patches, sampled at as many places as there are frequencies."""

    card: ClassVar[Card] = Card(
        id="reduction/fourier_vlm",
        paper=Paper(
            title="Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language Models",
            arxiv="2508.06038",
        ),
        needs=("patches on a grid",),
        status="RECONSTRUCTION",
        checked="scipy's cosine transform; shapes of grids that are no squares are ours, and the paper tunes the model",
        control="reduction/average_pool",
    )
    merges: ClassVar[bool] = True
    before_projector: ClassVar[bool] = True

    keep: Keep = 0.25
    """What stays of each image's rows; the next smaller grid."""

    def select(self, image: EncodedImage, count: int) -> Mixture:
        from tokenwise.policies.resampling import low_pass_matrix

        return _resampled(image, count, low_pass_matrix)


class AveragePool(InputReducer):
    """Takes means of neighbouring patches: what a method that merges must beat."""

    card: ClassVar[Card] = Card(
        id="reduction/average_pool",
        needs=("patches on a grid",),
        status="VERIFIED",
        checked="PyTorch's adaptive average pooling",
    )
    merges: ClassVar[bool] = True

    keep: Keep = 0.25
    """What stays of each image's rows; the next smaller grid."""

    def select(self, image: EncodedImage, count: int) -> Mixture:
        from tokenwise.policies.resampling import pooling_matrix

        return _resampled(image, count, pooling_matrix)


class Grid(InputReducer):
    """Keeps patches at regular distances: what a method that selects must beat."""

    card: ClassVar[Card] = Card(
        id="reduction/grid",
        needs=("patches on a grid",),
        status="VERIFIED",
        checked="its definition",
    )

    keep: Keep = 0.25
    """What stays of each image's rows; the next smaller grid."""

    def select(self, image: EncodedImage, count: int) -> Merge:
        import torch

        from tokenwise.reduction.merge import keep_only
        from tokenwise.reduction.patches import together

        return keep_only(together(image, torch.cat([_middles(*tile) for tile in _shapes(image, count)])))


class TokenFlex(InputReducer):
    """Takes means of neighbouring patches before the projector, in training a different number for each batch."""

    card: ClassVar[Card] = Card(
        id="reduction/token_flex",
        paper=Paper(title="TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arxiv="2504.03154"),
        needs=("patches on a grid",),
        status="RECONSTRUCTION",
        checked="PyTorch's adaptive average pooling; the model's own projector stands for the paper's, and the budgets "
        "of training are drawn with equal chances",
        control="reduction/average_pool",
    )
    merges: ClassVar[bool] = True
    before_projector: ClassVar[bool] = True

    keep: Keep = 0.25
    """What stays of each image's rows; the next smaller grid."""
    training: tuple[Keep, ...] = ()
    """Budgets of which each batch draws one in place of `keep`, by PyTorch's random numbers, while gradients are
    recorded; the paper's are "64 tokens", "144 tokens" and "256 tokens"."""

    def counts_of(self, images: list[EncodedImage]) -> list[int]:
        import torch

        if not self.training or not torch.is_grad_enabled():
            return super().counts_of(images)
        drawn = self.training[int(torch.randint(len(self.training), ()))]
        return self.replace(keep=drawn, training=()).counts_of(images)

    def select(self, image: EncodedImage, count: int) -> Mixture:
        from tokenwise.policies.resampling import pooling_matrix

        return _resampled(image, count, pooling_matrix)
