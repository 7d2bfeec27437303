"""A frozen model whose losses another model's training is measured against."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.models.head import check_head, last_hidden, output_head
from tokenwise.models.load import load_model
from tokenwise.signals.head import token_statistics


class Reference(Protocol):
    """What knows the losses of the labels of a batch under a model that is not trained."""

    def nll(self, rows: Tensor, labels: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """Negative log-likelihood of the labels at `rows` of the flattened batch, in nats: [tokens]."""
        ...


class ReferenceModel:
    """A frozen causal language model, loaded once, that scores the labels of the batches in training.

    Args:
        path: a local directory or a hub id.
        model: the model in training: its type, its device and its vocabulary are the reference's too.

    Raises:
        InputError: when it cannot be loaded, or its vocabulary is another one.
    """

    def __init__(self, path: str, model: PreTrainedModel):
        self.model: PreTrainedModel = load_model(path, "reference").eval().requires_grad_(False)
        torch.nn.Module.to(self.model, model.device, model.dtype)
        ours = output_head(model).vocabulary
        theirs = output_head(self.model).vocabulary
        if ours != theirs:
            raise InputError(
                Problem(
                    "reference",
                    f"{path!r} has a vocabulary of {theirs} tokens, the model in training one of {ours}.",
                    "Token losses can be compared only between models with the same tokenizer.",
                )
            )
        check_head(self.model)

    @torch.no_grad()
    def nll(self, rows: Tensor, labels: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """Negative log-likelihood of the labels at `rows` of the flattened batch, in nats: [tokens]."""
        hidden = last_hidden(self.model, *args, **inputs)
        return token_statistics(hidden.reshape(-1, hidden.shape[-1]), output_head(self.model), labels, rows=rows).nll
