"""The language modelling task: train one model on a job's terms; measure what it cost and what came of it."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tokenwise import catalog
from tokenwise.comparison.data import Window, held_out_windows, read_documents, token_blocks
from tokenwise.comparison.flops import FlopMeter
from tokenwise.comparison.memory import PeakMemory
from tokenwise.comparison.records import Costs, Job, Point, Quality, Result
from tokenwise.method import Handle, Method
from tokenwise.models.load import load_tokenizer, make_or_load_model
from tokenwise.weighting.apply import weigh

CURVE_TOKENS = 20_000
"""Evaluations on the way use the first held-out windows up to this many labels; the last one uses all."""
_LOGITS_AT_ONCE = 2**24
_ENDLESS = 2**40
PROGRESS_SECONDS = 0.5

Progress = Callable[[dict[str, Any]], None]


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is the reason in one sentence."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Train the job's model with the job's method until its budget is spent.

    The initial weights and the order of the data depend on the job's seed alone, never on its method.

    Args:
        job: of which `task` says what to train on; a method's reference must be a folder by now.
        folder: gets the trained model and its tokenizer, in ``model``.
        progress: called with ``{"event": "progress", "share": ..., "loss": ..., "seconds": ...}``.

    Raises:
        RunFailed: when a loss is not a finite number.
    """
    task, training = job.task, job.task["training"]
    tokenizer = load_tokenizer(task["tokenizer"])
    length = task["sequence_length"]
    blocks = token_blocks(read_documents(task["train"], task["text_field"]), tokenizer, length)
    held_out = HeldOut(held_out_windows(read_documents(task["eval"], task["text_field"]), tokenizer, length), training)
    model = make_or_load_model(task["model"], job.seed, tokenizer)
    use_cache = model.config.use_cache
    method = catalog.build(job.method)

    def new_trainer(**arguments: Any) -> Trainer:
        return _trainer(model, _EndlessBlocks(blocks, job.seed), training, job.seed, folder, **arguments)

    flops_per_step = _flops_of_one_step(new_trainer(max_steps=1), method)
    trainer = new_trainer(max_steps=_ENDLESS)
    with weigh(trainer, method) as handle:
        meter = Meter(job.budget, flops_per_step, handle.stats, model.device)
        trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda _: learning_rate_factor(meter.share, training))
        course = _Course(meter, model, held_out, training["evaluations"], progress)
        trainer.add_callback(course)
        trainer.train()
        weights = _summary(handle)

    losses = held_out.losses(model)
    if training["evaluations"]:
        course.add_point(held_out.start_of(losses))
    model.config.use_cache = use_cache  # the Trainer turned it off
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Result(
        job=job,
        status="finished",
        quality=held_out.quality(losses),
        costs=meter.costs(),
        curve=course.curve,
        weights=weights,
        model_dir="model",
        versions=_versions(model.device),
    )


class Meter:
    """What a run has spent so far, and which share of its budget that is.

    Time and memory are measured between `resume` and `pause` only.

    Args:
        budget: ``{"unit": "steps" | "tokens_seen" | "tokens_trained" | "flops", "amount": ...}``.
        flops_per_step: of one optimizer step.
        stats: where ``tokens_seen`` and ``tokens_trained`` are being counted.
        device: where the model is.
    """

    def __init__(
        self, budget: dict[str, Any], flops_per_step: int, stats: dict[str, float], device: torch.device
    ) -> None:
        self._budget = budget
        self._flops_per_step = flops_per_step
        self._stats = stats
        self._device = device
        self._memory = PeakMemory(device)
        self._seconds = 0.0
        self._resumed_at: float | None = None
        self.steps = 0

    def resume(self) -> None:
        """Let time run and memory count."""
        self._memory.resume()
        self._resumed_at = self._now()

    def pause(self) -> None:
        """Stop both."""
        self._seconds, self._resumed_at = self.seconds, None
        self._memory.pause()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time between `resume` and `pause` so far."""
        return self._seconds + (0.0 if self._resumed_at is None else self._now() - self._resumed_at)

    @property
    def share(self) -> float:
        """Share of the budget spent; the last step may take it above 1."""
        return self._spent(self._budget["unit"]) / self._budget["amount"]

    def _spent(self, unit: str) -> float:
        if unit == "steps":
            return self.steps
        if unit == "flops":
            return self.steps * self._flops_per_step
        return self._stats.get(unit, 0)

    def costs(self) -> Costs:
        """Everything spent so far."""
        return Costs(
            flops=float(self._spent("flops")),
            wall_seconds=self.seconds,
            peak_memory_bytes=self._memory.peak,
            tokens_seen=round(self._spent("tokens_seen")),
            tokens_trained=round(self._spent("tokens_trained")),
            steps=self.steps,
        )

    def point(self, held_out: float) -> Point:
        """The place on the curve where the run is now, with a held-out loss in nats per token."""
        costs = self.costs()
        return Point(
            share=self.share,
            tokens_seen=costs.tokens_seen or 0,
            tokens_trained=costs.tokens_trained or 0,
            flops=costs.flops,
            wall_seconds=self.seconds,
            held_out=held_out,
        )


def learning_rate_factor(share: float, training: dict[str, Any]) -> float:
    """What to multiply the learning rate with once `share` of the budget is spent: a linear warm-up, then a schedule.

    Args:
        share: at least 0; everything from 1 on counts as 1.
        training: ``warmup`` is a share in [0, 1), ``schedule`` one of ``constant``, ``linear``, ``cosine``; the last
            two end at zero.
    """
    warmup, schedule = training["warmup"], training["schedule"]
    if share < warmup:
        return share / warmup
    if schedule == "constant":
        return 1.0
    left = (1 - min(share, 1.0)) / (1 - warmup)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


class HeldOut:
    """The held-out documents, cut into windows, and the unweighted loss of a model on them.

    Args:
        windows: in the order of their documents.
        training: its ``precision`` is used for the forward passes.
    """

    def __init__(self, windows: list[Window], training: dict[str, Any]) -> None:
        self._windows = windows
        self._half = training["precision"] == "bf16"
        labels = 0
        for count, window in enumerate(windows, start=1):
            labels += window.labels
            if labels >= CURVE_TOKENS:
                break
        self._start = count

    def start_of(self, losses: list[float]) -> float:
        """Loss in nats per token over the windows that evaluations on the way use."""
        return sum(losses[: self._start]) / sum(window.labels for window in self._windows[: self._start])

    def loss_at_start(self, model: PreTrainedModel) -> float:
        """As `start_of`, measured now."""
        return self.start_of(self._losses(model, self._windows[: self._start]))

    def losses(self, model: PreTrainedModel) -> list[float]:
        """Summed negative log-likelihood of each window, in nats."""
        return self._losses(model, self._windows)

    @torch.no_grad()
    def _losses(self, model: PreTrainedModel, windows: list[Window]) -> list[float]:
        training = model.training
        model.eval()
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index].input_ids))
        losses = [0.0] * len(windows)
        while order:
            length = len(windows[order[0]].input_ids)
            count = max(1, _LOGITS_AT_ONCE // (length * model.config.vocab_size))
            batch, order = order[:count], order[count:]
            for index, loss in zip(batch, self._batch(model, [windows[index] for index in batch]), strict=True):
                losses[index] = loss
        model.train(training)
        if not all(map(math.isfinite, losses)):
            raise RunFailed("The held-out loss is not a finite number: the training has diverged.")
        return losses

    def _batch(self, model: PreTrainedModel, windows: list[Window]) -> list[float]:
        # Padding on the right needs no mask: attention is causal, and the padding's own labels are ignored.
        length = len(windows[0].input_ids)
        ids = torch.zeros(len(windows), length, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, window in enumerate(windows):
            end = len(window.input_ids)
            ids[row, :end] = torch.as_tensor(window.input_ids)
            labels[row, end - window.labels : end] = ids[row, end - window.labels : end]
        ids, labels = ids.to(model.device), labels.to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self._half):
            logits = model(input_ids=ids, use_cache=False).logits
        nll = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
        )
        return nll.view(len(windows), -1).double().sum(1).tolist()

    def quality(self, losses: list[float]) -> Quality:
        """The losses summed up for each document."""
        documents = sorted({window.document for window in self._windows})
        place = {document: index for index, document in enumerate(documents)}
        quality = Quality([0.0] * len(place), [0] * len(place), [0] * len(place))
        for window, loss in zip(self._windows, losses, strict=True):
            index = place[window.document]
            quality.nll[index] += loss
            quality.tokens[index] += window.labels
            quality.bytes[index] += window.bytes
        return quality


def held_out_loss(model: PreTrainedModel, windows: list[Window], precision: str = "fp32") -> Quality:
    """Unweighted loss of `model` on held-out windows, per document."""
    held_out = HeldOut(windows, {"precision": precision})
    return held_out.quality(held_out.losses(model))


class _EndlessBlocks(Dataset[Tensor]):
    """Blocks of token ids [blocks, length] in an order that depends on the seed alone, shuffled anew for every pass.

    One endless sequence instead of epochs: every optimizer step has the same size, and costs the same.
    """

    def __init__(self, blocks: Tensor, seed: int) -> None:
        self._blocks = blocks
        self._seed = seed
        self._pass = -1
        self._order = torch.empty(0)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        which, place = divmod(index, len(self._blocks))
        if which != self._pass:
            generator = torch.Generator().manual_seed(self._seed + 2**32 * which)
            self._pass, self._order = which, torch.randperm(len(self._blocks), generator=generator)
        return self._blocks[self._order[place]]


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
    """Makes the optimizer's step do nothing, and leave nothing behind."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].zero_grad(set_to_none=True)


def _flops_of_one_step(trainer: Trainer, method: Method) -> int:
    """Operations of one optimizer step as the Trainer takes it, on the first data; the model stays as it was."""
    trainer.add_callback(_DropGradients)
    with weigh(trainer, method), FlopMeter() as meter:
        trainer.train()
    return meter.flops


class _Course(TrainerCallback):
    """Stops a run when its budget is spent, evaluates on the way, and ends it at a loss that is no number."""

    def __init__(
        self, meter: Meter, model: PreTrainedModel, held_out: HeldOut, evaluations: int, progress: Progress
    ) -> None:
        self._meter = meter
        self._model = model
        self._held_out = held_out
        self._evaluations = evaluations
        self._progress = progress
        self._evaluated = 0
        self._reported_at = -math.inf
        self.curve: list[Point] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meter.resume()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meter.steps += 1  # before the learning rate is set for the next step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = self._meter.share >= 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Runs after every step, with its loss."""
        if not logs or "loss" not in logs:
            return
        loss, share = logs["loss"], self._meter.share
        if not math.isfinite(loss):
            raise RunFailed(f"The training loss became {loss} at step {self._meter.steps}.")
        due = int(share * self._evaluations)
        if share < 1 and due > self._evaluated:
            self._evaluated = due
            self._meter.pause()
            self.add_point(self._held_out.loss_at_start(self._model))
            self._meter.resume()
        if share >= 1 or time.monotonic() - self._reported_at > PROGRESS_SECONDS:
            self._reported_at = time.monotonic()
            self._progress(
                {"event": "progress", "share": min(share, 1.0), "loss": loss, "seconds": self._meter.seconds}
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meter.pause()

    def add_point(self, held_out: float) -> None:
        """Note a held-out loss on the curve."""
        self.curve.append(self._meter.point(held_out))


def _summary(handle: Handle) -> dict[str, float]:
    """Means over training of what the method's weights looked like."""
    return {name: handle.stats[name] for name in ("mean_weight", "effective_sample_size", "kept_share")}


def _versions(device: torch.device) -> dict[str, str]:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = {name: version(name) for name in ("tokenwise", "torch", "transformers", "accelerate")}
    return {
        "python": platform.python_version(),
        **packages,
        "machine": f"{platform.system()} {machine}",
        "device": device.type,
        "threads": str(torch.get_num_threads()),
    }
