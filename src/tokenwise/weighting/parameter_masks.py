"""Which parameters may change: scores of every single weight, masks from them, and training under a mask (WAGLE)."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenwise.errors import InputError, Problem, missing_file, nearest
from tokenwise.method import Card, Handle, Method, Paper
from tokenwise.policies.ranking import top_share_across
from tokenwise.weighting.batch_gradients import Batches, for_each_gradient

_WAGLE = Paper(
    title="WAGLE: Strategic Weight Attribution for Effective and Modular Unlearning in Large Language Models",
    arxiv="2410.17509",
    venue="NeurIPS 2024",
)


def wagle_scores(parameter: Tensor, forget_gradient: Tensor, retain_gradient: Tensor, mu: float) -> Tensor:
    """``|(parameter - retain_gradient / mu) * forget_gradient|``: how much forgetting hinges on each weight.

    Args:
        parameter: of any shape.
        forget_gradient: gradient of the loss to raise, of the same shape.
        retain_gradient: gradient of the loss to leave alone.
        mu: curvature that stands for the retain loss's Hessian, above 0.
    """
    return (parameter - retain_gradient / mu).mul_(forget_gradient).abs_()


def weighting_gradients(model: nn.Module, batches: Batches, field: str = "batches") -> dict[str, Tensor]:
    """Sum over batches of the gradient of each batch's mean loss, in evaluation mode.

    Takes one fp32 copy of the trainable parameters. In a distributed run every process sums its own batches: compute
    masks in one process, and load them in all.

    Args:
        model: a causal language model, possibly with PEFT adapters.
        batches: the model's inputs with ``labels``, once through.
        field: what an error calls the batches.

    Returns:
        A gradient of each parameter that requires one, by its name in the model; gradients the parameters held stay.

    Raises:
        InputError: when there is no batch, or the model has another head than the weighted loss knows.
    """
    parameters = _trainable(model)
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
    for_each_gradient(model, parameters, batches, field, lambda name, gradient, _: sums[name].add_(gradient))
    return sums


class ParameterMasks(Method):
    """Chooses the share of a model's parameters that may change, ranked over all of them together."""

    family: ClassVar[str] = "weighting"
    traits: ClassVar[tuple[str, ...]] = ("reads", "kind")
    kind: ClassVar[str] = "masks"
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which gradients the scores are made from: of ``forget``, of ``retain``, of both or none."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of all trainable parameters that may change."""

    def masks(
        self, model: nn.Module, forget: Batches | None = None, retain: Batches | None = None, *, seed: int = 0
    ) -> dict[str, Tensor]:
        """Which entries of the trainable parameters may change.

        Takes an fp32 copy of the trainable parameters for each gradient that the method reads. Embeddings of tokens
        that the forget data does not hold all score 0; where the share reaches into such ties, parameters that come
        first in the model stay.

        Args:
            model: a causal language model as it is before the training, possibly with PEFT adapters.
            forget: batches of what is to be unlearnt, with ``labels``.
            retain: batches of what is to be kept. Gradients are summed over batches, so that WAGLE's `mu` means the
                same only for as many of them.
            seed: of a random choice.

        Returns:
            A boolean mask for each trainable parameter, by its name in the model: True where it may change.

        Raises:
            InputError: when batches that the method reads are missing or empty.
        """
        batches = {"forget": forget, "retain": retain}
        missing = [name for name in ("forget", "retain") if name in self.reads and batches[name] is None]
        if missing:
            raise InputError(
                Problem(name, f"is missing: {type(self).__name__} reads its gradient.") for name in missing
            )
        gradients = {
            name: weighting_gradients(model, given, name)
            for name, given in batches.items()
            if name in self.reads and given is not None
        }
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            scores = {
                # Each gradient goes as its score comes.
                name: self.scores(
                    parameter.detach().float(), *(gradients[key].pop(name) for key in gradients), generator=generator
                )
                for name, parameter in _trainable(model).items()
            }
            return top_share_across(scores, self.keep)

    @abstractmethod
    def scores(self, parameter: Tensor, *gradients: Tensor, generator: torch.Generator) -> Tensor:
        """Scores of one parameter's entries, of its shape; larger may change sooner.

        Args:
            parameter: fp32.
            gradients: those that the method reads, the one of ``forget`` first.
            generator: on the CPU, for random choices.
        """


class Wagle(ParameterMasks):
    """Unlearn by changing only the weights that matter to what is forgotten, and least to what is kept.

    A weight's score is the first-order effect of the weight on the forget loss after the retain loss has settled:
    ``|(weight - retain gradient / mu) * forget gradient|``. Without a retain gradient it is SNIP's.
    """

    card: ClassVar[Card] = Card(
        id="weighting/wagle",
        paper=_WAGLE,
        needs=("a forget set and a retain set",),
        status="VERIFIED",
        checked="masks of the official code, run on a small model; the count is rounded half up (there down), and "
        "masked weights stay as they are (there weight decay and momentum still move them)",
        control="weighting/random_parameters",
    )  # fmt: skip
    reads: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})

    mu: Annotated[float, Field(gt=0)] = 1e-6
    """Curvature that stands for the retain loss's Hessian; smaller gives the retain gradient more say."""

    def scores(self, parameter: Tensor, *gradients: Tensor, generator: torch.Generator) -> Tensor:
        forget, retain = gradients
        return wagle_scores(parameter, forget, retain, self.mu)


class LargestGradients(ParameterMasks):
    """Change only the weights with the largest gradient on what is to be forgotten."""

    card: ClassVar[Card] = Card(
        id="weighting/largest_gradients",
        needs=("a forget set",),
        status="VERIFIED",
        checked="masks of WAGLE's official code, which has it as a baseline",
        control="weighting/random_parameters",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"forget"})

    def scores(self, parameter: Tensor, *gradients: Tensor, generator: torch.Generator) -> Tensor:
        return gradients[0].abs_()


class LargestWeights(ParameterMasks):
    """Change only the weights of largest magnitude."""

    card: ClassVar[Card] = Card(
        id="weighting/largest_weights",
        status="VERIFIED",
        checked="masks of WAGLE's official code, which has it as a baseline",
        control="weighting/random_parameters",
    )

    def scores(self, parameter: Tensor, *gradients: Tensor, generator: torch.Generator) -> Tensor:
        return parameter.abs()


class RandomParameters(ParameterMasks):
    """Change only a random share of the weights: what a chosen mask of that size must beat."""

    card: ClassVar[Card] = Card(
        id="weighting/random_parameters", status="VERIFIED", checked="exact counts, uniform frequencies"
    )

    def scores(self, parameter: Tensor, *gradients: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(parameter.shape, generator=generator).to(parameter.device)


def save_masks(masks: Mapping[str, Tensor], file: str | Path, method: ParameterMasks | None = None) -> None:
    """Write masks as safetensors, one byte for each entry, with the method's fields beside them.

    Args:
        masks: boolean tensors by parameter name.
        file: where to; an existing file is replaced at once.
        method: what made them.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    metadata = None if method is None else {"method": json.dumps(method.spec())}
    try:
        safetensors.torch.save_file({name: mask.contiguous() for name, mask in masks.items()}, temporary, metadata)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load_masks(file: str | Path) -> dict[str, Tensor]:
    """The masks that `save_masks` wrote, on the CPU.

    Raises:
        InputError: when there is no such file, or it holds something else.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(missing_file("file", file))
    try:
        masks = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise InputError(Problem("file", f"{str(file)!r} cannot be read: {error}.")) from error
    if any(mask.dtype != torch.bool for mask in masks.values()):
        raise InputError(Problem("file", f"{str(file)!r} holds tensors that are no masks."))
    return masks


def mask_parameters(target: Trainer | Optimizer, masks: Mapping[str, Tensor], model: nn.Module | None = None) -> Handle:
    """Train only the entries that the masks allow: from now on the others stay bit for bit what they are.

    Their gradients become zero after clipping and before each step of the optimizer; and what weight decay, momentum
    of earlier steps or any other part of the optimizer does to them is taken back after it. Parameters without a mask
    train whole. A mask that allows everything costs nothing and changes nothing.

    Checkpoints do not hold the masks: save them with `save_masks`, and call this again before resuming.

    Args:
        target: a transformers Trainer (its model's parameters are meant), or an optimizer.
        masks: boolean tensors by parameter name, True where an entry may change.
        model: whose parameters the names mean; with an optimizer only.

    Returns:
        A handle; from `undo()` on everything trains. Its `stats` count ``parameters`` (of the masks) and
        ``parameters_trained``.

    Raises:
        InputError: when a mask fits no parameter, or the parameters are sharded (FSDP, DeepSpeed).
    """
    handle = Handle()
    if isinstance(target, Trainer):
        sharded = {"fsdp": target.is_fsdp_enabled, "deepspeed": target.is_deepspeed_enabled}
        found = [
            Problem(f"args.{name}", "cuts parameters into pieces that masks do not fit.", "Train with DDP.")
            for name, enabled in sharded.items()
            if enabled
        ]
        if found:
            raise InputError(found)
        assert target.model is not None
        check_masks(target.model, masks)
        callback = _MaskSteps(masks)
        target.add_callback(callback)
        handle.on_undo(lambda: target.remove_callback(callback))
    else:
        if model is None:
            raise InputError(Problem("model", "is missing: an optimizer does not know its parameters' names."))
        check_masks(model, masks)
        frozen = _Frozen(model, masks)
        # Accelerate's optimizer calls the one it wraps, and has no hooks of its own.
        stepping: Optimizer = getattr(target, "optimizer", target)
        handle.on_undo(stepping.register_step_pre_hook(lambda *_: frozen.before_step()).remove)
        handle.on_undo(stepping.register_step_post_hook(lambda *_: frozen.after_step()).remove)
    handle.stats.update(
        parameters=sum(mask.numel() for mask in masks.values()),
        parameters_trained=sum(int(mask.sum()) for mask in masks.values()),
    )
    return handle


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that are none, or do not fit the model.

    Raises:
        InputError: with each of them.
    """
    parameters = dict(model.named_parameters())
    found = []
    for name, mask in masks.items():
        if name not in parameters:
            fix = nearest(name, parameters, "Make the masks with this model.")
            found.append(Problem(f"masks[{name!r}]", "fits no parameter of the model.", fix))
        elif mask.dtype != torch.bool:
            found.append(Problem(f"masks[{name!r}]", f"is of type {mask.dtype}.", "Give a boolean tensor."))
        elif mask.shape != parameters[name].shape:
            shapes = f"{tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
            found.append(Problem(f"masks[{name!r}]", f"has shape {shapes}."))
    if found:
        raise InputError(found)


class _Frozen:
    """The entries that must not change, and their values while the optimizer takes its step."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self._frozen = [
            (parameters[name], (~mask).to(parameters[name].device)) for name, mask in masks.items() if not mask.all()
        ]
        self._values: list[Tensor] = []

    @torch.no_grad()
    def before_step(self) -> None:
        self._values = [parameter.masked_select(frozen) for parameter, frozen in self._frozen]
        for parameter, frozen in self._frozen:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0)

    @torch.no_grad()
    def after_step(self) -> None:
        for (parameter, frozen), values in zip(self._frozen, self._values, strict=True):
            parameter.masked_scatter_(frozen, values)
        self._values = []


class _MaskSteps(TrainerCallback):
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks
        self._frozen: _Frozen | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._frozen is None:
            self._frozen = _Frozen(kwargs["model"], self._masks)
        self._frozen.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._frozen is not None
        self._frozen.after_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._frozen = None


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
