"""How encoders of transformers and timm are laid out: their blocks, and where tokens can be taken out of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenwise.errors import InputError, Problem


@dataclass(frozen=True)
class EncoderBlock:
    """One block of an encoder.

    Args:
        module: the block.
        attention: the module whose attention the tap listens to.
        norm: the norm between attention and feed-forward layer, whose input is the sum to which the feed-forward
            layer is added; None where `output` is given.
        branch: the modules of the feed-forward branch in the order they run; what the last gives is added.
        output: for blocks that normalise after the sum: the module whose first output goes to the feed-forward layer
            and to the sum alike.
    """

    module: nn.Module
    attention: nn.Module
    norm: nn.Module | None = None
    branch: tuple[nn.Module, ...] = ()
    output: nn.Module | None = None


@dataclass(frozen=True)
class Encoder:
    """An encoder whose tokens can be reduced.

    Args:
        module: the module that runs the blocks; everything it is given and gives passes through it.
        blocks: its blocks in order.
        prefix: how many tokens at the beginning stand for no part of the input (class token, registers).
        has_class_token: whether the first token gathers the whole input.
        width: channels of a token.
        hidden_width: channels inside the feed-forward layer.
        is_text: whether the tokens are a text's, with padding.
        gated: whether the feed-forward layer has a gate, and so three matrices.
    """

    module: nn.Module
    blocks: tuple[EncoderBlock, ...]
    prefix: int
    has_class_token: bool
    width: int
    hidden_width: int
    is_text: bool = False
    gated: bool = False


def find_encoder(model: nn.Module) -> Encoder:
    """The encoder of a model: its vision tower where it has one, else the model itself.

    Raises:
        InputError: when there is none of a known layout.
    """
    for owner in _candidates(model):
        found = _transformers_encoder(owner) or _timm_encoder(owner)
        if found is not None:
            return found
    if any(getattr(module, "is_causal", False) for module in model.modules()):
        problem = Problem(
            "model",
            f"{type(model).__name__} is a decoder: it has no encoder of a known layout.",
            "Use a method whose site is the decoder or the input; `tokenwise methods` lists the sites.",
        )
    else:
        problem = Problem(
            "model",
            f"{type(model).__name__} has no encoder of a known layout.",
            "Known are ViT, DeiT, CLIP, SigLIP and DINOv2 (with registers) of transformers, timm's VisionTransformer "
            "and Eva, and of text encoders those with learned positions: BERT, RoBERTa, ELECTRA, DistilBERT.",
        )
    raise InputError(problem)


# Of each `model_type` how many tokens stand before the patches, registers apart. Blocks of other kinds are built alike
# and yet differ: in rotary positions, which a block is given for all tokens, or in the tokens before the patches.
_VISION = {
    **dict.fromkeys(("vit", "vit_msn", "clip_vision_model", "chinese_clip_vision_model", "metaclip_2_vision_model"), 1),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), 1),
    "deit": 2,
    **dict.fromkeys(("siglip_vision_model", "siglip2_vision_model", "idefics3_vision", "smolvlm_vision", "ijepa"), 0),
}
_TEXT = {"bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "dpr", "electra", "ernie", "esm"}
_TEXT |= {"layoutlm", "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl"}


def _candidates(model: nn.Module) -> list[nn.Module]:
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    first = [tower] if isinstance(tower, nn.Module) else []
    return [*first, *model.modules()]


def _transformers_encoder(owner: Any) -> Encoder | None:
    layers = next(
        (
            getattr(owner, name)
            for name in ("layers", "layer")
            if isinstance(getattr(owner, name, None), nn.ModuleList) and len(getattr(owner, name))
        ),
        None,
    )
    if layers is None:
        return None
    blocks = [_transformers_block(layer) for layer in layers]
    if any(block is None for block in blocks):
        return None
    known = tuple(block for block in blocks if block is not None)
    config: Any = getattr(known[0].attention, "config", None)
    if config is None or getattr(config, "is_decoder", False) or getattr(known[0].attention, "is_causal", False):
        return None
    kind, text = config.model_type, known[0].output is not None
    if kind not in (_TEXT if text else _VISION) or not _position_free(known[0].attention):
        return None
    prefix = 1 if text else _VISION[kind] + getattr(config, "num_register_tokens", 0)
    has_class = prefix > 0
    names = ("intermediate_size", "hidden_dim")
    hidden = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    hidden = hidden or int(config.hidden_size * config.mlp_ratio)
    gated = bool(getattr(config, "use_swiglu_ffn", False))
    if gated:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return Encoder(owner, known, prefix, has_class, config.hidden_size, hidden, text, gated)


def _transformers_block(layer: Any) -> EncoderBlock | None:
    def has(*names: str) -> bool:
        return all(isinstance(getattr(layer, name, None), nn.Module) for name in names)

    if hasattr(layer, "lambda_2"):  # InternVL: a scale behind the branch, where nothing can be hooked
        return None
    if has("attention", "layernorm_before", "layernorm_after", "mlp", "dropout"):  # ViT, DeiT
        return EncoderBlock(layer, layer.attention, layer.layernorm_after, (layer.mlp, layer.dropout))
    if has("attention", "norm1", "norm2", "mlp", "layer_scale2", "drop_path"):  # DINOv2
        return EncoderBlock(layer, layer.attention, layer.norm2, (layer.mlp, layer.layer_scale2, layer.drop_path))
    if has("self_attn", "layer_norm1", "layer_norm2", "mlp"):  # CLIP, SigLIP
        return EncoderBlock(layer, layer.self_attn, layer.layer_norm2, (layer.mlp,))
    if has("attention", "intermediate", "output") and isinstance(getattr(layer.attention, "self", None), nn.Module):
        return EncoderBlock(layer, layer.attention.self, output=layer.attention)  # BERT and its kin
    if has("attention", "sa_layer_norm", "ffn", "output_layer_norm"):  # DistilBERT
        return EncoderBlock(layer, layer.attention, output=layer.sa_layer_norm)
    return None


def _position_free(attention: Any) -> bool:
    """Whether attention knows of positions only what the tokens carry, and transformers' interface serves it.

    Rotary and relative positions are counted from the tokens that are there, and so change when some go.
    """
    names = vars(sys.modules[type(attention).__module__])
    kind = getattr(attention.config, "position_embedding_type", None) or "absolute"
    return "ALL_ATTENTION_FUNCTIONS" in names and kind == "absolute"


# What adds the feed-forward branch to the input of norm2. Other blocks of timm have the same names in another order.
_TIMM_BRANCHES = {
    "timm.models.vision_transformer.Block": ("mlp", "ls2", "drop_path2"),
    "timm.models.eva.EvaBlock": ("mlp", "drop_path2"),
}
_TIMM_ATTENTION = tuple(f"timm.{name}" for name in ("layers.attention.Attention", "layers.attention.AttentionRope"))
_TIMM_ATTENTION += ("timm.models.eva.EvaAttention",)


def _timm_encoder(owner: Any) -> Encoder | None:
    if not (hasattr(owner, "blocks") and hasattr(owner, "num_prefix_tokens") and hasattr(owner, "cls_token")):
        return None
    inner: Any = owner.blocks
    if not (isinstance(inner, (nn.Sequential, nn.ModuleList)) and len(inner)):
        return None
    blocks = []
    for block in list[Any](inner):
        branch = _TIMM_BRANCHES.get(_full_name(block))
        if branch is None or _full_name(block.attn) not in _TIMM_ATTENTION:
            return None
        blocks.append(EncoderBlock(block, block.attn, block.norm2, tuple(getattr(block, name) for name in branch)))
    matrices = [module.weight for module in blocks[0].branch[0].modules() if isinstance(module, nn.Linear)]
    hidden = matrices[-1].shape[1]
    gated = sum(matrix.numel() for matrix in matrices) == 3 * owner.embed_dim * hidden
    has_class = owner.cls_token is not None
    return Encoder(owner, tuple(blocks), owner.num_prefix_tokens, has_class, owner.embed_dim, hidden, gated=gated)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
