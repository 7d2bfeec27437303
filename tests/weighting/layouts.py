"""The data of the weighting tests in every batch layout, and transformers' Trainer for a step on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import tokenwise as tw

LENGTHS = (12, 7, 12, 3, 9, 12, 5, 10)
LONGEST = max(LENGTHS)
FORGOTTEN = (0, 1, 4)

Row = dict[str, Tensor]


def sequences(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Eight sequences of different lengths with masked beginnings; the fourth has no label at all."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(1, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: index % 3 + 1] = -100
        if index == 3:
            labels[:] = -100
        found.append((ids, labels))
    return found


def padded(pairs: list[tuple[Tensor, Tensor]], side: str) -> list[Row]:
    """One row for each sequence, padded on the ``right`` or the ``left``."""
    return [
        {
            "input_ids": pad(ids, side),
            "labels": pad(labels, side, -100),
            "attention_mask": pad(torch.ones_like(ids), side),
        }
        for ids, labels in pairs
    ]


def pad(values: Tensor, side: str, fill: int = 0, length: int = LONGEST) -> Tensor:
    """Values of one sequence, [tokens], as long as the longest one's."""
    missing = length - len(values)
    return F.pad(values, (0, missing) if side == "right" else (missing, 0), value=fill)


def packed(pairs: list[tuple[Tensor, Tensor]], per_row: int) -> list[Row]:
    """Several sequences in each row, told apart by their positions."""
    rows = []
    for start in range(0, len(pairs), per_row):
        part = pairs[start : start + per_row]
        firsts = [torch.cat([torch.tensor([-100]), labels[1:]]) for _, labels in part]
        rows.append(
            {
                "input_ids": torch.cat([ids for ids, _ in part]),
                "labels": torch.cat(firsts),
                "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in part]),
            }
        )
    return rows


def laid_out(
    pairs: list[tuple[Tensor, Tensor]], layout: str, columns: list[Row] | None = None, per_row: int = 2
) -> list[Row]:
    """The sequences padded to the ``right`` or the ``left``, or ``packed``, each column beside its tokens.

    Args:
        columns: of each sequence its values by name, [tokens].
        per_row: how many sequences are packed into a row.
    """
    rows = packed(pairs, per_row) if layout == "packed" else padded(pairs, layout)
    for name in columns[0] if columns else ():
        values = [column[name] for column in columns]
        for index, row in enumerate(rows):
            if layout == "packed":
                row[name] = torch.cat(values[per_row * index : per_row * (index + 1)])
            else:
                row[name] = pad(values[index], layout)
    return rows


def with_sample_ids(rows: list[Row]) -> list[Row]:
    return [{**row, "sample_id": torch.full_like(row["input_ids"], index)} for index, row in enumerate(rows)]


def forget_columns(pairs: list[tuple[Tensor, Tensor]]) -> list[Row]:
    """Some sequences are to be forgotten, the seventh in its first half."""
    columns = [torch.full_like(ids, int(index in FORGOTTEN)) for index, (ids, _) in enumerate(pairs)]
    columns[6][:3] = 1
    return [{"forget": column} for column in columns]


SHARED = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_labels": 3}
BERT = {**SHARED, "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**SHARED, "num_attention_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}


def classifier(kind: str, several: bool = False) -> Any:
    """A small classifier of three classes: ``bert``, ``llama``, of ``tokens``, or ``several`` labels per example."""
    torch.manual_seed(0)
    problem = {"problem_type": "multi_label_classification"} if several or kind == "several" else {}
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**LLAMA, **problem)).double()
    if kind == "tokens":
        return BertForTokenClassification(BertConfig(**BERT)).double()
    return BertForSequenceClassification(BertConfig(**BERT, **problem)).double()


def class_rows(kind: str, count: int = 8, side: str = "right") -> list[dict[str, Any]]:
    """Texts of unequal class frequencies; of tokens the fourth text has no label, the others some."""
    generator = torch.Generator().manual_seed(0)
    labels = [0, 0, 1, 0, 2, 0, 1, 0] * (count // 8)
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        length = 4 + index % 5
        ids = torch.randint(1, 40, (length,), generator=generator)
        row = {"input_ids": pad(ids, side, length=8), "attention_mask": pad(torch.ones_like(ids), side, length=8)}
        found: Any = label
        if kind == "tokens":
            found = torch.where(ids < 28, 0, torch.where(ids < 35, 1, 2))
            found[: index % 3 if index != 3 else length] = -100
            found = pad(found, side, -100, length=8)
        elif kind == "several":
            found = torch.tensor([1.0, float(index % 2), float(index == 4)])
        rows.append({**row, "labels": found})
    return rows


OPTIONS = {
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
    "seed": 3,
    "save_strategy": "no",
}
"""Of every trainer: plain gradient descent, the data in their order."""


def make_trainer(
    model: Any,
    rows: list[Any],
    folder: Path,
    batch: int = 8,
    accumulate: int = 1,
    clip: float = 0.0,
    steps: int = 1,
    **options: Any,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        max_steps=steps,
        **{**OPTIONS, **options},
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def train(
    model: Any,
    rows: list[Any],
    method: Any,
    folder: Path,
    batch: int = 8,
    accumulate: int = 1,
    clip: float = 0.0,
    steps: int = 1,
    resume: str | None = None,
    normalize: str = "none",
    **options: Any,
) -> tuple[Any, list[float], Any]:
    """A copy of the model, trained: (model, loss of each step, handle)."""
    model = copy.deepcopy(model)
    trainer = make_trainer(model, rows, folder, batch, accumulate, clip, steps, **options)
    weighing = {} if normalize == "none" else {"normalize": normalize}
    handle = tw.weigh(trainer, method, **weighing) if method is not None else None
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], handle
