"""Reading a prompt and decoding with part of the cache: kvpress, and tokenwise with the same weights.

    python benchmarks/cache_peer.py --kvpress-python PYTHON --tokens 2048 --rounds 3

PYTHON is the interpreter of an environment of kvpress 0.5.5, which needs transformers below 5.3; it is started once and
waits while tokenwise runs, and the other way round. Ratios are within a round, medians over the rounds. "plain" is the
stock cache on both sides: what the versions of transformers make. "/ plain" is either side over its own stock cache in
the same round, which tells a method's own cost from the rest of the model. "same" is the share of the decoded tokens
that both chose up to the first in which they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tokenwise as tw

WORKER = Path(__file__).parent / "peers" / "kvpress_worker.py"
KEEP = 0.25
PROMPTS = {"instruction": [5, 6, 7, 8, 9, 10, 11, 12], "suffix": [13]}
PART = {"compression_ratio": 1 - KEEP}
SNAP = {"class": "SnapKVPress", **PART}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "Random": ({}, {"class": "RandomPress", **PART}),
    "StreamingLLM": ({"positions": "original", "interval": None}, {"class": "StreamingLLMPress", **PART}),
    "KNorm": ({}, {"class": "KnormPress", **PART}),
    "KeyDiff": ({}, {"class": "KeyDiffPress", **PART}),
    "LagKV": ({}, {"class": "LagKVPress", **PART}),
    "SnapKV": ({}, {"class": "SnapKVPress", **PART}),
    "PyramidKV": ({}, {"class": "PyramidKVPress", **PART}),
    "TOVA": ({"interval": None}, {"class": "TOVAPress", **PART}),
    "ExpectedAttention": ({}, {"class": "ExpectedAttentionPress", **PART}),
    "ObservedAttention": ({"interval": None}, {"class": "ObservedAttentionPress", **PART}),
    "AdaKV": ({}, {"class": "AdaKVPress", "press": SNAP}),
    "CriticalKV": ({}, {"class": "CriticalKVPress", "press": SNAP}),
    "ChunkKV": ({}, {"class": "ChunkKVPress", "press": SNAP}),
    "ThinK": ({"keep": 1.0, "channels": 0.5}, {"class": "ThinKPress", "key_channel_compression_ratio": 0.5}),
    "KVzip": (PROMPTS, {"class": "KVzipPress", **PART}),
}
"""By tokenwise's name: fields of the method, and the press."""


@torch.no_grad()
def ours(
    model: Any, ids: torch.Tensor, decoded: int, method: Any, clock: Callable[[], float]
) -> tuple[list[float], list[int]]:
    start, count, found = clock(), ids.shape[1], []
    evicting = contextlib.nullcontext(DynamicCache(config=model.config)) if method is None else tw.evict(model, method)
    with evicting as cache:
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        read = clock()
        for step in range(decoded):
            found.append(int(logits[0, -1].argmax()))
            place = torch.tensor([[count + step]])
            logits = model(torch.tensor([found[-1:]]), past_key_values=cache, position_ids=place).logits
        return [read - start, clock() - read], found


def alike(one: list[int], other: list[int]) -> float:
    same = [a == b for a, b in zip(one, other, strict=True)]
    return [*same, False].index(False) / len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--decoded", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    parser.add_argument("--methods", nargs="*", choices=list(PAIRS))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=chosen.layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=32768,
        initializer_range=0.06,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(20, 1000, (1, chosen.tokens))
    names = chosen.methods or list(PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        job = {"ids": ids[0].tolist(), "decoded": chosen.decoded, "kv_zip": PROMPTS}
        (Path(folder) / "prompt.json").write_text(json.dumps(job), encoding="utf-8")
        command = [chosen.kvpress_python, str(WORKER), folder, str(chosen.threads), chosen.clock]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None

            def theirs(press: dict[str, Any]) -> tuple[list[float], list[int]]:
                worker.stdin.write(json.dumps(press) + "\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
                return answer["seconds"], answer["tokens"]

            head = "kvpress s | tokenwise s | ratio | reading | decoding | kvpress / plain | tokenwise / plain | same"
            print(f"| | {head} |\n" + "|---" * 9 + "|")
            for name in names:
                fields, press = PAIRS[name]
                method = None if name == "plain" else getattr(tw.cache, name)(**{"keep": KEEP, **fields})
                rounds, plain = [], []
                for turn in range(-1, chosen.rounds):
                    # Whoever comes first changes from round to round; the first is not counted.
                    first = theirs(press) if turn % 2 else None
                    own = ours(model, ids, chosen.decoded, method, getattr(time, chosen.clock))
                    other = first or theirs(press)
                    stock = theirs({}), ours(model, ids, chosen.decoded, None, getattr(time, chosen.clock))
                    if turn >= 0:
                        rounds.append((other, own))
                        plain.append(stock)
                times = [statistics.median(sum(pair[who][0]) for pair in rounds) for who in (0, 1)]
                parts = (sum, lambda seconds: seconds[0], lambda seconds: seconds[1])
                ratios = [statistics.median(part(own[0]) / part(other[0]) for other, own in rounds) for part in parts]
                costs = [
                    statistics.median(
                        sum(pair[who][0]) / sum(stock[who][0]) for pair, stock in zip(rounds, plain, strict=True)
                    )
                    for who in (0, 1)
                ]
                cells = [f"{value:.2f}" for value in (*times, *ratios, *costs)]
                same = alike(*(tokens for _, tokens in rounds[-1]))
                print(f"| {name} | {' | '.join(cells)} | {same:.0%} |", flush=True)
            worker.stdin.close()


if __name__ == "__main__":
    main()
