"""Runs of the language modelling task: blocks of text, every token predicted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tokenwise.comparison.data import Windows
from tokenwise.comparison.held_out import HeldOut
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.training import (
    EXAMPLE_TOKENS,
    Progress,
    Row,
    build_method,
    pad_rows,
    run_training,
)
from tokenwise.models.load import load_tokenizer, make_or_load_model
from tokenwise.weighting.apply import weigh
from tokenwise.weighting.base import TokenWeighter


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Train the job's model with the job's method until its budget is spent; see `run_training`.

    The initial weights depend on the job's seed alone, never on its method.
    """
    task = job.task
    tokenizer = load_tokenizer(task["tokenizer"])
    windows = Windows.load(task["held_out_windows"])
    method = build_method(job)
    assert isinstance(method, TokenWeighter)
    model = make_or_load_model(task["model"], job.seed, tokenizer)
    long_enough = np.flatnonzero(windows.lengths >= min(EXAMPLE_TOKENS, windows.lengths.max()))
    shown = slice(0, windows.lengths[long_enough[0]])
    ids, labels = windows.input_ids[long_enough[0], shown], windows.labels[long_enough[0], shown]
    return run_training(
        job,
        folder,
        progress,
        model=model,
        tokenizer=tokenizer,
        method=method,
        rows=Blocks(np.load(task["train_blocks"], mmap_mode="r"), "sample_id" in method.reads),
        held_out=HeldOut(windows, task["training"]["precision"]),
        attach=partial(weigh, normalize=task["training"]["normalize"]),
        collate=partial(pad_rows, padding=0, mask=False),
        shown=(ids, labels),
    )


class Blocks:
    """Blocks of token ids as rows to train on.

    Args:
        blocks: shape [blocks, tokens].
        numbered: whether each token is to know the number of its block.
    """

    def __init__(self, blocks: NDArray[np.int32], numbered: bool = False) -> None:
        self._blocks = blocks
        self._numbered = numbered

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Row:
        ids = torch.from_numpy(self._blocks[index].astype(np.int64))
        number = {"sample_id": torch.full_like(ids, index)} if self._numbered else {}
        return {"input_ids": ids, "labels": ids, **number}
