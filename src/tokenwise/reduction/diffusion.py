"""Functions for diffusion transformers: tokens pushed apart from a reference, and fewer tokens at some timesteps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenwise.policies.matching import normalized


def push_apart(hidden: Tensor, alpha: float = 0.9, threshold: float = 0.65) -> Tensor:
    """Move the tokens of each image away from the most similar ones of the first image of the batch.

    Negative token merging (arXiv 2412.01339): ``(1 + alpha) * x - alpha * match`` where the cosine of a token x and its
    best match in the first image is above the threshold. To be applied to what the attention gives, in some blocks and
    at early timesteps (900 to 1000 of 1000 for Flux). The match is the best reference for each token, as in the paper;
    the official code takes it along the other axis.

    Args:
        hidden: [batch, tokens, channels].
        alpha: how far, from 0.
        threshold: in [-1, 1].

    Returns:
        The same shape; the first image stays as it is up to rounding.
    """
    metric = normalized(hidden)
    similarity, index = (metric @ metric[:1].transpose(1, 2)).max(2)
    match = hidden[0][index]
    return torch.where((similarity > threshold).unsqueeze(2), (1 + alpha) * hidden - alpha * match, hidden)


def density(timestep: float, lowest: float, highest: float) -> float:
    """The share of tokens to compute at a timestep, in a line from `lowest` at pure noise to `highest` at the image.

    The dynamic token density of FlexDiT (arXiv 2412.06028): structure first, details late. The line is ours.

    Args:
        timestep: 1 at pure noise, 0 at the image.
        lowest, highest: shares in (0, 1].
    """
    return highest + (lowest - highest) * timestep


def sparse_tokens(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens of a square grid averaged into a coarser grid.

    Args:
        hidden: [batch, side * side, channels].
        rows, columns: of the coarser grid, at most the side.

    Returns:
        [batch, rows * columns, channels].
    """
    side = round(hidden.shape[1] ** 0.5)
    grid = hidden.transpose(1, 2).unflatten(2, (side, side))
    return functional.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).transpose(1, 2)


def dense_tokens(change: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """What was computed on a coarser grid, given to every token of the square grid: to be added to its tokens.

    FlexDiT restores them by a trained cross-attention; this is the interpolation that needs no training.

    Args:
        change: [batch, rows * columns, channels].
        rows, columns: of the coarser grid.
        side: of the square grid.

    Returns:
        [batch, side * side, channels].
    """
    grid = change.transpose(1, 2).unflatten(2, (rows, columns))
    fine = functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return fine.flatten(2).transpose(1, 2)
