"""Models with adapters: running them without, and the fingerprint of their parameters."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put adapters into the model."""
    return hasattr(model, "disable_adapter") or bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_disabled(model: Any, disable: bool = True) -> Iterator[None]:
    """Run the model without its adapters inside the ``with`` block; with ``disable=False`` does nothing.

    Raises:
        InputError: when it has none.
    """
    if not disable:
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    elif has_adapters(model):
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
    else:
        raise InputError(Problem("adapters", f"{type(model).__name__} has no adapters to leave out."))


def parameters_fingerprint(model: nn.Module, adapters: bool = True) -> str:
    """Of the parameters and buffers of a model in memory, by name; ``adapters=False`` gives that of its base model."""
    names = base_names(model) if not adapters else {name: name for name in model.state_dict()}
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(names, key=lambda name: names[name]):
        tensor: Tensor = state[name].detach()
        digest.update(f"{names[name]} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_names(model: nn.Module) -> dict[str, str]:
    """The tensors of the model under its adapters: name as it is now -> name without adapters."""
    peft = sys.modules.get("peft")  # whoever made adapters has imported it
    if peft is None:
        return {name: name for name in model.state_dict()}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[f"{name}."] = "base_layer."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner[f"{name}."] = "original_module."
    found = {}
    for name in model.state_dict():
        plain = name
        for prefix, kept in inner.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                plain = prefix + rest.removeprefix(kept) if rest.startswith(kept) else ""
        if plain:
            found[name] = plain
    return found
