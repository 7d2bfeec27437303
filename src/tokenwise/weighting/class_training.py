"""Training a classifier under a `ClassObjective`: the patched forward, the counting of classes, the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer

from tokenwise.errors import InputError, Problem
from tokenwise.models.classifier import classifier_head, is_classifier, recorded
from tokenwise.models.head import base_of
from tokenwise.models.patch import replace_attribute
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.base import Run, State
from tokenwise.weighting.class_weights import mean_over_classes
from tokenwise.weighting.classification import ClassBatch, ClassObjective, as_counts
from tokenwise.weighting.trainer import check_labels, check_trainer, patch_trainer
from tokenwise.weighting.uniform import Uniform
from tokenwise.weighting.weighing import Weighing, check_not_weighed, replace_forward

_LABEL_COLUMNS = ("labels", "label", "label_ids")
_ROWS_AT_ONCE = 10_000


class ClassForward:
    """Computes the loss of the classifier `model` under `method`.

    Attributes:
        step: optimizer steps finished.
        progress: the share of the training that is done, in [0, 1].
        observe: called with the sum of the losses and the batch of every micro-batch that trains.
    """

    pending = None  # denominators are known from the labels, so no gradient needs a correction
    normalize = "none"

    def __init__(
        self, model: Any, method: ClassObjective, state: State | None, counts: Tensor | None, multi_label: bool
    ):
        self.model = model
        self.method = method
        self.state = state
        self.counts = counts
        self.multi_label = multi_label
        self.step = 0
        self.progress = 0.0
        self.observe: Callable[[Tensor, ClassBatch], None] | None = None

    def __call__(self, original: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
        """The model's output with the method's loss.

        Args:
            original: the model's own forward.
            inputs: its inputs with ``labels``, and perhaps ``num_items_in_batch``, what the sum of the losses is
                divided by: the denominator of this batch alone unless given.
        """
        labels, items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        output, batch = self.read(original, labels, *args, **inputs)
        losses = self.method.losses(batch, self.state)
        if losses.shape != batch.labels.shape[:1]:
            raise InputError(
                Problem(
                    f"{type(self.method).__name__}.losses",
                    f"gave shape {tuple(losses.shape)} for {batch.labels.shape[0]} examples.",
                    "Return one loss for each example of the batch.",
                )
            )
        # The empty sum of a batch without labels is a zero that has a gradient.
        total = losses.sum() + batch.logits[:0].sum()
        if self.observe is not None:
            self.observe(total.detach(), batch)
        divisor = self.denominator(labels) if items is None else torch.as_tensor(items)
        divisor = divisor.to(total)
        return type(output)(**{**output, "loss": total / divisor.where(divisor != 0, 1.0)})

    def read(self, original: Callable[..., Any], labels: Tensor, *args: Any, **inputs: Any) -> tuple[Any, ClassBatch]:
        """The model's output, and what the method gets to see of it."""
        inputs["return_dict"] = True
        if "features" not in self.method.reads:
            output = original(*args, **inputs)
            return output, self._batch(output.logits, labels)
        head = classifier_head(self.model)
        with recorded(head) as call:
            output = original(*args, **inputs)
        return output, self._batch(output.logits, labels, call.features(output.logits), head)

    def denominator(self, labels: Tensor) -> Tensor:
        """What the sum of the losses of these labels is divided by, a scalar in fp64."""
        labels = self._flat(labels)
        labels = labels if self.multi_label else labels[labels != IGNORED]
        return self.method.divisors(labels, self.counts, self.progress).sum()

    def _flat(self, labels: Tensor) -> Tensor:
        return labels if self.multi_label else labels.reshape(-1)

    def _batch(
        self, logits: Tensor, labels: Tensor, features: Tensor | None = None, head: nn.Linear | None = None
    ) -> ClassBatch:
        if labels.is_floating_point() and not self.multi_label:
            raise InputError(
                Problem(
                    "labels",
                    "are no class indices.",
                    'For several labels per example set model.config.problem_type = "multi_label_classification".',
                )
            )
        logits = logits.reshape(-1, logits.shape[-1])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = self._flat(labels)
        if labels.shape[0] != logits.shape[0]:
            raise InputError(
                Problem("labels", f"are {labels.shape[0]} for {logits.shape[0]} rows of logits.", "Give one for each.")
            )
        kept = slice(None) if self.multi_label else labels != IGNORED
        batch = ClassBatch(logits[kept], labels[kept], step=self.step, progress=self.progress)
        if "counts" in self.method.reads:
            assert self.counts is not None
            batch.counts = self.counts = self.counts.to(logits.device)
        if features is not None and head is not None:
            batch.features, batch.weight, batch.bias = features[kept], head.weight, head.bias
        return batch


class ClassWeighing(Weighing):
    """A classifier, or a trainer and its model, training under a method until `undo`.

    Attributes:
        method: the method.
        state: what the run of the method accumulated, or None.
        counts: examples of each class, [classes], or None where the method does not ask.
        stats: over the micro-batches so far: ``examples``, ``loss`` (the method's, per example) and ``cross_entropy``
            (plain, comparable between methods).
    """

    def __init__(self, forward: ClassForward):
        super().__init__(cast(Any, forward))
        self.counts = forward.counts
        self._totals = dict.fromkeys(("examples", "loss", "cross_entropy"), 0.0)

    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1]; a loop of your own sets it, a Trainer does by itself."""
        return cast(Any, self.forward).progress

    @progress.setter
    def progress(self, share: float) -> None:
        cast(Any, self.forward).progress = share

    def denominator(self, labels: Tensor) -> Tensor:
        """What the sum of the losses of these labels is divided by, a scalar.

        A loop that accumulates gradients adds it up over the labels of the step, and passes the sum as
        ``num_items_in_batch`` with each of its batches.
        """
        return cast(Any, self.forward).denominator(labels)

    @torch.no_grad()
    def observe(self, total: Tensor, batch: ClassBatch) -> None:  # type: ignore[override]
        """Add one micro-batch to `stats`."""
        nll = mean_over_classes(batch.nll()).double().sum()
        loss, cross_entropy = torch.stack([total.double(), nll]).tolist()
        for name, value in (("examples", batch.labels.shape[0]), ("loss", loss), ("cross_entropy", cross_entropy)):
            self._totals[name] += value
        count = max(self._totals["examples"], 1)
        self.stats.update(
            examples=self._totals["examples"],
            loss=self._totals["loss"] / count,
            cross_entropy=self._totals["cross_entropy"] / count,
        )


def weigh_classes(target: Trainer | nn.Module, method: ClassObjective, seed: int = 0) -> ClassWeighing:
    """Train a classifier under `method`; see `tokenwise.weigh`."""
    if not isinstance(target, Trainer):
        return _weigh_model(base_of(target), method, None, seed, 0)
    # As for plain cross-entropy: what to divide by is known from the labels, before the step.
    check_trainer(target, Uniform())
    assert isinstance(target.model, nn.Module)
    handle = _weigh_model(base_of(target.model), method, target, target.args.seed, target.args.process_index)
    _connect(target, handle)
    return handle


def _weigh_model(model: Any, method: ClassObjective, trainer: Trainer | None, seed: int, rank: int) -> ClassWeighing:
    multi_label = check_classifier(model, method)
    counts = None
    if "counts" in method.reads:
        counts = counts_of(method, trainer, model.config.num_labels, multi_label).to(model.device)
    state = method.start(Run(seed=seed, rank=rank, device=model.device))
    forward = ClassForward(model, method, state, counts, multi_label)
    handle = ClassWeighing(forward)
    forward.observe = handle.observe
    replace_forward(handle, functools.partial(forward, model.forward))
    return handle


def check_classifier(model: Any, method: ClassObjective) -> bool:
    """Refuse what the method's loss does not know, before anything is patched.

    Returns:
        Whether the model's examples may have several labels.

    Raises:
        InputError: naming what does not fit and the way out.
    """
    if not is_classifier(model):
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} is no classifier, which {type(method).__name__} needs.",
                "Give a model of transformers' …ForSequenceClassification or …ForTokenClassification.",
            )
        )
    check_not_weighed(model)
    kind = getattr(model.config, "problem_type", None)
    if kind == "regression" or model.config.num_labels < 2:
        raise InputError(
            Problem(
                "model.config",
                f"has num_labels {model.config.num_labels} and problem_type {kind!r}: there are no classes to weigh.",
                "Use two or more labels.",
            )
        )
    multi_label = kind == "multi_label_classification"
    if multi_label and not method.multi_label:
        raise InputError(
            Problem(
                "model.config.problem_type",
                f"{kind!r} has several labels per example, {type(method).__name__} knows one.",
                "Methods for several labels: class_uniform, class_focal, dice, ldam.",
            )
        )
    if "features" in method.reads:
        classifier_head(model)
    return multi_label


def counts_of(method: ClassObjective, trainer: Trainer | None, classes: int, multi_label: bool) -> Tensor:
    """Examples of each class, as the method's field says or as counted in the trainer's data: [classes], fp64.

    Raises:
        InputError: when neither can be had, or the method cannot work with the counts.
    """
    counts = as_counts(getattr(method, "counts", None))
    if counts is None:
        if trainer is None:
            raise InputError(
                Problem(
                    f"{type(method).__name__}.counts",
                    "must be given where there is no trainer whose data could be counted.",
                    "Write counts=[...], the number of examples of each class.",
                )
            )
        counts = count_classes(trainer.train_dataset, classes, multi_label)
    elif counts.shape[0] != classes:
        raise InputError(
            Problem(
                f"{type(method).__name__}.counts",
                f"has {counts.shape[0]} numbers, the model has {classes} classes.",
                "Give one number for each class.",
            )
        )
    found = method.problems(counts, multi_label)
    if found:
        raise InputError(found)
    return counts


def count_classes(dataset: Any, classes: int, multi_label: bool = False) -> Tensor:
    """How many examples (or tokens) of `dataset` have each class: [classes], fp64.

    Args:
        dataset: a data set of the datasets library, or any with a length whose items are mappings.
        classes: how many classes there are.
        multi_label: whether labels are rows of 0 and 1, one for each class.

    Raises:
        InputError: when there are no labels to count, or one is out of range.
    """
    where = "trainer.train_dataset"
    give = "Give the method counts=[...], the number of examples of each class."
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(Problem(where, f"{type(dataset).__name__} cannot be counted before training.", give))
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        columns = list(dataset[0]) if len(dataset) else []
    name = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if name is None:
        raise InputError(Problem(where, f"has no column of labels, only {', '.join(columns) or 'nothing'}.", give))
    count = _count_rows if multi_label else _count_labels
    counts = np.zeros(classes)
    for rows in _label_rows(dataset, name):
        counts += count(rows, classes, f"{where}.{name}")
    return torch.from_numpy(counts)


def _label_rows(dataset: Any, name: str) -> Iterator[list[NDArray[Any]]]:
    """The labels of each row, many rows at once where the data set gives them so."""
    if not isinstance(dataset, Dataset):
        yield [np.asarray(dataset[index][name]) for index in range(len(dataset))]
        return
    for rows in dataset.select_columns([name]).with_format(None).iter(_ROWS_AT_ONCE):
        yield [np.asarray(row) for row in rows[name]]


def _count_rows(rows: list[NDArray[Any]], classes: int, where: str) -> NDArray[np.float64]:
    """How many rows of 0 and 1 have each class: [classes]."""
    wrong = next((row.shape for row in rows if row.shape != (classes,)), None)
    if wrong is not None:
        raise InputError(Problem(where, f"has shape {wrong} for {classes} classes.", "Give 0 or 1 each."))
    return np.sum(rows, axis=0, dtype=np.float64)


def _count_labels(rows: list[NDArray[Any]], classes: int, where: str) -> NDArray[np.int64]:
    """How many labels of all rows are of each class: [classes]."""
    labels = np.concatenate([row.reshape(-1) for row in rows])
    labels = labels[labels != IGNORED]
    if labels.dtype.kind not in "iu" or (labels.size and not 0 <= labels.min() <= labels.max() < classes):
        bad = next(value for value in labels.tolist() if not (type(value) is int and 0 <= value < classes))
        raise InputError(
            Problem(where, f"has the label {bad!r}, the model classes 0 to {classes - 1}.", "Set num_labels.")
        )
    return np.bincount(labels, minlength=classes)


def _connect(trainer: Trainer, handle: ClassWeighing) -> None:
    """Patch `trainer` for a classifier that is weighed already; undone with the handle."""
    forward = cast(ClassForward, handle.forward)
    plain_batches, plain_step = trainer.get_batch_samples, trainer.training_step

    @contextmanager
    def counting() -> Iterator[None]:
        # Only while training: evaluation passes and divides what it always did.
        undo = replace_attribute(trainer, "model_accepts_loss_kwargs", True)
        try:
            yield
        finally:
            undo()

    def get_batch_samples(
        epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        with counting():
            samples, items = plain_batches(epoch_iterator, num_batches, device)
        if not samples:
            return samples, items
        items = check_labels(trainer, items)
        state = trainer.state
        forward.step, forward.progress = state.global_step, state.global_step / max(state.max_steps, 1)
        # The Trainer counted labels, over all processes and whatever shares a batch; ours is a multiple of that.
        labels = [sample["labels"] for sample in samples]
        found = torch.stack(
            [
                torch.stack([forward.denominator(each).to(device) for each in labels]).sum(),
                torch.stack([each.ne(IGNORED).sum().to(device) for each in labels]).sum().double(),
            ]
        )
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            found = trainer.accelerator.gather(found.unsqueeze(0)).sum(0)
        return samples, torch.as_tensor(items) * found[0] / found[1].clamp_min(1)

    def training_step(*args: Any, **options: Any) -> Tensor:
        with counting():
            return plain_step(*args, **options)

    patch_trainer(trainer, handle, get_batch_samples, training_step)
