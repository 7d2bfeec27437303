"""The language modelling task: train one model on a job's terms; measure what it cost and what came of it."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from tokenwise.comparison.data import Windows
from tokenwise.comparison.flops import FlopMeter
from tokenwise.comparison.held_out import HeldOut
from tokenwise.comparison.records import Job, Point, Result
from tokenwise.comparison.spending import Spending, learning_rate_factor
from tokenwise.models.load import load_tokenizer, make_or_load_model
from tokenwise.weighting.apply import token_weights, weigh
from tokenwise.weighting.base import Normalize, TokenWeighter

EXAMPLE_TOKENS = 100
_PROGRESS_SECONDS = 0.5
_ENDLESS = 2**40

Progress = Callable[[dict[str, Any]], None]


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is the reason in one sentence."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Train the job's model with the job's method until its budget is spent.

    The initial weights and the order of the data depend on the job's seed alone, never on its method. Evaluations
    count towards no cost.

    Args:
        job: of which `task` says what to train on.
        folder: gets the trained model and its tokenizer, in ``model``.
        progress: called with ``{"event": "progress", "share": ..., "loss": ..., "seconds": ...}``.

    Raises:
        RunFailed: as soon as a loss is not a finite number.
    """
    task, training = job.task, job.task["training"]
    tokenizer = load_tokenizer(task["tokenizer"])
    blocks = np.load(task["train_blocks"], mmap_mode="r")
    windows = Windows.load(task["held_out_windows"])
    method = _method(job)
    model = make_or_load_model(task["model"], job.seed, tokenizer)
    use_cache = model.config.use_cache

    def new_trainer(max_steps: int) -> Trainer:
        return _trainer(model, _EndlessBlocks(blocks, job.seed), training, job.seed, folder, max_steps)

    flops_per_step = _flops_of_one_step(new_trainer(1), method, training["normalize"])
    trainer = new_trainer(_ENDLESS)
    held_out = HeldOut(windows, training["precision"])
    with weigh(trainer, method, normalize=training["normalize"]) as handle:
        spending = Spending(job.budget, flops_per_step, handle.stats, model.device)
        optimizer = trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(
            optimizer, lambda _: learning_rate_factor(spending.share, training["warmup"], training["schedule"])
        )
        course = _Course(spending, model, held_out, training["evaluations"], progress)
        trainer.add_callback(course)
        _train(trainer)
        weights = {name: handle.stats[name] for name in ("mean_weight", "effective_sample_size", "kept_share")}

    losses = held_out.losses(model)
    _check_finite("held-out", float(losses.sum()), spending)
    course.add_point(held_out.start_of(losses))
    model.config.use_cache = use_cache  # the Trainer has turned it off
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Result(
        job=job,
        status="finished",
        quality=held_out.quality(losses),
        costs=spending.costs(),
        curve=course.curve,
        weights=weights,
        example=_example(model, method, tokenizer, windows, job.seed) if job.kind == "run" else None,
        versions=_versions(model.device),
    )


def _method(job: Job) -> TokenWeighter:
    [(name, fields)] = job.method.items()
    if "reference" in job.task:  # the plan's name of it stands in the method; here is where it lies
        fields = {**fields, "reference": job.task["reference"]}
    folder = Path(job.task["method_folder"]) if "method_folder" in job.task else None
    method = catalog.build({name: fields}, "method", folder)
    assert isinstance(method, TokenWeighter)
    return method


class _EndlessBlocks(Dataset[Tensor]):
    """Blocks of token ids in an order that depends on the seed alone, shuffled anew for every pass.

    One endless sequence instead of epochs: every optimizer step has the same size, and costs the same.

    Args:
        blocks: shape [blocks, tokens].
        seed: of the order.
    """

    def __init__(self, blocks: NDArray[np.int32], seed: int) -> None:
        self._blocks = blocks
        self._seed = seed
        self._pass = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        which, place = divmod(index, len(self._blocks))
        if which != self._pass:
            self._pass = which
            self._order = np.random.default_rng([self._seed, which]).permutation(len(self._blocks))
        return torch.from_numpy(self._blocks[self._order[place]].astype(np.int64))


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def _trainer(
    model: PreTrainedModel, blocks: _EndlessBlocks, training: dict[str, Any], seed: int, folder: Path, max_steps: int
) -> Trainer:
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
        train_sampling_strategy="sequential",  # the blocks come shuffled
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks, data_collator=_collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _DropGradients(TrainerCallback):
    """Makes the optimizer's step change nothing."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].zero_grad(set_to_none=True)


def _flops_of_one_step(trainer: Trainer, method: TokenWeighter, normalize: Normalize = "none") -> int:
    """Operations of the first optimizer step as the Trainer takes it, the method's own passes included.

    The model stays as it was. Time is not measured here: counting slows down what it counts.
    """
    trainer.add_callback(_DropGradients)
    meter = FlopMeter()
    with weigh(trainer, method, normalize=normalize), meter:
        _train(trainer)
    return meter.flops


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
        control.should_training_stop = self._spending.share >= 1

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
            self.add_point(self._held_out.loss_at_start(self._model))
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
        """Put a held-out loss, in nats per token, on the curve."""
        _check_finite("held-out", held_out, self._spending)
        costs = self._spending.costs()
        (before, counted), self._trained = self._trained, self._spending.training_loss
        losses, tokens = self._trained[0] - before, self._trained[1] - counted
        self.curve.append(
            Point(
                share=self._spending.share,
                tokens_seen=costs.tokens_seen or 0,
                tokens_trained=costs.tokens_trained or 0,
                flops=costs.flops,
                wall_seconds=costs.wall_seconds or 0.0,
                held_out=held_out,
                train=losses / tokens if tokens else None,
            )
        )


def _check_finite(which: str, loss: float, spending: Spending) -> None:
    if not math.isfinite(loss):
        raise RunFailed(f"The {which} loss became {loss} at step {spending.steps}: the training diverged.")


def _example(
    model: PreTrainedModel, method: TokenWeighter, tokenizer: PreTrainedTokenizerBase, windows: Windows, seed: int
) -> dict[str, list[Any]]:
    """The start of the first held-out text that is long enough, with the weight the method gives each token now."""
    long_enough = np.flatnonzero(windows.lengths >= min(EXAMPLE_TOKENS, windows.lengths.max()))
    window = int(long_enough[0])
    ids = windows.input_ids[window, : min(EXAMPLE_TOKENS, windows.lengths[window])].tolist()
    weights = token_weights(model, method, ids, seed).weights
    return {"tokens": [tokenizer.decode([token]) for token in ids], "weights": weights}


def _versions(device: torch.device) -> dict[str, str]:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("tokenwise", "torch", "transformers", "accelerate")},
        "machine": f"{platform.system()} {machine}",
        "device": device.type,
        "threads": str(torch.get_num_threads()),
    }
