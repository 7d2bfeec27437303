"""Runs of supervised fine-tuning: responses are learnt, and the model's own answers are compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tokenwise.comparison.chat import final_answer
from tokenwise.comparison.held_out import HeldOut
from tokenwise.comparison.quality import ResponseQuality
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.rows import Responses
from tokenwise.comparison.training import (
    METERED_STEPS,
    Progress,
    Row,
    build_method,
    labelled_row,
    pad_rows,
    reads_scores,
    run_training,
)
from tokenwise.models.load import load_tokenizer, make_or_load_model, padding_id
from tokenwise.weighting.apply import weigh
from tokenwise.weighting.base import TokenWeighter

_TOKENS_AT_ONCE = 2**14
"""Prompts of a batch of answers have so many tokens together, with what may be written."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Train the job's model with the job's method until its budget is spent; see `run_training`."""
    task = job.task
    tokenizer = load_tokenizer(task["tokenizer"])
    padding = padding_id(tokenizer)
    held_out = Responses.load(task["held_out_rows"])
    method = build_method(job)
    assert isinstance(method, TokenWeighter)
    model = make_or_load_model(task["model"], job.seed, tokenizer)
    shown = held_out.span(0)
    return run_training(
        job,
        folder,
        progress,
        model=model,
        tokenizer=tokenizer,
        method=method,
        rows=_Rows(Responses.load(task["train_rows"]), method.reads),
        held_out=HeldOutResponses(held_out, tokenizer, task),
        attach=partial(weigh, normalize=task["training"]["normalize"]),
        collate=partial(pad_rows, padding=padding, mask=reads_scores(method)),
        metered_steps=METERED_STEPS,
        shown=(held_out.input_ids[shown], held_out.labels[shown]),
    )


class _Rows:
    """Conversations as rows to train on, with the columns that the method reads."""

    def __init__(self, rows: Responses, reads: frozenset[str]) -> None:
        self._rows = rows
        self._reads = reads

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = labelled_row(self._rows, index)
        if "loss_weights" in self._reads:
            row["loss_weights"] = torch.from_numpy(self._rows.loss_weights[self._rows.span(index)])
        if "sample_id" in self._reads:
            row["sample_id"] = torch.full_like(row["input_ids"], index)
        return row


class HeldOutResponses:
    """Held-out conversations: the loss of their responses, and the model's own answers.

    Args:
        rows: the conversations.
        tokenizer: decodes what the model writes.
        task: the job's: ``max_new_tokens``, ``metric`` and ``training.precision`` are read.
    """

    def __init__(self, rows: Responses, tokenizer: PreTrainedTokenizerBase, task: dict[str, Any]) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._task = task
        self._loss = HeldOut(rows.windows(padding_id(tokenizer)), task["training"]["precision"])

    def on_the_way(self, model: PreTrainedModel) -> float:
        """Response loss in nats per token over the first rows, the same ones every time."""
        return self._loss.on_the_way(model)

    def measure(self, model: PreTrainedModel) -> tuple[ResponseQuality, float]:
        """The loss of every response and whether every answer matches; and what `on_the_way` gives."""
        loss, start = self._loss.measure(model)
        right = []
        for written, expected in zip(self.answers(model), self._rows.expected, strict=True):
            marked = "####" in expected
            right.append(final_answer(written, marked) == final_answer(expected, marked))
        return ResponseQuality(loss.nll, loss.tokens, right, self._task["metric"]), start

    @torch.no_grad()
    def answers(self, model: PreTrainedModel) -> list[str]:
        """What the model writes after each prompt, always the likeliest token, until it ends or may write no more."""
        was_training = model.training
        model.eval()
        count = self._task["max_new_tokens"]
        stops = model.generation_config.eos_token_id if model.generation_config is not None else None
        greedy = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=padding_id(self._tokenizer),
            eos_token_id=_together(stops, self._tokenizer.eos_token_id),
        )
        found = [""] * len(self._rows)
        order = np.argsort(-self._rows.prompts, kind="stable")
        while len(order):
            longest = int(self._rows.prompts[order[0]]) + count
            batch, order = np.split(order, [max(1, _TOKENS_AT_ONCE // longest)])
            prompts = [self._prompt(int(index)) for index in batch]
            ids, mask = (values.to(model.device) for values in _pad_left(prompts, padding_id(self._tokenizer)))
            half = self._task["training"]["precision"] == "bf16"
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
                written = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
            texts = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                found[index] = text
        model.train(was_training)
        return found

    def _prompt(self, index: int) -> Tensor:
        start = self._rows.span(index).start
        return torch.from_numpy(self._rows.input_ids[start : start + self._rows.prompts[index]].astype(np.int64))


def _together(*ids: int | list[int] | None) -> list[int] | None:
    """All the tokens at which a text ends."""
    found = {one for entry in ids if entry is not None for one in (entry if isinstance(entry, list) else [entry])}
    return sorted(found) or None


def _pad_left(prompts: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [prompts, tokens]: every prompt ends where its answer begins."""
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), True, padding, padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return ids, mask.long()
