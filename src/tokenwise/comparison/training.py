"""One training run, whatever its task: the Trainer with a method, a budget and meters, evaluated on the way."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tokenwise import catalog
from tokenwise.comparison.quality import Quality
from tokenwise.comparison.records import Job, Point, Result
from tokenwise.comparison.rows import Labelled
from tokenwise.comparison.spending import Spending, learning_rate_factor
from tokenwise.method import Handle, Method
from tokenwise.models import machine
from tokenwise.models.flops import FlopMeter
from tokenwise.scores.layout import is_store
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.apply import token_weights
from tokenwise.weighting.base import TokenWeighter
from tokenwise.weighting.diagnostics import DECILES

EXAMPLE_TOKENS = 100
METERED_STEPS = 4
"""Where steps differ in length, operations are a mean over so many."""
WEIGHTS = (
    *("mean_weight", "effective_sample_size", "kept_share", "effective_learning_rate"),
    *(f"gradient_share_decile_{decile}" for decile in range(1, DECILES + 1)),
)
"""What a result keeps of a `Weighing`'s stats."""
_PROGRESS_SECONDS = 0.5
_ENDLESS = 2**40

Row = Mapping[str, Tensor]
Progress = Callable[[dict[str, Any]], None]
Attach = Callable[[Trainer, Any], Handle]


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is the reason in one sentence."""


class HeldOut(Protocol):
    """What a model is measured on."""

    def measure(self, model: PreTrainedModel) -> tuple[Quality, float]:
        """The quality on all items, and what `on_the_way` gives at the same time."""
        ...

    def on_the_way(self, model: PreTrainedModel) -> float:
        """The quality's `curve_measure`, on the same items every time."""
        ...


class Rows(Protocol):
    """What a model is trained on."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """A row's tensors by the name of the model's input; those of its tokens have shape [tokens]."""
        ...


def run_training(
    job: Job,
    folder: Path,
    progress: Progress,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    rows: Rows | Dataset[Any],
    held_out: HeldOut,
    attach: Attach,
    collate: Callable[[Sequence[Any]], dict[str, Tensor]],
    metered_steps: int = 1,
    labelled_tokens: bool = True,
    shown: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
) -> Result:
    """Train `model` with `method` until the job's budget is spent.

    The order of the data depends on the job's seed alone, never on its method. Evaluations count towards no cost.

    Args:
        job: seed, budget and ``task["training"]`` are read.
        folder: gets the trained model and its tokenizer, in ``model``.
        progress: called with ``{"event": "progress", "share": ..., "loss": ..., "seconds": ...}``.
        model: the model, changed in place.
        tokenizer: saved with it.
        method: what to train with.
        rows: what to train on; a Dataset is endless already and taken in its order.
        held_out: what to measure on.
        attach: lets a Trainer train with the method.
        collate: makes a batch of rows.
        metered_steps: over how many optimizer steps operations are counted; 1 where all steps have the same size.
        labelled_tokens: whether tokens have labels, which are then counted as seen and trained on; else all tokens that
            are read are seen, and what is trained on is not measured.
        shown: token ids and labels of a held-out text, [tokens] each, to show what the method, a `TokenWeighter`,
            makes of it after training.

    Raises:
        RunFailed: as soon as a loss is not a finite number.
    """
    training = job.task["training"]
    use_cache = getattr(model.config, "use_cache", None)

    def new_trainer(max_steps: int) -> Trainer:
        endless = rows if isinstance(rows, Dataset) else EndlessRows(rows, job.seed)
        return make_trainer(model, endless, collate, training, job.seed, folder, max_steps)

    flops_per_token = count_flops(new_trainer(metered_steps), method, attach)
    trainer = new_trainer(_ENDLESS)
    with attach(trainer, method) as handle, _Forwarded(model) as forwarded:
        stats = handle.stats if labelled_tokens else forwarded.stats
        spending = Spending(job.budget, lambda: flops_per_token * forwarded.padded, stats, model.device)
        optimizer = trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(
            optimizer, lambda _: learning_rate_factor(spending.share, training["warmup"], training["schedule"])
        )
        course = _Course(spending, model, held_out, training["evaluations"], progress)
        trainer.add_callback(course)
        _train(trainer)
        weights = {name: handle.stats[name] for name in WEIGHTS if name in handle.stats}

    quality, point = held_out.measure(model)
    if not quality.finite:
        raise RunFailed(f"A held-out loss is not finite at step {spending.steps}: the training diverged.")
    course.add_point(point)
    if use_cache is not None:
        model.config.use_cache = use_cache  # the Trainer has turned it off
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    example = None
    if shown is not None and job.kind == "run":
        assert isinstance(method, TokenWeighter)
        example = example_of(model, method, tokenizer, *shown, job.seed)
    return Result(
        job=job,
        status="finished",
        quality=quality,
        costs=spending.costs(),
        curve=course.curve,
        weights=weights,
        example=example,
        versions=versions_of(model.device),
    )


def build_method(job: Job, family: str = "weighting") -> Method:
    """The method of a job, of a family, with the place of its reference."""
    [(name, fields)] = job.method.items()
    if "reference" in job.task:  # the plan's name of it stands in the method; here is where it lies
        fields = {**fields, "reference": job.task["reference"]}
    folder = Path(job.task["method_folder"]) if "method_folder" in job.task else None
    return catalog.build({name: fields}, "method", folder, family)


def reads_scores(method: Method) -> bool:
    """Whether the method's reference is a folder of token scores. They are found by the ids of a row without its
    padding, so that batches need a mask."""
    reference = getattr(method, "reference", None)
    return reference is not None and is_store(reference)


class EndlessRows(Dataset[Row]):
    """Rows in an order that depends on the seed alone, shuffled anew for every pass.

    One endless sequence instead of epochs: every optimizer step has as many rows.

    Args:
        rows: what there is.
        seed: of the order, at least 0.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._pass = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Row:
        which, place = divmod(index, len(self._rows))
        if which != self._pass:
            self._pass = which
            self._order = np.random.default_rng([self._seed, which]).permutation(len(self._rows))
        return self._rows[int(self._order[place])]


def labelled_row(rows: Labelled, index: int) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` of a row, [tokens] each."""
    span = rows.span(index)
    return {name: torch.from_numpy(getattr(rows, name)[span].astype(np.int64)) for name in ("input_ids", "labels")}


def pad_rows(rows: Sequence[Row], padding: int, mask: bool) -> dict[str, Tensor]:
    """A batch, padded on the right: ``input_ids`` with `padding`, ``labels`` with -100, other columns with 0.

    Args:
        rows: of equal columns; tensors of shape [tokens] are padded, those without a dimension stacked.
        padding: the token id.
        mask: whether the model must be told what is padding. A causal model needs no mask: it never looks ahead.

    Returns:
        The columns as [rows, tokens] or [rows].
    """
    fill = {"input_ids": padding, "labels": IGNORED}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, fill.get(name, 0))
        if values.dim()
        else torch.stack([row[name] for row in rows])
        for name, values in rows[0].items()
    }
    if mask:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def make_trainer(
    model: PreTrainedModel,
    rows: Dataset[Any],
    collate: Callable[[Sequence[Any]], dict[str, Tensor]],
    training: Mapping[str, Any],
    seed: int,
    folder: Path,
    max_steps: int,
) -> Trainer:
    """The Trainer of a run, silent, without checkpoints and schedules of its own."""
    on_cpu = not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=training["batch_size"],
        gradient_accumulation_steps=training["accumulate"],
        learning_rate=training["learning_rate"],
        weight_decay=training["weight_decay"],
        max_grad_norm=training["max_grad_norm"],
        bf16=training["precision"] == "bf16",
        use_cpu=on_cpu,
        seed=seed,
        train_sampling_strategy="sequential",  # the rows come shuffled
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _DropGradients(TrainerCallback):
    """Makes the optimizer's step change nothing."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].zero_grad(set_to_none=True)


class _Forwarded:
    """Counts the tokens that go through a model while it trains.

    Attributes:
        padded: how many, padding included; what is read twice counts twice.
        stats: ``labels``, how many without padding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.padded = 0
        self.stats: dict[str, float] = {"labels": 0}
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if model.training:
            self.padded += inputs["input_ids"].numel()
            mask = inputs.get("attention_mask")
            self.stats["labels"] += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def __enter__(self) -> _Forwarded:
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def count_flops(trainer: Trainer, method: Method, attach: Attach) -> float:
    """Operations for each token of the Trainer's first optimizer steps, the method's own passes included.

    The model stays as it was. Time is not measured here: counting slows down what it counts. Where batches are padded
    to different lengths this is a mean, of the same batches for every method of a seed.
    """
    trainer.add_callback(_DropGradients)
    meter = FlopMeter()
    assert trainer.model is not None
    with attach(trainer, method), _Forwarded(trainer.model) as forwarded, meter:  # type: ignore[arg-type]
        _train(trainer)
    return meter.flops / forwarded.padded


def _train(trainer: Trainer) -> None:
    trainer.train()
    # Accelerate leaves its autocast on the instance, around a weighted forward that is about to end. The model is ours
    # and had neither attribute before.
    for name in ("forward", "_original_forward"):
        vars(trainer.model).pop(name, None)


class _Course(TrainerCallback):
    """Stops a run when its budget is spent, evaluates on the way, and ends it at a loss that is not finite."""

    def __init__(
        self, spending: Spending, model: PreTrainedModel, held_out: HeldOut, evaluations: int, progress: Progress
    ) -> None:
        self._spending = spending
        self._model = model
        self._held_out = held_out
        self._evaluations = evaluations
        self._evaluated = 0
        self._progress = progress
        self._reported_at = -math.inf
        self._trained = (0.0, 0.0)
        self.curve: list[Point] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._spending.resume()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._spending.steps += 1  # before the scheduler asks for the next learning rate

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        share = self._spending.share
        control.should_training_stop = share >= 1
        # A method that asks how far the training is reads global_step / max_steps; the loop must not end by it.
        state.max_steps = max(state.global_step + 2, round(state.global_step / share)) if share else _ENDLESS

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after every step with its loss, and once more at the end without."""
        if "loss" not in kwargs["logs"]:
            return
        loss, share = kwargs["logs"]["loss"], self._spending.share
        _check_finite("training", loss, self._spending)
        due = int(share * self._evaluations)
        if share < 1 and due > self._evaluated:
            self._evaluated = due
            self._spending.pause()
            self.add_point(self._held_out.on_the_way(self._model))
            self._spending.resume()
        if share >= 1 or time.monotonic() - self._reported_at > _PROGRESS_SECONDS:
            self._reported_at = time.monotonic()
            seconds = self._spending.seconds
            self._progress({"event": "progress", "share": min(share, 1.0), "loss": loss, "seconds": seconds})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._spending.pause()

    def add_point(self, held_out: float) -> None:
        """Put a held-out quality on the curve."""
        _check_finite("held-out", held_out, self._spending)
        costs = self._spending.costs()
        (before, counted), self._trained = self._trained, self._spending.training_loss
        losses, tokens = self._trained[0] - before, self._trained[1] - counted
        self.curve.append(
            Point(
                share=self._spending.share,
                tokens_seen=costs.tokens_seen or 0,
                tokens_trained=costs.tokens_trained,
                flops=costs.flops,
                wall_seconds=costs.wall_seconds or 0.0,
                held_out=held_out,
                train=losses / tokens if tokens else None,
            )
        )


def _check_finite(which: str, loss: float, spending: Spending) -> None:
    if not math.isfinite(loss):
        raise RunFailed(f"The {which} loss became {loss} at step {spending.steps}: the training diverged.")


def example_of(
    model: PreTrainedModel,
    method: TokenWeighter,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    seed: int,
) -> dict[str, list[Any]] | None:
    """The start of a text with the weight the method gives each token now; None where it needs columns for that, or
    scores, which are of the training data."""
    if method.reads & {"loss_weights", "sample_id"} or reads_scores(method):
        return None
    ids, targets = (values[:EXAMPLE_TOKENS].tolist() for values in (input_ids, labels))
    weights = token_weights(model, method, ids, seed, labels=targets).weights
    return {"tokens": [tokenizer.decode([token]) for token in ids], "weights": weights}


def versions_of(device: torch.device) -> dict[str, str]:
    """What a result was made with: packages, machine, device and threads."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("tokenwise", "torch", "transformers", "accelerate")},
        "machine": machine.name_of(device),
        "device": device.type,
        "threads": str(torch.get_num_threads()),
    }
