"""What kvpress scores and keeps in a small decoder; tests/cache/test_kvpress.py compares with it.

Usage: python kvpress_scores.py tests/golden/kvpress.json

It runs in an environment of kvpress 0.5.5 with transformers below 5.3, and needs nothing of tokenwise.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import kvpress
import numpy
import torch
from kvpress.presses import kvzip_press
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = 40
INSTRUCTION, CONTINUATION, SUFFIX = [5, 6, 7], [8, 9], [10]
"""What stands for KVzip's prompts, which a tokenizer would make."""
PRESSES = {
    "SnapKV": ({"queries": 8}, lambda: kvpress.SnapKVPress(0.5, window_size=8)),
    "KNorm": ({}, lambda: kvpress.KnormPress(0.5)),
    "KeyDiff": ({}, lambda: kvpress.KeyDiffPress(0.5)),
    "LagKV": ({"lag": 8}, lambda: kvpress.LagKVPress(0.5, lag_size=8)),
    "LagKV, short": ({"lag": 20}, lambda: kvpress.LagKVPress(0.5, lag_size=20)),
    "ExpectedAttention": ({}, lambda: kvpress.ExpectedAttentionPress(0.5)),
    "ExpectedAttention, mean alone": (
        {"covariance": False, "value_norm": False, "future": 64},
        lambda: kvpress.ExpectedAttentionPress(0.5, n_future_positions=64, use_covariance=False, use_vnorm=False),
    ),
    "TOVA": ({}, lambda: kvpress.TOVAPress(0.5)),
    "ObservedAttention": ({}, lambda: kvpress.ObservedAttentionPress(0.5)),
    "CriticalKV": ({"queries": 8}, lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress(0.5, window_size=8))),
}
"""By name: fields of tokenwise's method, and the press."""


def small_model(implementation: str) -> LlamaForCausalLM:
    """Weights from NumPy's legacy generator, whose numbers are the same in every version."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation=implementation)).eval()
    generator = numpy.random.RandomState(0)
    with torch.no_grad():
        for _, values in sorted(model.named_parameters()):
            drawn = torch.from_numpy(generator.standard_normal(tuple(values.shape)))
            values.copy_(1 + 0.1 * drawn if values.dim() == 1 else 0.3 * drawn)
    return model


def prompt() -> torch.Tensor:
    return torch.from_numpy(numpy.random.RandomState(1).randint(11, CONFIG["vocab_size"], (1, TOKENS)))


def rounded(values: torch.Tensor) -> Any:
    """Seven digits."""
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def scores(press: Any) -> list[Any]:
    """Of each layer, [key heads, tokens] in one row."""
    found = []
    plain = press.score

    def score(*args: Any) -> torch.Tensor:
        found.append(plain(*args))
        return found[-1].clone()

    press.score = score
    model = small_model("eager" if isinstance(press, kvpress.ObservedAttentionPress) else "sdpa")
    with torch.no_grad(), press(model):
        model(prompt(), past_key_values=DynamicCache(config=model.config))
    return [rounded(layer) for layer in found]


def hidden(press: Any) -> list[list[int]]:
    """Of each layer the places, head by head, whose keys are hidden."""
    model = small_model("sdpa")
    ids = prompt()
    with torch.no_grad(), press(model):
        # KVzip reads them from the call of the inner model.
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
    found = []
    for layer in model.model.layers:
        _, heads, places = layer.self_attn.masked_key_indices
        found.append(sorted((heads * TOKENS + places).tolist()))
    return found


def kept(press: Any) -> list[list[int]]:
    """Of each layer the tokens that stay, head by head, found again by their keys."""
    model = small_model("sdpa")
    ids = prompt()
    full, cache = (DynamicCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=full)
        with press(model):
            model(ids, past_key_values=cache)
    found = []
    for whole, layer in zip(full.layers, cache.layers, strict=True):
        same = (layer.keys.unsqueeze(3) == whole.keys.unsqueeze(2)).all(-1)
        found.append([sorted(head.nonzero()[:, 1].tolist()) for head in same[0]])
    return found


def channels() -> list[list[list[int]]]:
    """Of each layer the channels of the keys that ThinK leaves, head by head."""
    model = small_model("sdpa")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.ThinKPress(key_channel_compression_ratio=0.375, window_size=8)(model):
        model(prompt(), past_key_values=cache)
    left = (layer.keys[0].abs().sum(1) > 0 for layer in cache.layers)
    return [[head.nonzero()[:, 0].tolist() for head in layer] for layer in left]


def kv_zip() -> dict[str, Any]:
    tokenizer = types.SimpleNamespace(
        chat_template=None,
        encode=lambda text, **_: torch.tensor(
            [
                {"": [], "\n": SUFFIX, "\n\nRepeat the previous context exactly.": INSTRUCTION}.get(text, CONTINUATION),
            ],
            dtype=torch.long,
        ),
    )
    kvzip_press.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda _: tokenizer)
    press = kvpress.KVzipPress(0.5, chunk_size=16)
    found: list[torch.Tensor] = []
    post = press.compress_post

    def compress_post(model: Any) -> None:
        found.append(press.score_val.clone())
        post(model)

    press.compress_post = compress_post
    gone = hidden(press)
    fields = {"chunk": 16, "instruction": INSTRUCTION, "continuation": CONTINUATION, "suffix": SUFFIX}
    return {"fields": fields, "scores": [rounded(layer) for layer in found[0]], "hidden": gone}


def main() -> None:
    torch.set_num_threads(1)
    budgets = {}
    for length, ratio, layers in ((300, 0.5, 4), (4096, 0.5, 4), (1000, 0.9, 4), (900, 0.75, 6)):
        # They count the window into what is shared out, the paper's authors do not: without one they agree.
        press = kvpress.PyramidKVPress(ratio, window_size=0)
        modules = (
            types.SimpleNamespace(config=types.SimpleNamespace(num_hidden_layers=layers), layer_idx=layer)
            for layer in range(layers)
        )
        budgets[f"{length} {ratio} {layers}"] = [press.get_layer_budget(module, length) for module in modules]
    golden = {
        "source": f"kvpress {importlib.metadata.version('kvpress')} on transformers "
        f"{importlib.metadata.version('transformers')} and torch {torch.__version__}: scores while a small Llama reads "
        "a prompt; made by benchmarks/peers/kvpress_scores.py",
        "config": CONFIG,
        "tokens": TOKENS,
        "scores": {name: {"fields": fields, "scores": scores(press())} for name, (fields, press) in PRESSES.items()},
        "PyramidKV": budgets,
        "AdaKV": {
            "fields": {"queries": 8},
            "hidden": hidden(kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, window_size=8))),
        },
        "ChunkKV": {
            "fields": {"queries": 8, "chunk": 5},
            "kept": kept(kvpress.ChunkKVPress(kvpress.SnapKVPress(0.5, window_size=8), chunk_length=5)),
        },
        "KVzip": kv_zip(),
        "ThinK": {"fields": {"queries": 8, "channels": 0.625}, "channels": channels()},
    }
    Path(sys.argv[1]).write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
