"""Reading the attention of a causal language model's last layer while it runs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.models.patch import replace_attribute
from tokenwise.signals.attention import attention_mass

# What some models add to the softmax and the reading does not know: sinks, relative positions.
_UNKNOWN_TERMS = ("s_aux", "position_bias")


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
    implementation = module.config._attn_implementation
    plain = _attention_function(module, implementation)
    mass = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    read = False

    def reading(owner: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **options: Any) -> Any:
        nonlocal read
        if not read:
            _fill(mass, owner, query.detach(), key.detach(), mask, options, queries, counted, sequences, attention_mask)
            read = True
        return plain(owner, query, key, value, mask, *args, **options)

    # The module alone is sent to our function: the name in its own copy of the configuration. Masks are made by the
    # backbone, from the configuration that stays as it is.
    name = f"{implementation}_read_{id(module)}"
    config = copy.copy(module.config)
    config._attn_implementation_internal = name
    AttentionInterface.register(name, reading)
    undo = replace_attribute(module, "config", config)
    try:
        yield mass
    finally:
        undo()
        del AttentionInterface._global_mapping[name]
    if not read:
        raise InputError(
            Problem(
                "model",
                f"{type(module).__name__} does not call transformers' attention interface.",
                "Use a method that reads no attention.",
            )
        )


def _attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that serves `module` now; eager attention lives in each model's own file."""
    for kind in type(module).__mro__:
        names = vars(sys.modules[kind.__module__])
        if "eager_attention_forward" in names:
            functions = names.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())
            return functions.get_interface(implementation, names["eager_attention_forward"])
    return AttentionInterface().get_interface(implementation, None)  # type: ignore[arg-type]


def _fill(
    mass: Tensor,
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Any,
    options: dict[str, Any],
    queries: Tensor,
    counted: Tensor,
    sequences: Tensor,
    attention_mask: Tensor | None,
) -> None:
    unknown = [name for name in _UNKNOWN_TERMS if options.get(name) is not None]
    if unknown or not (mask is None or isinstance(mask, Tensor)):
        what = ", ".join(unknown) or type(mask).__name__
        raise InputError(
            Problem(
                "model",
                f"the attention of {type(module).__name__} has {what}, which the reading of attention does not know.",
                "Load the model with attn_implementation='sdpa', or use a method that reads no attention.",
            )
        )
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    prepared = mask if mask is not None and mask.dim() == 4 else None
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
                seen = visible_positions(rows[part], sequences[index], padding, options.get("sliding_window"))
            return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))

        mass[index, rows] = attention_mass(
            query[index][:, rows], key[index], counted[index], bias, scaling, options.get("softcap")
        ).to(mass.dtype)
