"""Gradients of the plain loss over whole data sets, handed on one parameter at a time and never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.head import base_of
from tokenwise.weighting.apply import check_model, weighted_loss
from tokenwise.weighting.uniform import Uniform

Batches = Iterable[Mapping[str, Any]]
"""Batches of a causal language model's inputs with ``labels``; a data loader is one."""


def for_each_gradient(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Batches,
    field: str,
    use: Callable[[str, Tensor, Mapping[str, Any]], object],
) -> None:
    """Call ``use(name, gradient, batch)`` for each batch and parameter, with the gradient of the batch's mean loss.

    In evaluation mode. Each gradient is dropped as soon as it was used, so that never all of them exist; gradients
    that were there before, modes and ``requires_grad`` are put back.

    Args:
        model: a causal language model, possibly with PEFT adapters.
        parameters: those of interest, by any name; others get no gradient, frozen ones do.
        batches: see `Batches`; moved to the model's device.
        field: what an error calls the batches.
        use: reads the gradient, which is gone afterwards.

    Raises:
        InputError: when there is no batch, or the model cannot be weighed.
    """
    base = base_of(model)
    check_model(base)
    everything = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in everything]
    was_training = model.training
    batch: Mapping[str, Any] = {}
    hooks = []

    def hook(name: str) -> Callable[[Tensor], None]:
        def used(parameter: Tensor) -> None:
            assert parameter.grad is not None
            use(name, parameter.grad, batch)
            parameter.grad = None

        return used

    try:
        model.eval()
        for parameter in everything:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        for given in batches:
            batch = {key: value.to(base.device) if isinstance(value, Tensor) else value for key, value in given.items()}
            with torch.enable_grad():
                weighted_loss(base, batch, Uniform()).backward()
    finally:
        for removable in hooks:
            removable.remove()
        for parameter, (required, gradient) in zip(everything, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = gradient
        model.train(was_training)
    if not batch:
        raise InputError(Problem(field, "has no batch.", "Give a data loader, or a list of batches with labels."))
