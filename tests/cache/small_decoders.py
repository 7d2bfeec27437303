"""Small decoders with random weights, sharp enough that attention matters."""

import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GROUPED)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **GROUPED,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **GROUPED,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
    ),
}

# Some of their layers, or all whose cache holds all tokens, do not turn their keys.
PARTLY_ROTARY = {
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1])),
    "cohere2": lambda: Cohere2ForCausalLM(
        Cohere2Config(
            **GROUPED,
            logit_scale=1.0,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
    ),
}


def decoder(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    model = {**KINDS, **PARTLY_ROTARY}[kind]().eval()
    for name, values in model.named_parameters():
        if values.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(values, std=0.25)
        elif name.endswith("sinks"):
            torch.nn.init.normal_(values)
    return model


def prompt(tokens: int = 40, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 100, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids=None, cache=None, **options):
    """Some tokens written greedily, with their logits."""
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    options = options if ids is None else {"input_ids": ids, **options}
    return model.generate(
        past_key_values=cache, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options
    )


def difference(one, other):
    """The largest difference between the logits of two answers."""
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))
