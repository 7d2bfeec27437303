"""FAIT: more weight where a correct program differs from a similar wrong one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.method import Card, Paper
from tokenwise.policies.weights import group_mean
from tokenwise.signals.text_difference import TokenizedText, difference_masks, first_tokens_after_gaps
from tokenwise.weighting.base import Reduction, State, TokenBatch, TokenWeighter

_PAPER = Paper(title="FAIT: Fault-Aware Fine-Tuning for Better Code Generation", arxiv="2503.16913")


class FaultAwareStatic(TokenWeighter):
    """Weigh the tokens in which a correct program differs from a wrong one ``1 + strength``, all others 1."""

    card: ClassVar[Card] = Card(
        id="weighting/fault_aware_static",
        paper=_PAPER,
        needs=("a column difference, as fault_pair makes it",),
        status="RECONSTRUCTION",
        checked="the flags on worked programs; the paper's weights move with the model, constant ones are ours",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"difference"})
    reduction: ClassVar[Reduction] = "nonzero_mean"

    strength: float = Field(1.0, ge=0)
    """What a flagged token weighs more than the others; 0 is plain cross-entropy."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.difference is not None
        return torch.where(batch.difference < 0, 0.0, 1 + self.strength * batch.difference)


class FaultAware(TokenWeighter):
    """Weigh the tokens in which a correct program differs from a wrong one, more the more the model prefers the wrong.

    A flagged token weighs ``1 + strength * sigmoid(d / temperature)``, where d is the mean log-likelihood of the wrong
    program's differing tokens minus that of the correct one's; all other tokens weigh 1. The wrong program's tokens
    are scored, and weigh 0.
    """

    card: ClassVar[Card] = Card(
        id="weighting/fault_aware",
        paper=_PAPER,
        needs=("columns difference and sample_id, as fault_pair makes them", "both programs in one micro-batch"),
        status="RECONSTRUCTION",
        checked="worked numbers; that the weight compares the model's scores of both programs is the paper's, its "
        "formula is ours",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "difference", "sample_id"})
    reduction: ClassVar[Reduction] = "nonzero_mean"

    strength: float = Field(1.0, ge=0)
    """Most that a flagged token weighs more than the others; 0 is plain cross-entropy."""
    temperature: float = Field(1.0, gt=0)
    """How far apart the log-likelihoods must be, in nats, to tell in the weight."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.nll is not None
        assert batch.difference is not None
        assert batch.sample_id is not None
        flagged, wrong = batch.difference > 0, batch.difference < 0
        samples, index = torch.unique(batch.sample_id, return_inverse=True)
        count = samples.shape[0]
        alone = (
            torch.bincount(index[flagged], minlength=count).bool()
            & ~torch.bincount(index[wrong], minlength=count).bool()
        )
        if alone.any():
            raise InputError(
                Problem(
                    "sample_id",
                    f"sample {int(samples[alone][0])} has its correct program in the batch, and not its wrong one.",
                    "Keep both rows of a pair in one micro-batch: an even batch size, and no shuffling of single rows.",
                )
            )
        preference = group_mean(batch.nll[flagged], index[flagged], count) - group_mean(
            batch.nll[wrong], index[wrong], count
        )
        more = self.strength * torch.sigmoid(preference / self.temperature)[index]
        return torch.where(flagged, 1 + more, torch.where(wrong, 0.0, 1.0))


def fault_pair(
    tokenizer: Any, prompt: str, correct: str, wrong: str, sample_id: int = 0
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Two rows of training data from a correct program and a similar wrong one.

    Args:
        tokenizer: a fast tokenizer; its end-of-sequence token, where it has one, ends the correct program.
        prompt: what both programs answer; no loss.
        correct: the program to learn.
        wrong: a similar program that fails.
        sample_id: number of the pair, the same in both rows.

    Returns:
        The correct row and the wrong row, each with ``input_ids``, ``labels``, ``difference`` and ``sample_id``,
        [tokens]. ``difference`` is 1 on the correct program's differing tokens, -1 on the wrong one's, 0 elsewhere.
        The wrong row has labels on these alone; where the wrong program only lacks something, on the token with which
        it goes on. Training without the wrong row, as `FaultAwareStatic` allows, leaves it out.

    Raises:
        InputError: when the tokenizer gives no offsets, or a program is empty.
    """
    for name, program in (("correct", correct), ("wrong", wrong)):
        if not program:
            raise InputError(Problem(name, "is empty.", "Leave the pair out."))
    texts = [_tokenized(tokenizer, prompt, program) for program in (correct, wrong)]
    good, bad = texts
    flags, wrong_flags = difference_masks(good, bad)
    if any(flags) and not any(wrong_flags):
        wrong_flags = first_tokens_after_gaps(good, bad)
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    in_program = [start < end and start >= 0 for start, end in good.offsets]
    rows = []
    for ids, labelled, difference in (
        ([*good.ids, *ending], [*in_program, *(True for _ in ending)], [*map(int, flags), *(0 for _ in ending)]),
        (bad.ids, wrong_flags, [-int(flag) for flag in wrong_flags]),
    ):
        rows.append(
            {
                "input_ids": list(ids),
                "labels": [token if has else -100 for token, has in zip(ids, labelled, strict=True)],
                "difference": list(difference),
                "sample_id": [sample_id] * len(ids),
            }
        )
    return rows[0], rows[1]


def _tokenized(tokenizer: Any, prompt: str, program: str) -> TokenizedText:
    """The program with the tokens of prompt and program; the offsets of the prompt's are negative."""
    if not tokenizer.is_fast:
        raise InputError(Problem("tokenizer", f"{type(tokenizer).__name__} gives no offsets.", "Use a fast tokenizer."))
    # Tokenized apart, so that no token lies across the border.
    before = tokenizer(prompt)["input_ids"]
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    found = tokenizer(program, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [(-1, -1)] * len(before) + [tuple(span) for span in found["offset_mapping"]]
    return TokenizedText(program, [*before, *found["input_ids"]], offsets)
