"""Training for robust attention: neighbours averaged at the input, and attention of different tokens kept apart.

After "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126, ICCV 2023). Both are for training; the
second is for small models, as it needs whole attention maps of tokens x tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.encoders import find_encoder
from tokenwise.models.tap import AttentionCall, listen
from tokenwise.signals.attention_diversity import attention_similarity


class TokenAwarePooling(nn.Module):
    """Replaces each token by an average over its neighbourhood, of a size that is learned for each.

    Args:
        width: channels of a token.
        scales: sizes to choose from: the token itself, then 3 x 3 neighbours at distance 1, 2 and so on.
        temperature: of the choice; large for equal shares.
    """

    def __init__(self, width: int, scales: int = 4, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature
        self.scales = scales
        self.choice = nn.Sequential(
            nn.Conv2d(width, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def forward(self, grid: Tensor) -> Tensor:
        """[batch, width, rows, columns] to the same; beyond the border is 0."""
        shares = (self.choice(grid) / self.temperature).softmax(1)
        pooled = shares[:, :1] * grid
        kernel = grid.new_full((grid.shape[1], 1, 3, 3), 1 / 9)
        for scale in range(1, self.scales):
            mean = nn.functional.conv2d(grid, kernel, padding=scale, dilation=scale, groups=grid.shape[1])
            pooled = pooled + shares[:, scale : scale + 1] * mean
        return pooled


class AttentionDiversity(Handle):
    """Computes the attention diversification loss of every pass of an encoder, until `undo`.

    Args:
        model: with an encoder of a known layout.
        threshold: as for `attention_similarity`.
    """

    def __init__(self, model: nn.Module, threshold: float = 2.0):
        super().__init__()
        self.threshold = threshold
        self._found: dict[int, Tensor] = {}
        for index, block in enumerate(find_encoder(model).blocks):
            self.on_undo(listen(block.attention, partial(self._look, index)))

    def loss(self) -> Tensor:
        """The mean over the blocks of the last pass; to be added to the task's loss.

        Raises:
            InputError: when there was no pass.
        """
        if not self._found:
            raise InputError(Problem("model", "has not run since the last loss.", "Call the model first."))
        found, self._found = self._found, {}
        return torch.stack(list(found.values())).mean()

    def _look(self, index: int, call: AttentionCall) -> None:
        self._found[index] = attention_similarity(call.whole_map(), self.threshold)
