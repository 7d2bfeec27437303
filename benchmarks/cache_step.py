"""What one generated token costs when the cache is long: all of it read, a part of it stored, a part of it selected.

Usage: python benchmarks/cache_step.py [--tokens 16384] [--keep 0.25] [--rounds 9] [--threads 1]

A Llama with random weights: 8 heads of 64 channels, 4 layers, batch 1. Keys and values are random and put into the
caches directly, so that no prompt of that length has to be read. The stock cache copies all of it at every token;
`full, with room` is read whole, too, and copies nothing, so that what selecting saves beyond that can be told.
`attention` is the attention function alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, table
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tokenwise as tw

HEADS, WIDTH, LAYERS = 8, 64, 4


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=HEADS * WIDTH,
            intermediate_size=1024,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=1 << 20,
        )
    ).eval()


def fill(cache: Any, tokens: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        states = torch.randn(2, 1, HEADS, tokens, WIDTH, generator=generator)
        cache.update(states[0], states[1], layer)
    return cache


def attention(tokens: int) -> Callable[[], object]:
    """The attention function alone, for each layer, over so many tokens."""
    query, states = torch.randn(1, HEADS, 1, WIDTH), torch.randn(2, LAYERS, 1, HEADS, tokens, WIDTH)

    def run() -> None:
        for keys, values in zip(states[0], states[1], strict=True):
            functional.scaled_dot_product_attention(query, keys, values)

    return run


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llama, token = model(), torch.tensor([[5]])
    kept = round(options.keep * options.tokens)
    methods: dict[str, Any] = {
        "full, with room": tw.Quest(keep=1.0),
        "k_norm, evicted": tw.KNorm(keep=options.keep),
        "k_norm, evicted, a tier of 8 bits": tw.KNorm(keep=options.keep, bits=8),
        "quest": tw.Quest(keep=options.keep, dense_layers=0),
        "mean_blocks": tw.MeanBlocks(keep=options.keep),
        "token_select, chosen at every step": tw.TokenSelect(keep=options.keep, similarity=None),
        "token_select, choice kept": tw.TokenSelect(keep=f"{kept} tokens", similarity=-1.0),
    }
    caches: dict[str, Any] = {"full": fill(DynamicCache(config=llama.config), options.tokens)}
    for name, method in methods.items():
        caches[name] = fill(tw.evict(llama, method), options.tokens)
        if isinstance(method, tw.cache.CachePolicy):
            llama(token.expand(1, 2), past_key_values=caches[name])  # a part of a prompt, after which it evicts

    def step(cache: Any) -> Callable[[], object]:
        return lambda: llama(token, past_key_values=cache)

    contestants = {name: step(cache) for name, cache in caches.items()}
    contestants["attention, full"], contestants["attention, kept"] = attention(options.tokens), attention(kept)
    seconds = interleaved(contestants, options.rounds)
    print(f"{options.tokens} tokens, keep {options.keep}, {options.threads} threads\n")
    print(table(seconds, ["full", "full, with room"]))
    for name, cache in caches.items():
        if name != "full":
            print(f"{name}: {cache.nbytes() / caches['full'].layers[0].keys.nbytes / 2 / LAYERS:.3f} of the full bytes")


if __name__ == "__main__":
    main()
