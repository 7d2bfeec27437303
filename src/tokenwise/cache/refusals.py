"""What a model or a budget must have for its cache to be evicted from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokenwise.cache.base import CacheMethod, CachePolicy
from tokenwise.errors import Problem
from tokenwise.models.rotary import Rotary, find_rotaries


def narrows(method: CachePolicy) -> bool:
    """Whether the method drops channels of keys."""
    return type(method).key_channels is not CachePolicy.key_channels


def repeats(method: CachePolicy, masked: bool) -> bool:
    """Whether the prompt is read a second time."""
    return "repetition" in method.reads and (masked or method.keep != 1.0)


def basic_problems(model: nn.Module, method: CacheMethod, places: Sequence[int], last: int) -> list[Problem]:
    """Why a cache cannot keep, or read, a part of what a model stores.

    Args:
        places: the layers that it would do so in.
        last: tokens at the end that stay, or are read, whatever their score.
    """
    problems, keep = [], method.keep
    if not places:
        problems.append(
            Problem(
                "model",
                f"{type(model).__name__} has no layer whose cache holds all tokens.",
                "There is nothing to choose from in layers that store a window of the tokens, or a state.",
            )
        )
    if isinstance(keep, str) and keep.endswith("tokens") and int(keep.split()[0]) < max(method.protects, 1):
        what = "stay whatever their score" if method.mode == "evict" else "are always read"
        problems.append(
            Problem(
                f"{type(method).__name__}.keep",
                f"{keep!r} is less than the {method.protects} tokens that {what} (sink {method.sink}, at the end "
                f"{last}).",
                "Keep more, or protect less.",
            )
        )
    return problems


def problems_of(
    model: nn.Module, method: CachePolicy, layers: list[Any], attentions: dict[int, Any], masked: bool
) -> list[Problem]:
    """Why the cache of a model cannot be evicted from so.

    Args:
        layers: of the cache.
        attentions: the attention modules whose cache would be evicted from, by the index of their layer.
        masked: whether all tokens are to stay stored.
    """
    name, places = type(method).__name__, list(attentions)
    refusals = (method.refuses(attention) for attention in attentions.values())
    problems = [problem for problem in refusals if problem is not None][:1]
    problems += basic_problems(model, method, places, method.protects - method.sink)
    keep = method.keep
    if isinstance(keep, str) and keep.endswith("bytes") and places:
        token = expected_token_nbytes(model, attentions[places[0]]) * len(places)
        if int(keep.split()[0]) < token * max(method.protects, 1):
            problems.append(
                Problem(
                    f"{name}.keep",
                    f"{keep!r} is less than {max(method.protects, 1)} tokens take: {token} bytes each, in "
                    f"{len(places)} layers.",
                    "Keep more.",
                )
            )
    if repeats(method, masked) and (
        getattr(model.config, "vision_config", None) is not None
        or any(
            index not in attentions and not isinstance(layer, DynamicSlidingWindowLayer)
            for index, layer in enumerate(layers)
        )
    ):
        problems.append(
            Problem(
                "model",
                f"{name} reads the prompt's tokens a second time and forgets that it did; images, and layers "
                "with a state, do not allow it.",
                "Use a method such as snap_kv.",
            )
        )
    if method.bits is not None:
        problems += _tier_problems(method, masked)
    if narrows(method) and any("flash" in each.config._attn_implementation for each in attentions.values()):
        problems.append(
            Problem(
                "model",
                f"{name} stores keys with fewer channels than values have, which flash attention cannot read.",
                "Load the model with attn_implementation='sdpa'.",
            )
        )
    return problems


def expected_token_nbytes(model: nn.Module, attention: Any) -> int:
    """Bytes that the key and the value of a token take in a layer, as the configuration says before any is stored."""
    config, weight = attention.config, next(model.parameters())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size, kind = weight.dtype.itemsize, weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        size = min(size, torch.get_autocast_dtype(kind).itemsize)
    return int((width + (getattr(config, "v_head_dim", None) or width)) * heads * size)


def protection_problems(protect: Any) -> list[Problem]:
    """Why tokens cannot be protected so."""
    if protect is None:
        return []
    if not isinstance(protect, Tensor) or protect.dtype != torch.bool or protect.dim() not in (1, 2):
        what = (
            f"is {protect.dtype} of shape {list(protect.shape)}" if isinstance(protect, Tensor) else f"is {protect!r}"
        )
        return [Problem("protect", f"{what}.", "Give a mask of [rows, tokens] or [tokens], of type bool.")]
    return []


def rotaries_for(model: nn.Module, method: CachePolicy, attentions: dict[int, Any]) -> dict[int, Rotary]:
    """How the model turns the keys of each layer, by its index, where the method has to know; else empty.

    Raises:
        InputError: when it turns them in a way that is not known.
    """
    if method.positions == "compact":
        return find_rotaries(model, attentions)
    if "rotary" in method.reads:
        use = f"{type(method).__name__} reads queries as they were before they were turned"
        return find_rotaries(model, attentions, "method", use, "Use a method such as snap_kv.")
    return {}


def _tier_problems(method: CachePolicy, masked: bool) -> list[Problem]:
    """Why a method cannot store a tier in few bits."""
    field, problems = f"{type(method).__name__}.bits", []
    if method.allocate in ("heads", "layers_and_heads"):
        message = f"heads share a budget (allocate {method.allocate!r}), and tiers are those of each head."
        problems.append(Problem(field, message, "Use allocate 'evenly' or 'pyramid'."))
    if method.positions == "compact":
        problems.append(
            Problem(field, "packed keys are not turned (positions 'compact').", "Use positions='original'.")
        )
    if masked:
        problems.append(
            Problem(field, "a masked cache stores all tokens exactly.", "Leave masked=False, or bits=None.")
        )
    return problems
