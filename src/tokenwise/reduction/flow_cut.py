"""Patches by the flow of information to the class token, block after block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidatorFunctionWrapHandler, field_validator

from tokenwise.errors import InputError, Problem
from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep, kept_count, parse_flops
from tokenwise.reduction.base import EncoderReducer, LayerTokens, Place

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class FlowCut(EncoderReducer):
    """Drops patches in every second block, more where the class token's attention is concentrated."""

    card: ClassVar[Card] = Card(
        id="reduction/flow_cut",
        paper=Paper(
            title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
            arxiv="2505.19536",
            venue="NeurIPS 2025",
        ),
        needs=("a class token",),
        status="VERIFIED",
        checked="the official functions for scores and counts on seeded inputs, and a short fp64 loop over the blocks",
        control="reduction/random_drop",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "class_token"})
    place: ClassVar[Place] = "after"
    sees_every_block: ClassVar[bool] = True

    keep: Keep = 0.25
    """What is left at the end: a share of the tokens, or ``"N tokens"``. How many there are on the way depends on the
    input, and so does the compute."""
    select_layer: int = -2
    """How many blocks there are for it, or with a minus sign how many at the end see only what is left."""

    @field_validator("keep", mode="wrap")
    @classmethod
    def _share_of_flops(cls, value: Any, check: ValidatorFunctionWrapHandler) -> float | str:
        if parse_flops(value):
            raise ValueError(
                "is a share of the operations, which depend on the input here; write the share of the tokens that is "
                'left at the end, such as 0.25, or "64 tokens"'
            )
        found: float | str = check(value)
        return found

    def blocks(self, layers: int) -> int:
        """The number of blocks after which only what is to be left is left."""
        blocks = self.select_layer if self.select_layer > 0 else layers + self.select_layer
        if not 0 < blocks <= layers:
            raise InputError(
                Problem(
                    "FlowCut.select_layer",
                    f"{self.select_layer} leaves {blocks} of {layers} blocks.",
                    f"Write a number from {1 - layers} to {layers}.",
                )
            )
        return blocks

    def counts(self, shape: Shape) -> list[int]:
        self.blocks(shape.layers)
        return [kept_count(self.keep, shape.tokens)] * shape.layers

    def decide(self, tokens: LayerTokens, counts: list[int]) -> int:
        available, left = tokens.hidden.shape[1], counts[-1]
        if available <= left:
            return available
        row = tokens.class_row().masked_fill(tokens.protected(), 0)
        score = self.scores(row, tokens)
        if "score" in tokens.memory:
            score = (tokens.memory["score"] + score) / 2
        tokens.memory["score"] = score
        remaining = self.blocks(tokens.layers) - tokens.layer - 1
        if remaining == 0:
            return left
        if remaining % 2:
            return available
        patches = (~tokens.protected()).sum(1)
        return max(available - self.removed(row, patches, remaining, left - tokens.prefix), left)

    def scores(self, row: Tensor, tokens: LayerTokens) -> Tensor:
        """The class token's attention and its values' likeness, each as a share, times the size of the value.

        Args:
            row: the class token's attention to the patches, [batch, tokens], 0 elsewhere.
        """
        import torch

        assert tokens.attention is not None
        value = tokens.attention.value.to(torch.promote_types(tokens.attention.value.dtype, torch.float32))
        likeness = (value[:, :, :1] @ value.transpose(2, 3)).squeeze(2)
        if tokens.padding is not None:
            likeness = likeness.masked_fill(tokens.padding.unsqueeze(1), float("-inf"))
        alike = likeness.softmax(2).mean(1).masked_fill(tokens.protected(), 0)
        share = row / row.sum(1, keepdim=True) + alike / alike.sum(1, keepdim=True)
        return share * value.mean(1).abs().sum(2)

    def removed(self, row: Tensor, patches: Tensor, remaining: int, left: int) -> int:
        """How many of the `patches` ([batch]) go: more where the entropy of `row` is low; the most of the batch."""
        import torch

        share = row / row.sum(1, keepdim=True)
        evenness = torch.special.entr(share).sum(1) / patches.clamp_min(2).log()
        wanted = (patches - left) / math.sqrt(remaining) * (1 - evenness.square())
        return int(wanted.max().round())

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens.ranked(tokens.memory["score"])

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        from tokenwise.policies.matching import largest
        from tokenwise.reduction.merge import keep_only

        return keep_only(largest(self.score(tokens), count))
