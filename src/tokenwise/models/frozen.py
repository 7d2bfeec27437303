"""The reference of a training: the hidden states that a frozen model gives the same batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.models.head import last_hidden, output_head
from tokenwise.models.reference import ReferenceModel
from tokenwise.signals.head import OutputHead


class FrozenStates:
    """Hidden states of a frozen model, and its head.

    Args:
        path: a local directory or a hub id; None for `target` as it is now.
        target: the model in training, or the PEFT model around it. Without a path, a PEFT model is its own
            reference with its adapters disabled, and of any other model a copy is kept.

    Raises:
        InputError: when the reference cannot be loaded or has another vocabulary, or when a PEFT model without its
            adapters is not the model as it is now.
    """

    def __init__(self, path: str | None, target: nn.Module, model: PreTrainedModel):
        self._adapters: Any = None
        self.model = model
        if path is not None:
            self.model = ReferenceModel(path, model).model
        elif (adapters := _adapters_of(target)) is not None:
            self._adapters = adapters
            self._check_adapters()
        else:
            if _has_adapters(model):
                raise InputError(
                    Problem(
                        "reference",
                        f"{type(model).__name__} carries adapters that are not in reach from here.",
                        "Give the model that peft.get_peft_model returned, or name a reference.",
                    )
                )
            gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
            for parameter, _ in gradients:
                parameter.grad = None
            try:
                self.model = copy.deepcopy(model).eval().requires_grad_(False)
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient

    @torch.no_grad()
    def states(self, *args: Any, **inputs: Any) -> tuple[Tensor, OutputHead]:
        """The hidden states of a batch, [positions, hidden], and the head that reads them."""
        if self._adapters is None:
            hidden = last_hidden(self.model, *args, **inputs)
            return hidden.reshape(-1, hidden.shape[-1]), output_head(self.model)
        with evaluating(self.model), self._adapters.disable_adapter():
            hidden = last_hidden(self.model, *args, **inputs)
            return hidden.reshape(-1, hidden.shape[-1]), output_head(self.model)

    @torch.no_grad()
    def _check_adapters(self) -> None:
        """Without its adapters the model must be what it is now: adapters trained before, or made out of the weights
        (PiSSA and its like), hold a part of it."""
        ids = torch.arange(4, device=self.model.device).unsqueeze(0) % output_head(self.model).vocabulary
        without, head = self.states(input_ids=ids)
        reference = head.logits(without.to(head.weight.dtype)).float()
        with evaluating(self.model):
            now = last_hidden(self.model, input_ids=ids)
        ours = output_head(self.model)
        gap = (ours.logits(now.reshape(without.shape).to(ours.weight.dtype)).float() - reference).abs().max().item()
        tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
        if not gap <= tolerance * max(reference.abs().max().item(), 1.0):
            raise InputError(
                Problem(
                    "reference",
                    "the model without its adapters is not the model as it is now, so it cannot be the reference "
                    f"(logits differ by {gap:.3g}).",
                    "Merge the trained adapters first (merge_and_unload) and start with new ones, or name a reference.",
                )
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _adapters_of(target: nn.Module) -> Any:
    while isinstance(target, nn.parallel.DistributedDataParallel):
        target = target.module
    if not hasattr(target, "disable_adapter"):
        return None
    configs: Any = getattr(target, "peft_config", {})
    if any(config.is_prompt_learning or config.is_adaption_prompt for config in configs.values()):
        raise InputError(
            Problem("reference", "a model with learnt prompts cannot be its own reference.", "Name a reference.")
        )
    return target


def _has_adapters(model: nn.Module) -> bool:
    return any(
        hasattr(module, "disable_adapters") and hasattr(module, "adapter_layer_names") for module in model.modules()
    )
