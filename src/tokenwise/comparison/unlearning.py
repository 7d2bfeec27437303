"""Runs of unlearning: some answers of a trained model are to be forgotten, the others kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from tokenwise.comparison.held_out import HeldOut
from tokenwise.comparison.quality import UnlearningQuality
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.rows import Answers
from tokenwise.comparison.training import (
    METERED_STEPS,
    EndlessRows,
    Progress,
    Row,
    build_method,
    labelled_row,
    pad_rows,
    run_training,
)
from tokenwise.models.load import load_tokenizer, make_or_load_model, padding_id
from tokenwise.weighting.apply import weigh
from tokenwise.weighting.objective import Objective

CURVE_ANSWERS = 500
"""Evaluations on the way use the first answers to forget and the first to keep, so many of each."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Let the job's model forget with the job's method until its budget is spent; see `run_training`."""
    task = job.task
    tokenizer = load_tokenizer(task["tokenizer"])
    padding = padding_id(tokenizer)
    method = build_method(job)
    return run_training(
        job,
        folder,
        progress,
        model=make_or_load_model(task["model"], job.seed, tokenizer),
        tokenizer=tokenizer,
        method=method,
        rows=_endless(Answers.load(task["train_rows"]), method, job.seed),
        held_out=HeldOutAnswers(Answers.load(task["held_out_rows"]), padding, task["training"]["precision"]),
        attach=weigh,
        collate=partial(_collate, padding=padding),
        metered_steps=METERED_STEPS,
        labelled_tokens=False,
    )


def _trained_on(method: Any) -> tuple[bool, ...]:
    """Whether a step has rows to forget (True), rows to keep (False), or both: those that the method has terms for.

    The baseline has none: it is the plain loss of what is to be kept.
    """
    if not isinstance(method, Objective):
        return (False,)
    tokens = {term.tokens for term in method.terms()}
    return tuple(forget for forget, name in ((True, "forget"), (False, "retain")) if tokens & {name, "all"})


def _endless(rows: Answers, method: Any, seed: int) -> Dataset[tuple[Row, ...]]:
    """What the method trains on: two orders that have nothing to do with one another, that of what is to be kept the
    same for every method."""
    seeds = {True: seed + 2**32, False: seed}
    return _Together([EndlessRows(_Rows(rows, forget), seeds[forget]) for forget in _trained_on(method)])


class _Rows:
    """The rows to forget, or those to keep."""

    def __init__(self, rows: Answers, forget: bool) -> None:
        self._rows = rows
        self._forget = forget
        self._which = rows.rows(forget)

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> Row:
        row = labelled_row(self._rows, int(self._which[index]))
        return {**row, "forget": torch.full_like(row["labels"], self._forget)}


class _Together(Dataset[tuple[Row, ...]]):
    """Endless rows side by side: each item is one of each."""

    def __init__(self, parts: Sequence[EndlessRows]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts[0])

    def __getitem__(self, index: int) -> tuple[Row, ...]:
        return tuple(part[index] for part in self._parts)


def _collate(items: Sequence[tuple[Row, ...]], padding: int) -> dict[str, Tensor]:
    # With a mask, so that padding is not counted among the tokens that are read.
    return pad_rows([row for item in items for row in item], padding, mask=True)


class HeldOutAnswers:
    """Answers to forget and to keep, and how probable a model finds them.

    Args:
        rows: question and answer.
        padding: token id that batches are padded with.
        precision: ``fp32``, or ``bf16`` for the forward passes.
    """

    def __init__(self, rows: Answers, padding: int, precision: str) -> None:
        self._rows = rows
        self._start = np.sort(np.concatenate([rows.rows(forget)[:CURVE_ANSWERS] for forget in (True, False)]))
        windows = rows.windows(padding)
        self._whole = HeldOut(windows, precision)
        columns = ("input_ids", "labels", "lengths")
        start = replace(windows, **{name: getattr(windows, name)[self._start] for name in columns})
        self._part = HeldOut(start, precision)
        self._tokens = (windows.labels != -100).sum(1)

    def on_the_way(self, model: PreTrainedModel) -> float:
        """Unlearning error on the first answers of each kind, the same ones every time; NaN where a loss is."""
        return self._value(self._quality(self._part.losses(model), self._start))

    def measure(self, model: PreTrainedModel) -> tuple[UnlearningQuality, float]:
        """The loss of every answer; and what `on_the_way` gives."""
        losses = self._whole.losses(model)
        whole = self._quality(losses, np.arange(len(self._rows)))
        return whole, self._value(self._quality(losses[self._start], self._start))

    @staticmethod
    def _value(quality: UnlearningQuality) -> float:
        return quality.value if quality.finite else float("nan")

    def _quality(self, losses: NDArray[np.float64], which: NDArray[np.int64]) -> UnlearningQuality:
        tokens, forget = self._tokens[which].tolist(), self._rows.forget[which].tolist()
        return UnlearningQuality(losses.tolist(), tokens, forget)
