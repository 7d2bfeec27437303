"""Runs of classification: texts are put into classes, and judged class by class."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer

from tokenwise.comparison.quality import ClassQuality
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.rows import Examples
from tokenwise.comparison.training import METERED_STEPS, Progress, Row, build_method, pad_rows, run_training
from tokenwise.method import Handle, Method
from tokenwise.models.load import load_tokenizer, make_or_load_classifier, padding_id
from tokenwise.models.patch import replace_attribute
from tokenwise.weighting.apply import weigh
from tokenwise.weighting.uniform import Uniform

CURVE_EXAMPLES = 2_000
"""Evaluations on the way use the first examples of each class, so many in all; the last one uses all examples."""
_TOKENS_AT_ONCE = 2**15


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Train the job's classifier with the job's method until its budget is spent; see `run_training`."""
    task = job.task
    tokenizer = load_tokenizer(task["tokenizer"])
    padding = padding_id(tokenizer)
    rows = Examples.load(task["train_rows"])
    model = make_or_load_classifier(task["model"], job.seed, tokenizer, rows.names.tolist())
    return run_training(
        job,
        folder,
        progress,
        model=model,
        tokenizer=tokenizer,
        method=_counted(build_method(job), rows),
        rows=_Rows(rows),
        held_out=HeldOutExamples(Examples.load(task["held_out_rows"]), padding, task["training"]["precision"]),
        attach=_attach,
        collate=partial(pad_rows, padding=padding, mask=True),
        metered_steps=METERED_STEPS,
        labelled_tokens=False,
    )


def _counted(method: Method, rows: Examples) -> Method:
    """The method with the number of examples of each class, where it asks: endless rows cannot be counted."""
    if "counts" in type(method).model_fields and getattr(method, "counts", None) is None:
        return method.replace(counts=np.bincount(rows.classes, minlength=len(rows.names)).tolist())
    return method


def _attach(trainer: Trainer, method: Any) -> Handle:
    """Let the Trainer train with the method; uniform is the model's own loss, the plain cross-entropy."""
    if not isinstance(method, Uniform):
        return weigh(trainer, method)
    handle = Handle()
    # Micro-batches have as many examples each, so the mean over them is the mean over the step. Models that take the
    # number of labels and do not use it would keep the Trainer from taking that mean.
    handle.on_undo(replace_attribute(trainer, "model_accepts_loss_kwargs", False))
    return handle


class _Rows:
    """Labelled texts as rows to train on."""

    def __init__(self, rows: Examples) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        ids = torch.from_numpy(self._rows.input_ids[self._rows.span(index)].astype(np.int64))
        return {"input_ids": ids, "labels": torch.tensor(int(self._rows.classes[index]))}


class HeldOutExamples:
    """Held-out texts and what a classifier makes of them.

    Args:
        rows: the texts.
        padding: token id that batches are padded with.
        precision: ``fp32``, or ``bf16`` for the forward passes.
    """

    def __init__(self, rows: Examples, padding: int, precision: str) -> None:
        self._rows = rows
        self._padding = padding
        self._half = precision == "bf16"
        self._texts = _Rows(rows)
        each = max(1, CURVE_EXAMPLES // len(rows.names))
        first = [np.flatnonzero(rows.classes == index)[:each] for index in range(len(rows.names))]
        self._start = np.sort(np.concatenate(first))

    def on_the_way(self, model: PreTrainedModel) -> float:
        """Macro-averaged error over the first examples of each class, the same ones every time; NaN where a loss is."""
        return self._value(self._quality(model, self._start))

    def measure(self, model: PreTrainedModel) -> tuple[ClassQuality, float]:
        """What the model makes of every example; and what `on_the_way` gives."""
        whole = self._quality(model, np.arange(len(self._rows)))
        at = self._start
        labels, predictions, losses = (
            np.array(part)[at].tolist() for part in (whole.labels, whole.predictions, whole.log_loss)
        )
        start = ClassQuality(labels, predictions, losses, whole.names)
        return whole, self._value(start)

    @staticmethod
    def _value(quality: ClassQuality) -> float:
        return quality.value if quality.finite else float("nan")

    @torch.no_grad()
    def _quality(self, model: PreTrainedModel, which: NDArray[np.int64]) -> ClassQuality:
        was_training = model.training
        model.eval()
        lengths = np.diff(self._rows.ends, prepend=0)
        order = which[np.argsort(-lengths[which], kind="stable")]
        predictions, losses = np.zeros(len(self._rows), dtype=np.int64), np.zeros(len(self._rows))
        while len(order):
            batch, order = np.split(order, [max(1, _TOKENS_AT_ONCE // max(int(lengths[order[0]]), 1))])
            inputs = pad_rows([self._texts[int(index)] for index in batch], self._padding, mask=True)
            inputs = {name: values.to(model.device) for name, values in inputs.items()}
            labels = inputs.pop("labels")
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self._half):
                logits = model(**inputs).logits.float()
            predictions[batch] = logits.argmax(-1).cpu().numpy()
            losses[batch] = F.cross_entropy(logits, labels, reduction="none").double().cpu().numpy()
        model.train(was_training)
        classes, names = self._rows.classes[which].tolist(), self._rows.names.tolist()
        return ClassQuality(classes, predictions[which].tolist(), losses[which].tolist(), names)
