"""A running average of a model's parameters that scores labels as the model they make up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from tokenwise.models.head import last_hidden, output_head
from tokenwise.signals.head import token_statistics


class ParameterAverage:
    """``average = decay * average + (1 - decay) * parameter`` after every optimizer step that updates the model.

    Only parameters that train are averaged, in fp32: 4 bytes for each, next to nothing for adapters. The optimizer
    must hold the model's own whole parameters, which FSDP's does not.

    Args:
        model: the model in training; its parameters as they are now are where the average begins.
        decay: share of the average that stays in each step, in [0, 1).
    """

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model = model
        self.decay = decay
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone().float() for name, p in self.trained.items()}
        self._watch()

    def _watch(self) -> None:
        mine = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            average = mine()
            if average is not None and average._is_updated_by(optimizer):
                average.update()

        # The hook is torch's own for all optimizers; it ends with this object.
        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def _is_updated_by(self, optimizer: torch.optim.Optimizer) -> bool:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return any(id(parameter) in held for parameter in self.trained.values())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        for name, parameter in self.trained.items():
            self.averages[name].lerp_(parameter.float(), 1 - self.decay)

    @torch.no_grad()
    def nll(self, rows: Tensor, labels: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """Negative log-likelihood under the average of the labels at `rows` of the flattened batch, in nats: [tokens].

        Without dropout; the model's own parameters and mode are as before afterwards.
        """
        with self._in_place():
            hidden = last_hidden(self.model, *args, **inputs)
            head = output_head(self.model)
            return token_statistics(hidden.reshape(-1, hidden.shape[-1]), head, labels, rows=rows).nll

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        current = {name: parameter.data for name, parameter in self.trained.items()}
        try:
            self.model.eval()
            for name, parameter in self.trained.items():
                parameter.data = self.averages[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = current[name]
            for module, mode in modes.items():
                module.training = mode

    def tensors(self) -> dict[str, Tensor]:
        """The averages, by the parameters' names."""
        return self.averages

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        for name, average in self.averages.items():
            average.copy_(tensors[name])
