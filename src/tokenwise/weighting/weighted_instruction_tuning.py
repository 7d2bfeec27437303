"""Weights of prompts and completions."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.weighting.base import Reduction, State, TokenBatch, TokenWeighter


class WeightedInstructionTuning(TokenWeighter):
    """Weigh the tokens of a prompt and those of its completion differently: learn a little of the question too.

    Prompt and completion weights of 0 and 1 are fine-tuning on completions, 1 and 1 language modelling on everything.
    The tokens of the prompt need labels: a collator that masks them (TRL's ``completion_only_loss``) leaves nothing
    to weigh.
    """

    card: ClassVar[Card] = Card(
        id="weighting/weighted_instruction_tuning",
        paper=Paper(
            title="On the Effect of Instruction Tuning Loss on Generalization", arxiv="2507.07817", venue="TACL 2025"
        ),
        needs=("a column completion_mask, aligned with labels", "labels on the prompt"),
        status="VERIFIED",
        checked="the formula in the author's proposal for TRL (issue 6746) on worked numbers; the default weights are "
        "the example given there, and the paper tunes them for each model and data set",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"completion_mask"})
    reduction: ClassVar[Reduction] = "nonzero_mean"

    prompt_weight: float = Field(0.2, ge=0)
    """Weight of the tokens whose completion_mask is 0; the paper recommends 0 to 0.5."""
    completion_weight: float = Field(0.8, ge=0)
    """Weight of the tokens whose completion_mask is 1; the paper recommends 0.5 to 1."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.completion_mask is not None
        return torch.where(batch.completion_mask != 0, self.completion_weight, self.prompt_weight)
