"""What the cache costs: reading a prompt, a generated token, and bytes, beside the stock cache.

Usage: python benchmarks/cache.py [--tokens 8192] [--key-heads 2] [--head-dim 64] [--rounds 5] [--threads 2]
                                  [--processor-time] [METHOD ...]

An attention-heavy Llama with random weights: 2 layers, hidden 512, 8 heads that share some heads of keys. "a quarter"
is the stock cache with a quarter of the tokens: what is left of a generated token's time where evicting costs nothing.
METHOD is a name of the catalog, with fields where wanted: ``snap_kv:allocate=heads``. Each is run at keep 0.25, and
for the prompt at keep 1.0 of the stock cache's time. Ratios are those within a round, medians over the rounds, of which
generated tokens have four times as many. Name a few methods at a time: many caches beside each other slow all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, ratio
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tokenwise as tw
from tokenwise import catalog

KEEP, STEPS = 0.25, 16


def model(key_heads: int = 2, head_dim: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=512,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            max_position_embeddings=2**17,
        )
    ).eval()


def method(spec: str) -> Any:
    """The method a name with fields means, at the benchmark's budget."""
    name, _, given = spec.partition(":")
    fields = dict(part.split("=") for part in given.split(",") if part)
    return catalog.load_class(name, family="cache")(keep=KEEP, **fields)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    llama = model(options.key_heads, options.head_dim)
    ids = torch.randint(1, 1000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    names = options.methods or [
        entry["name"] for entry in catalog.entries().values() if entry["family"] == "cache" and entry["name"] != "full"
    ]
    methods = {name: method(name) for name in names}
    caches: dict[str, Any] = {}

    def reads(name: str) -> Callable[[], object]:
        def read() -> object:
            # The one before is let go first: a listener that is left over would be timed, too.
            caches.pop(name, None)
            made = DynamicCache(config=llama.config) if name == "stock" else tw.evict(llama, methods[name])
            caches[name] = made
            return llama(ids, past_key_values=made, logits_to_keep=1)

        return read

    def steps(name: str) -> Callable[[], object]:
        def step() -> object:
            return [llama(ids[:, :1], past_key_values=caches[name]) for _ in range(STEPS)]

        return step

    contestants = ["stock", *names]
    reading = interleaved({name: reads(name) for name in contestants}, options.rounds, clock)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches["stock"].layers)
    sizes = {name: caches[name].nbytes() / full for name in names}
    short = int(KEEP * options.tokens)
    caches["a quarter"] = DynamicCache(config=llama.config)
    llama(ids[:, :short], past_key_values=caches["a quarter"], logits_to_keep=1)
    contestants.append("a quarter")
    stepping = interleaved({name: steps(name) for name in contestants}, 4 * options.rounds, clock)
    shape = f"{options.key_heads} heads of keys, {options.head_dim} channels"
    print(f"{options.tokens} tokens, {shape}, keep {KEEP}; / stock cache\n")
    print("| method | reading the prompt | a generated token | bytes |\n|---|---|---|---|")
    for name in names:
        times = [ratio(seconds, name, "stock") for seconds in (reading, stepping)]
        print(f"| {name} | {times[0]:.2f} | {times[1]:.2f} | {sizes[name]:.2f} |")
    print(f"| a quarter |  | {ratio(stepping, 'a quarter', 'stock'):.2f} | {KEEP:.2f} |")


if __name__ == "__main__":
    main()
