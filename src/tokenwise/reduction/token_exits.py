"""Token exits for dense prediction: tokens whose class is certain leave the encoder with the prediction they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.encoders import find_encoder
from tokenwise.policies.matching import merge_marked
from tokenwise.policies.plans import Shape
from tokenwise.reduction.base import EncoderReducer, LayerTokens, Place
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.merge import Merge


def certain_tokens(probability: Tensor, threshold: float = 0.9, context: int = 5) -> Tensor:
    """Tokens whose class is certain, without the most certain ones of each class, which stay as context.

    Args:
        probability: of each class, [batch, tokens, classes]; tokens of probability 0 everywhere are never certain.
        threshold: a token is certain where its largest probability is above it; 1 for none.
        context: how many certain tokens of each class stay; of equal ones the first.

    Returns:
        [batch, tokens], bool.
    """
    confidence, found = probability.max(2)
    certain = confidence > threshold
    order = confidence.masked_fill(~certain, -1.0).argsort(dim=1, descending=True, stable=True)
    of_class = nn.functional.one_hot(found.gather(1, order), probability.shape[2])
    rank = (of_class * certain.gather(1, order).unsqueeze(2)).cumsum(1).gather(2, found.gather(1, order).unsqueeze(2))
    beyond = torch.zeros_like(certain).scatter_(1, order, rank.squeeze(2) > context)
    return certain & beyond


class _Exits(EncoderReducer):
    """Drops tokens after they have left their prediction."""

    place: ClassVar[Place] = "after"
    ragged: ClassVar[bool] = True

    _owner: TokenExits = PrivateAttr()

    def counts(self, shape: Shape) -> list[int]:
        """How many are left is seen when they are."""
        return [0] * shape.layers

    def reduce(self, tokens: LayerTokens, count: int) -> Merge | None:
        owner = self._owner
        if tokens.layer not in owner.heads:
            return None
        logits = owner.heads[tokens.layer](tokens.hidden[:, tokens.prefix :])
        absent = tokens.size == 0
        owner.write(logits, tokens.positions[:, tokens.prefix :], absent[:, tokens.prefix :])
        if tokens.layer == tokens.layers - 1:
            return None
        probability = logits.detach().softmax(2).masked_fill(absent[:, tokens.prefix :, None], 0.0)
        leaving = torch.zeros_like(absent)
        leaving[:, tokens.prefix :] = certain_tokens(probability, owner.threshold, owner.context)
        if not bool(leaving.any()):
            return None
        nothing = torch.zeros_like(absent)
        kept, target, empty = merge_marked(nothing, nothing.long(), absent | leaving)
        return Merge(kept, target, fills=bool(empty.any()))


class TokenExits(EncoderReduction):
    """An encoder that tokens leave once an auxiliary head is certain of their class, until `undo`.

    The images of a batch keep different numbers of tokens; what the model itself gives has NaN in the empty places,
    and `canvas` has the prediction of every token.

    Args:
        model: with an encoder of a known layout.
        heads: what predicts each token's class after some blocks, by the block's index from 0: from
            [batch, tokens, channels] to logits [batch, tokens, classes], each token by itself. That of the last block
            must be there; it decides what is left.
        threshold: probability above which a token leaves, in (0, 1]; 1 keeps all.
        context: how many certain tokens of each predicted class stay, at least 1.
        masked: as for `reduce`.

    Attributes:
        canvas: logits of every patch of the last pass, [batch, patches, classes]; each from the last head it came to.

    Raises:
        InputError: when the last block has no head, a head's block is not there, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[int, nn.Module],
        threshold: float = 0.9,
        context: int = 5,
        masked: bool = False,
    ):
        encoder = find_encoder(model)
        last = len(encoder.blocks) - 1
        if last not in heads or not all(0 <= block <= last for block in heads):
            raise InputError(
                Problem(
                    "heads",
                    f"stand after blocks {sorted(heads)} of 0 to {last}.",
                    f"One after block {last} decides what is left.",
                )
            )
        if not (0 < threshold <= 1 and context >= 1):
            raise InputError(
                Problem("threshold", f"{threshold} with context {context} is out of range.", "Try 0.9 with 5.")
            )
        self.heads = dict(heads)
        self.threshold = threshold
        self.context = context
        self.canvas: Tensor | None = None
        method = _Exits(keep=1.0)
        method._owner = self
        super().__init__(encoder, method, masked)

    def plan(self, tokens: int) -> list[int]:
        return self.method.counts(Shape(tokens, len(self.encoder.blocks)))

    def write(self, logits: Tensor, positions: Tensor, absent: Tensor) -> None:
        """Put the logits of tokens at `positions`, absent ones left out, on the canvas."""
        index = (positions - self.encoder.prefix).unsqueeze(2).expand_as(logits)
        if self.canvas is None:
            # The first head sees every patch.
            self.canvas = torch.zeros_like(logits).scatter(1, index, logits)
            return
        own = self.canvas.gather(1, index)
        self.canvas = self.canvas.scatter(1, index, torch.where(absent.unsqueeze(2), own, logits))

    def _begin(self, hidden: Tensor, mask: Tensor | None) -> None:
        self.canvas = None
        super()._begin(hidden, mask)

    def _show_empty(self, hidden: Tensor, empty: Tensor) -> Tensor:
        return hidden.masked_fill(empty.unsqueeze(2), float("nan"))
