"""Reading the attention of a causal language model's last layer while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.models.tap import AttentionCall, listen
from tokenwise.signals.attention import attention_mass


def last_attention(model: PreTrainedModel) -> Any:
    """The attention module of the last layer that has one.

    Raises:
        InputError: when the model has none that transformers' attention interface serves.
    """
    found = [
        module
        for module in model.get_decoder().modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config") and hasattr(module, "layer_idx")
    ]
    if not found:
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} has no attention that transformers' attention interface serves.",
                "Use a method that reads no attention.",
            )
        )
    return max(found, key=lambda module: module.layer_idx)


def visible_positions(
    rows: Tensor, sequences: Tensor, valid: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Which keys each query sees under causal attention within its sequence.

    Args:
        rows: positions of the queries, [queries], int64.
        sequences: the sequence of each position, [tokens].
        valid: which positions are no padding, [tokens]; all unless given.
        window: how many positions back attention reaches, the query's own included; all unless given.

    Returns:
        [queries, tokens], bool.
    """
    keys = torch.arange(sequences.shape[0], device=sequences.device)
    distance = rows.unsqueeze(1) - keys
    seen = (distance >= 0) & (sequences[rows].unsqueeze(1) == sequences)
    if window is not None:
        seen &= distance < window
    return seen if valid is None else seen & valid.bool()


@contextmanager
def attention_to(
    model: PreTrainedModel, queries: Tensor, counted: Tensor, sequences: Tensor, attention_mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Read, in one forward pass inside the block, how much of the last layer's attention falls on counted positions.

    The layer's own queries and keys are read on their way to the attention function, whichever that is, so nothing is
    computed twice and the pass itself is unchanged. Only the rows of `queries` are made.

    Args:
        model: a causal language model.
        queries: positions whose attention is wanted, [batch, tokens], bool.
        counted: positions over which it is summed, [batch, tokens], bool.
        sequences: the sequence of each position, [batch, tokens]; attention stays within one.
        attention_mask: the batch's padding mask, [batch, tokens], or None.

    Yields:
        [batch, tokens], fp32: filled by the forward pass with the mean over heads, in [0, 1]; 0 at other positions.

    Raises:
        InputError: when the pass made no use of the attention interface, or the model's attention has terms unknown
            here.
    """
    module = last_attention(model)
    mass = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    read = False

    def reading(call: AttentionCall) -> None:
        nonlocal read
        if not read:
            _fill(mass, call, queries, counted, sequences, attention_mask)
            read = True

    stop = listen(module, reading)
    try:
        yield mass
    finally:
        stop()
    if not read:
        raise InputError(
            Problem(
                "model",
                f"{type(module).__name__} does not call transformers' attention interface.",
                "Use a method that reads no attention.",
            )
        )


def _fill(
    mass: Tensor,
    call: AttentionCall,
    queries: Tensor,
    counted: Tensor,
    sequences: Tensor,
    attention_mask: Tensor | None,
) -> None:
    query, key, prepared = call.query.detach(), call.key.detach(), call.mask
    valid = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    for index in range(queries.shape[0]):
        rows = queries[index].nonzero().squeeze(1)

        def bias(part: slice, index: int = index, rows: Tensor = rows) -> Tensor:
            if prepared is not None:
                seen = prepared[min(index, prepared.shape[0] - 1)][:, rows[part], : key.shape[2]]
                if seen.dtype != torch.bool:
                    return seen
            else:
                padding = None if valid is None else valid[index]
                seen = visible_positions(rows[part], sequences[index], padding, call.window)
            return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))

        mass[index, rows] = attention_mass(
            query[index][:, rows], key[index], counted[index], bias, call.scaling, call.softcap, call.sinks
        ).to(mass.dtype)
