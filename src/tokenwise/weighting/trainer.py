"""Weighting inside transformers' Trainer: counting, correcting denominators, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenwise.errors import InputError, Problem
from tokenwise.models.patch import replace_attribute
from tokenwise.weighting.base import Normalize, TokenBatch, TokenWeighter
from tokenwise.weighting.columns import TrainingColumns
from tokenwise.weighting.diagnostics import log_weights
from tokenwise.weighting.forward import owns_denominator
from tokenwise.weighting.objective import Objective, ObjectiveForward
from tokenwise.weighting.sft_trainer import is_sft_trainer, sft_trainer_problems
from tokenwise.weighting.weighing import Weighing

_STATE = "tokenwise_state"


def check_trainer(trainer: Trainer, method: TokenWeighter | Objective, normalize: Normalize = "none") -> None:
    """Refuse settings under which the weighted loss would be wrong or ignored.

    Raises:
        InputError: with every such setting and the way out.
    """
    args = trainer.args
    found = []
    if isinstance(method, Objective) and any(base.__module__.startswith("trl.") for base in type(trainer).__mro__):
        found.append(
            Problem(
                "trainer",
                f"{type(trainer).__name__} makes its loss from weighted tokens, {type(method).__name__} from terms.",
                "Use transformers' Trainer.",
            )
        )
    elif is_sft_trainer(trainer):
        assert isinstance(method, TokenWeighter)
        found += sft_trainer_problems(trainer, method, normalize)
    elif any(base.__module__.startswith("trl.") for base in type(trainer).__mro__):
        found.append(
            Problem(
                "trainer",
                f"{type(trainer).__name__} computes its loss itself.",
                "Use SFTTrainer or transformers' Trainer.",
            )
        )
    if args.label_smoothing_factor != 0:
        found.append(
            Problem("args.label_smoothing_factor", f"{args.label_smoothing_factor} replaces the loss.", "Set it to 0.")
        )
    if trainer.compute_loss_func is not None:
        found.append(Problem("compute_loss_func", "replaces the model's loss.", "Leave it out."))
    if args.use_liger_kernel:
        found.append(Problem("args.use_liger_kernel", "patches the same forward.", "Set it to False."))
    if args.n_gpu > 1:
        found.append(
            Problem("args.n_gpu", f"{args.n_gpu} GPUs in one process use nn.DataParallel.", "Start with torchrun.")
        )
    if getattr(method, "needs_whole_parameters", False) and trainer.is_fsdp_enabled:
        found.append(Problem("args.fsdp", f"shards the parameters that {type(method).__name__} averages.", "Use DDP."))
    if isinstance(method, Objective):
        if args.world_size > 1 and not args.average_tokens_across_devices:
            message = f"is off, but {type(method).__name__} divides by counts of the whole optimizer step."
            found.append(Problem("args.average_tokens_across_devices", message, "Set it to True."))
    elif owns_denominator(method, normalize) or getattr(method, "scope", None) == "step":
        reason = f"{type(method).__name__} divides by a number only known at the end of the optimizer step"
        if trainer.is_deepspeed_enabled:
            found.append(Problem("args.deepspeed", f"{reason}, and DeepSpeed owns the gradients.", "Use FSDP or DDP."))
        if args.world_size > 1 and not args.average_tokens_across_devices:
            found.append(Problem("args.average_tokens_across_devices", f"is off, but {reason}.", "Set it to True."))
    if found:
        raise InputError(found)


def connect(trainer: Trainer, handle: Weighing, columns: TrainingColumns) -> None:
    """Patch `trainer` for a model that is weighed already, and carry its `columns`; undone with the handle."""
    forward, method = handle.forward, handle.method
    plain_batches, plain_step = trainer.get_batch_samples, trainer.training_step
    returned: list[Tensor] = []

    def get_batch_samples(
        epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        samples, items = plain_batches(epoch_iterator, num_batches, device)
        if samples:
            fix = "Check what masks them: a response template that never matches, or truncation before the answer."
            check_labels(trainer, items, fix)
        returned.clear()
        forward.step, forward.pending = trainer.state.global_step, None
        if isinstance(forward, ObjectiveForward):
            forward.begin_step(samples)
        forward.whole_step = len(samples) == 1 and trainer.args.world_size == 1
        if getattr(method, "scope", None) == "step" and not forward.whole_step:
            _decide_whole_step(trainer, handle, samples)
        return samples, items

    def training_step(model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        forward.items = num_items_in_batch
        loss = plain_step(model, inputs, num_items_in_batch)
        returned.append(loss)
        if forward.pending is None or not trainer.accelerator.sync_gradients:
            return loss
        assert num_items_in_batch is not None
        factor = handle.correct_gradients(num_items_in_batch)
        # The Trainer sums what the micro-batches return; the last one settles the account.
        return sum(returned[1:], start=returned[0]) * factor - sum(returned[:-1], start=torch.zeros_like(loss))

    # The patched forward takes the count whatever the model's own does, and divides by it.
    handle.on_undo(replace_attribute(trainer, "model_accepts_loss_kwargs", True))
    patch_trainer(trainer, handle, get_batch_samples, training_step)
    columns.connect(handle)
    log_weights(trainer, handle)


def check_labels(trainer: Trainer, items: Tensor | int | None, fix: str = "") -> Tensor | int:
    """Refuse an optimizer step without labels, and a first one in which all are ignored.

    Args:
        trainer: the trainer.
        items: how many labels it counted in the step.
        fix: what to do where all are ignored.

    Returns:
        The number of labels.

    Raises:
        InputError: naming what is wrong.
    """
    if items is None:
        raise InputError(Problem("labels", "are missing from the batch.", "Use a collator that makes labels."))
    if trainer.state.global_step == 0 and not int(items):
        message = "are all -100 in the first optimizer step, so there is nothing to learn."
        raise InputError(Problem("labels", message, fix))
    return items


def patch_trainer(
    trainer: Trainer, handle: Weighing, get_batch_samples: Callable[..., Any], training_step: Callable[..., Tensor]
) -> None:
    """Let `trainer` use these in the place of its methods, leave its loss undivided, and carry the method's state in
    its checkpoints; undone with the handle."""
    plain_load = trainer._load_optimizer_and_scheduler

    def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
        plain_load(checkpoint)
        if checkpoint is not None:
            _load_state(Path(checkpoint), trainer, handle)

    for name, value in (
        ("get_batch_samples", get_batch_samples),
        ("training_step", training_step),
        ("_load_optimizer_and_scheduler", load_optimizer_and_scheduler),
        ("loss_is_scaled_for_ga", True),
    ):
        handle.on_undo(replace_attribute(trainer, name, value))
    callback = _Checkpoints(trainer, handle)
    trainer.add_callback(callback)
    handle.on_undo(lambda: trainer.remove_callback(callback))


@torch.no_grad()
def _decide_whole_step(trainer: Trainer, handle: Weighing, samples: list[dict[str, Any]]) -> None:
    """Score every micro-batch of the step, rank or normalise them together over all processes, store the weights."""
    forward = handle.forward
    model = trainer.model_wrapped
    forward.scored = []
    try:
        # Dropout off: the weights are a property of the data under the model, not of one draw. The flag of the inner
        # model alone stays, because it is what routes the call to the weighted forward.
        model.eval()
        forward.model.training = True
        for sample in samples:
            with trainer.compute_loss_context_manager():
                model(**trainer._prepare_inputs(dict(sample)))
        scored = forward.scored
    finally:
        forward.scored = None
        model.train()
    mine = _join(scored)
    whole, start = _gathered(trainer, mine)
    weights = forward.decide(whole)[start : start + mine.labels.shape[0]]
    for sample, part in zip(samples, weights.split([batch.labels.shape[0] for batch in scored]), strict=True):
        sample["token_weights"] = part


_TENSORS = tuple(field.name for field in fields(TokenBatch) if field.default is None)


def _join(batches: list[TokenBatch]) -> TokenBatch:
    offsets = [sum(batch.sequences for batch in batches[:index]) for index in range(len(batches) + 1)]
    joined = TokenBatch(
        labels=torch.cat([batch.labels for batch in batches]),
        sequence=torch.cat([batch.sequence + offset for batch, offset in zip(batches, offsets, strict=False)]),
        sequences=offsets[-1],
        step=batches[0].step,
    )
    for name in _TENSORS:
        if getattr(batches[0], name) is not None:
            setattr(joined, name, torch.cat([getattr(batch, name) for batch in batches]))
    return joined


def _gathered(trainer: Trainer, mine: TokenBatch) -> tuple[TokenBatch, int]:
    """The tokens of all processes, and where this process's own begin."""
    if trainer.args.world_size == 1:
        return mine, 0
    accelerator = trainer.accelerator
    device = mine.labels.device
    sizes = accelerator.gather(torch.tensor([[mine.labels.shape[0], mine.sequences]], device=device)).tolist()

    def gather(values: Tensor) -> list[Tensor]:
        padded = accelerator.gather(accelerator.pad_across_processes(values, dim=0))
        longest = max(size for size, _ in sizes)
        return [padded[rank * longest : rank * longest + size] for rank, (size, _) in enumerate(sizes)]

    parts = [
        TokenBatch(labels, sequence, sequences, mine.step)
        for labels, sequence, (_, sequences) in zip(gather(mine.labels), gather(mine.sequence), sizes, strict=True)
    ]
    for name in _TENSORS:
        if getattr(mine, name) is not None:
            for part, values in zip(parts, gather(getattr(mine, name)), strict=True):
                setattr(part, name, values)
    return _join(parts), sum(size for size, _ in sizes[: trainer.args.process_index])


class _Checkpoints(TrainerCallback):
    """Writes the method's state beside every checkpoint."""

    def __init__(self, trainer: Trainer, handle: Weighing):
        self.trainer = trainer
        self.handle = handle

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(self.trainer._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.process_index == 0:
            text = json.dumps(_spec(self.handle), indent=1)
            (folder / "tokenwise_method.json").write_text(text + "\n", encoding="utf-8")
        if self.handle.state is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.handle.state.tensors().items()}
            safetensors.torch.save_file(tensors, folder / f"{_STATE}_{args.process_index}.safetensors")


def _spec(handle: Weighing) -> dict[str, Any]:
    """The method as checkpoints name it, and how it is normalised where it is."""
    normalize = handle.forward.normalize
    return handle.method.spec() | ({} if normalize == "none" else {"normalize": normalize})


def _load_state(checkpoint: Path, trainer: Trainer, handle: Weighing) -> None:
    file = checkpoint / "tokenwise_method.json"
    if not file.exists():
        raise InputError(
            Problem(
                "resume_from_checkpoint",
                f"{str(checkpoint)!r} was written without a weighting method.",
                "Resume without weighing, or start anew.",
            )
        )
    saved, ours = json.loads(file.read_text(encoding="utf-8")), _spec(handle)
    if saved != ours:
        raise InputError(
            Problem(
                "resume_from_checkpoint",
                f"{str(checkpoint)!r} was trained with {saved}, this run weighs with {ours}.",
                "Resume with the same method.",
            )
        )
    if handle.state is not None:
        handle.state.load_tensors(
            safetensors.torch.load_file(checkpoint / f"{_STATE}_{trainer.args.process_index}.safetensors")
        )
