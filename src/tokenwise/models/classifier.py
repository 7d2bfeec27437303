"""How a classifier is laid out: its last linear layer, and what that layer read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem

_CLASSIFIER = re.compile(r"For\w*Classification$")


def is_classifier(model: nn.Module) -> bool:
    """Whether `model` is a transformers model with a classification head (…ForSequenceClassification and its kin)."""
    named = any(_CLASSIFIER.search(base.__name__) for base in type(model).__mro__)
    return isinstance(model, PreTrainedModel) and named


def classifier_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits of a classifier.

    Raises:
        InputError: when no linear layer has as many outputs as there are labels.
    """
    classes = model.config.num_labels  # type: ignore[union-attr]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
    # PEFT keeps the frozen original beside the copy in training.
    trained = [layer for layer in layers if layer.weight.requires_grad]
    if not layers:
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} has no linear layer with {classes} outputs, one for each label.",
                "Give a classifier whose head ends in nn.Linear.",
            )
        )
    return (trained or layers)[-1]


@dataclass
class HeadCall:
    """What the last linear layer read and made in one forward pass."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def features(self, logits: Tensor) -> Tensor:
        """The head's input for each row of the model's logits: [rows, hidden], with gradient.

        Decoders apply the head to every token and pick one per text afterwards; the picked row is found by its logits.
        """
        assert self.inputs is not None
        assert self.outputs is not None
        inputs = self.inputs
        if inputs.dim() == 3 and logits.dim() == 2:
            matches = (self.outputs == logits.unsqueeze(1)).all(-1)
            inputs = inputs[torch.arange(inputs.shape[0], device=inputs.device), matches.int().argmax(1)]
        return inputs.reshape(-1, inputs.shape[-1])


@contextmanager
def recorded(head: nn.Linear) -> Iterator[HeadCall]:
    """Records what `head` reads and makes while the block runs."""
    call = HeadCall()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        call.inputs, call.outputs = args[0], output

    handle = head.register_forward_hook(hook)
    try:
        yield call
    finally:
        handle.remove()
