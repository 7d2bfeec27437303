"""Small vision models with random weights that are large enough to tell tokens apart."""

import torch
import transformers

_COMMON = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
_DINO = {**_COMMON, "mlp_ratio": 2, "layerscale_value": 0.3}
_CONFIGS = {
    "vit": lambda: transformers.ViTConfig(intermediate_size=64, **_COMMON),
    "deit": lambda: transformers.DeiTConfig(intermediate_size=64, **_COMMON),
    "clip": lambda: transformers.CLIPVisionConfig(intermediate_size=64, **_COMMON),
    "siglip": lambda: transformers.SiglipVisionConfig(intermediate_size=64, **_COMMON),
    "dinov2": lambda: transformers.Dinov2Config(**_DINO),
    "dinov2_swiglu": lambda: transformers.Dinov2Config(use_swiglu_ffn=True, **_DINO),
    "dinov2_registers": lambda: transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **_DINO),
}
VISION = tuple(_CONFIGS)


def spread(model, factor=3):
    """The model in evaluation mode, its matrices larger, so that attention is not uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model.eval()


def vision(kind, seed=0, **options):
    torch.manual_seed(seed)
    config = _CONFIGS[kind]()
    config._attn_implementation = options.get("attention", "sdpa")
    return spread(transformers.AutoModel.from_config(config))


def pictures(count=2, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def llava(seed=0, layers=2):
    torch.manual_seed(seed)
    vision_config = transformers.CLIPVisionConfig(intermediate_size=64, **{**_COMMON, "patch_size": 8})
    text_config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=99,
    )
    config = transformers.LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=98)
    return spread(transformers.LlavaForConditionalGeneration(config))


def llama(seed=0, layers=4, attention="sdpa", **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=99,
        pad_token_id=0,
        **options,
    )
    config._attn_implementation = attention
    return spread(transformers.LlamaForCausalLM(config))
