"""How decoders of transformers are laid out: their layers, and which tokens stand for images."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.vision_language import LAYOUTS, VisionLanguageModel, vision_language_model


@dataclass(frozen=True)
class Decoder:
    """A decoder whose tokens can be reduced.

    Args:
        module: the module that is given token ids and runs the layers: the model without its head.
        layers: its layers in order.
        images: the layout of the images among its tokens; None for a model of text alone.
        width: channels of a token.
        hidden_width: channels inside the feed-forward layer.
        key_width: channels of all keys of a token together.
        deep: how many of the first layers have features of the image added to what they give.
    """

    module: nn.Module
    layers: tuple[Any, ...]
    images: VisionLanguageModel | None
    width: int
    hidden_width: int
    key_width: int
    deep: int = 0


def find_decoder(model: Any) -> Decoder:
    """The decoder of a language model, or of a vision-language model.

    Raises:
        InputError: when its layout is not known, or its layers see a window of the tokens alone.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    images = vision_language_model(model) if kind in LAYOUTS else None
    inner = getattr(model, "base_model", model)
    owner = getattr(inner, "language_model", None) or getattr(inner, "text_model", None) or inner
    layers = getattr(owner, "layers", None)
    parts = ("input_layernorm", "self_attn", "mlp")
    if (
        not isinstance(layers, nn.ModuleList)
        or not len(layers)
        or not all(isinstance(getattr(layer, part, None), nn.Module) for layer in layers for part in parts)
        or not getattr(layers[0].self_attn, "is_causal", False)
    ):
        message = f"{type(model).__name__} has no decoder of a known layout."
        fix = (
            "Known are Llama-like models (Llama, Qwen2, Qwen3 ...) and vision-language models over them; for encoders "
        )
        fix += "use a method such as tome."
        if images is not None:
            message = f"{type(model).__name__} has a decoder of no known layout, or one that is not causal."
            fix = "Use a method for the input, such as div_prune."
        raise InputError(Problem("model", message, fix))
    text = owner.config
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
    if any(kind != "full_attention" for kind in kinds):
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} has layers of {next(k for k in kinds if k != 'full_attention')}, which store "
                "a part of the tokens by themselves.",
                "Use a method for the input, such as div_prune, or a model with full attention in every layer.",
            )
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return Decoder(
        inner,
        tuple(layers),
        images,
        text.hidden_size,
        text.intermediate_size,
        width * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        len(deep),
    )


def cached_attentions(model: Any) -> dict[int, nn.Module]:
    """The attention modules of a decoder that write to a cache, by the index of their layer.

    Raises:
        InputError: when there are none that transformers' attention interface serves, or some of them read what an
            encoder gives, or what another layer stores.
    """
    if not isinstance(model, nn.Module):
        raise InputError(Problem("model", f"{model!r} is no model.", "Load one with transformers."))
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} has an encoder, whose states its decoder caches, too.",
                "Use a model with a decoder alone.",
            )
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = f"{type(model).__name__} is compiled: nothing can listen to its attention."
        raise InputError(Problem("model", message, "Give the model as it was before torch.compile."))
    found: dict[int, nn.Module] = {
        module.layer_idx: module  # type: ignore[misc]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(getattr(module, "config", None), "_attn_implementation")
        and not {"past_key_values", "layer_past"}.isdisjoint(inspect.signature(module.forward).parameters)
        # A prompt may be read in both directions, as PaliGemma does: but what generates goes forward.
        and (getattr(module, "is_causal", False) or hasattr(model, "generate"))
        and _is_served(module)
    }
    if not found:
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} has no attention that is known to write to a cache.",
                "Its attention modules must have a layer_idx, be causal, take past_key_values and call the function "
                "that transformers' AttentionInterface gives for config._attn_implementation.",
            )
        )
    if any(getattr(module, "is_kv_shared_layer", False) for module in found.values()):
        raise InputError(
            Problem(
                "model",
                f"{type(model).__name__} has layers that read the keys of another layer.",
                "Use a model each of whose layers stores its own.",
            )
        )
    return found


def _is_served(module: nn.Module) -> bool:
    """Whether the file of an attention module, or of a class it is made from, names transformers' attention
    interface: some models choose the function themselves."""
    names = {"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"}
    return any(not names.isdisjoint(vars(sys.modules[kind.__module__])) for kind in type(module).__mro__)


def output_projection(module: Any) -> Tensor | None:
    """The weight that leads from what the heads of an attention module give to the hidden states.

    Returns:
        [heads * value_dim, hidden]; None where the module has none of a known name, or a quantized one.
    """
    for name in ("o_proj", "out_proj", "dense"):
        layer = getattr(module, name, None)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
            return weight.T
    return None
