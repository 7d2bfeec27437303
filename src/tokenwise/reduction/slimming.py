"""Self-slimming: modules that learn to sum many tokens into few, and back for distillation in training.

After "Self-slimmed Vision Transformer" (arXiv 2111.12624): fewer tokens after some blocks, each a learned average of
all, trained so that a reverse module can give back what the dense teacher has in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.encoders import find_encoder
from tokenwise.policies.plans import Shape
from tokenwise.reduction.base import EncoderReducer, LayerTokens, Place
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.merge import Mixture


class TokenSlimming(nn.Module):
    """Sums all tokens into `kept`, each with weights of its own that add up to 1.

    Args:
        width: channels of a token.
        kept: tokens that come out.
        ratio: channels inside, as a share of `width`.
    """

    def __init__(self, width: int, kept: int, ratio: float = 0.5):
        super().__init__()
        hidden = int(width * ratio)
        self.kept = kept
        self.weight = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, kept))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def mixing(self, tokens: Tensor) -> Tensor:
        """The weight of each token ([batch, tokens, width]) in each that comes out: [batch, kept, tokens]."""
        weight: Tensor = (self.weight(tokens) * self.scale).softmax(1)
        return weight.transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, width] to [batch, kept, width]."""
        return self.mixing(tokens) @ tokens


class ReverseSlimming(nn.Module):
    """Gives back `tokens` tokens from `kept`: used in training only, to compare with a dense teacher's.

    Args:
        width: channels of a token.
        kept: tokens that come in.
        tokens: tokens that come out.
        ratio: channels inside, as a multiple of those that come out.
    """

    def __init__(self, width: int, kept: int, tokens: int, ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mlp1 = nn.Sequential(
            nn.Linear(kept, int(tokens * ratio)), nn.GELU(), nn.Linear(int(tokens * ratio), tokens)
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp2 = nn.Sequential(nn.Linear(width, int(width * ratio)), nn.GELU(), nn.Linear(int(width * ratio), width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, kept, width] to [batch, tokens, width]."""
        tokens = self.mlp1(self.norm1(tokens).transpose(1, 2)).transpose(1, 2)
        made: Tensor = tokens + self.mlp2(self.norm2(tokens))
        return made


def slimming_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weight: float = 2.0,
    logit_weight: float = 2.0,
) -> Tensor:
    """What is added to the task's loss: the distance of the recovered tokens and of the predictions from a teacher's.

    Args:
        student: recovered tokens of each block, [batch, tokens, width].
        teacher: the dense teacher's tokens of the same blocks.
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].
        token_weight: of the mean squared distance, averaged over the blocks.
        logit_weight: of the divergence of the teacher's prediction from the student's, averaged over the batch.
    """
    pairs = [nn.functional.mse_loss(one, other.detach()) for one, other in zip(student, teacher, strict=True)]
    divergence = nn.functional.kl_div(
        student_logits.log_softmax(1), teacher_logits.detach().log_softmax(1), reduction="batchmean", log_target=True
    )
    return token_weight * torch.stack(pairs).mean() + logit_weight * divergence


class _Slimming(EncoderReducer):
    """Sums tokens by the modules of an `EncoderReduction`."""

    merges: ClassVar[bool] = True
    place: ClassVar[Place] = "after"

    _modules_of: Mapping[int, TokenSlimming] = PrivateAttr()

    def counts(self, shape: Shape) -> list[int]:
        counts, left = [], shape.tokens
        for layer in range(shape.layers):
            if layer in self._modules_of:
                left = shape.prefix + self._modules_of[layer].kept
            counts.append(left)
        return counts

    def reduce(self, tokens: LayerTokens, count: int) -> Mixture:
        prefix, (batch, before, _) = tokens.prefix, tokens.hidden.shape
        mixing = self._modules_of[tokens.layer].mixing(tokens.hidden[:, prefix:])
        whole = mixing.new_zeros(batch, count, before)
        whole[:, :prefix, :prefix] = torch.eye(prefix, device=mixing.device, dtype=mixing.dtype)
        whole[:, prefix:, prefix:] = mixing
        # A sum of all tokens has no place of its own; the first places stand for them.
        return Mixture(torch.arange(count, device=mixing.device).expand(batch, -1), whole)


def attach_slimming(model: nn.Module, modules: Mapping[int, TokenSlimming]) -> EncoderReduction:
    """Slim the tokens of an encoder after some of its blocks, until the handle is undone.

    Args:
        model: with an encoder of a known layout; protected tokens pass by.
        modules: by the index of the block, from 0, after which each works; theirs to train.

    Raises:
        InputError: when a block is not there.
    """
    encoder = find_encoder(model)
    if not modules or not all(0 <= block < len(encoder.blocks) for block in modules):
        raise InputError(Problem("modules", f"stand after blocks {sorted(modules)} of 0 to {len(encoder.blocks) - 1}."))
    method = _Slimming(keep=1.0)
    method._modules_of = dict(modules)
    return EncoderReduction(encoder, method)
