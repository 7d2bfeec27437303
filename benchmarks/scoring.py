"""Scoring a data set against the plain forward pass over the same batches: tokens per second.

Usage: python benchmarks/scoring.py [--rows 256] [--hidden 512] [--layers 8] [--vocabulary 32768] [--rounds 5]

Rows of 64 to 512 tokens, fp32 on the CPU, bf16 where there is a GPU. The plain pass computes the logits of each batch
and nothing else; ``score`` also reads the rows, computes their statistics, and writes the files.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, ratio, table
from transformers import LlamaConfig, LlamaForCausalLM

import tokenwise as tw
from tokenwise.scores.scorer import batches

BATCH_TOKENS = 8192


def contestants(model: LlamaForCausalLM, rows: list[list[int]], folder: Path) -> dict[str, Callable[[], object]]:
    @torch.no_grad()
    def plain() -> None:
        for batch in batches([len(row) for row in rows], BATCH_TOKENS):
            longest = len(rows[batch[0]])
            ids = torch.tensor([rows[index] + [0] * (longest - len(rows[index])) for index in batch])
            model(input_ids=ids.to(model.device), use_cache=False)

    def scored(*names: str) -> Callable[[], object]:
        def run() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            tw.scores.score(model, rows, folder, statistics=names, batch_tokens=BATCH_TOKENS)

        return run

    return {
        "plain forward": plain,
        "score: logp": scored("logp"),
        "score: logp, entropy, rank": scored("logp", "entropy", "rank"),
        "score: logp, 16 most likely": scored("logp", "top_k"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 256), ("hidden", 512), ("layers", 8), ("vocabulary", 32768), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    generator = np.random.default_rng(0)
    rows = [
        generator.integers(options.vocabulary, size=generator.integers(64, 513)).tolist() for _ in range(options.rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        seconds = interleaved(contestants(model, rows, Path(folder, "scores")), options.rounds)
    tokens = sum(map(len, rows))
    print(
        f"Llama, hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocabulary}, {tokens:,} tokens\n"
    )
    print(table(seconds, ["plain forward"]))
    print("\ntokens/s as a share of the plain forward pass's:")
    for name in seconds:
        rate = tokens / statistics.median(seconds[name])
        print(f"  {name}: {1 / ratio(seconds, name, 'plain forward'):.2f} ({rate:,.0f} tokens/s)")


if __name__ == "__main__":
    main()
