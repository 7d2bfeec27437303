"""The fused weighted loss against PyTorch's full-logits cross-entropy and TRL's chunked loss: time and memory.

Usage: python benchmarks/weighted_loss.py [--tokens 8192] [--hidden 512] [--vocabulary 32768] [--rounds 7] [--threads 2]

Forward and backward, fp32, CPU. Prints ratios from one interleaved run, then the peak memory that each contestant
needs beyond its inputs and the two gradients, each in a process of its own. TRL is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import interleaved, table

import tokenwise as tw
from tokenwise.comparison.memory import PeakMemory
from tokenwise.signals.head import tile_rows


def contestants(tokens: int, hidden: int, vocabulary: int) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    head = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) + 0.01
    sparse = weights.clone()
    sparse[torch.randperm(tokens, generator=generator)[: int(0.4 * tokens)]] = 0

    def backward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            states.grad = head.grad = None
            loss().backward()

        return run

    found = {
        "full logits": backward(lambda: F.cross_entropy(F.linear(states, head), labels)),
        "tokenwise": backward(lambda: tw.weighted_linear_cross_entropy(states, head, labels)),
        "tokenwise, weights": backward(lambda: tw.weighted_linear_cross_entropy(states, head, labels, weights=weights)),
        "tokenwise, DFT": backward(lambda: tw.weighted_linear_cross_entropy(states, head, labels, weights=tw.DFT())),
        "tokenwise, 40% zero": backward(lambda: tw.weighted_linear_cross_entropy(states, head, labels, weights=sparse)),
        "tokenwise, low memory": backward(
            lambda: tw.weighted_linear_cross_entropy(states, head, labels, low_memory=True)
        ),
    }
    if importlib.util.find_spec("trl") is not None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def chunked() -> torch.Tensor:
            outputs = ("entropy", "is_top1")  # what SFTTrainer asks for
            arguments = (states, head, None, labels, 1.0, 32768, None, 1.0, outputs)
            return -ChunkedLogProbFunction.apply(*arguments)[0].sum() / tokens

        found["TRL chunked"] = backward(chunked)
    return found


def peak_beyond_gradients(name: str, sizes: tuple[int, int, int]) -> float:
    """Peak extra bytes of one forward and backward, as a share of the full logits."""
    tokens, hidden, vocabulary = sizes
    run = contestants(tokens, hidden, vocabulary)[name]
    contestants(64, 64, 64)[name]()  # thread pools and libraries are not the method's
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[1]) * 4096
    memory = PeakMemory()
    memory.resume()
    run()
    memory.pause()
    assert memory.peak is not None
    gradients = 4 * hidden * (tokens + vocabulary)
    return (memory.peak - before - gradients) / (4 * tokens * vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.tokens, arguments.hidden, arguments.vocabulary)
    if arguments.memory_of:
        print(peak_beyond_gradients(arguments.memory_of, sizes))
        return
    runs = contestants(*sizes)
    print(f"{sizes[0]} tokens, hidden {sizes[1]}, vocabulary {sizes[2]}, fp32, {arguments.threads} threads\n")
    against = ["full logits", "tokenwise", "tokenwise, weights", *(["TRL chunked"] if "TRL chunked" in runs else [])]
    print(table(interleaved(runs, arguments.rounds), against))
    rows = tile_rows(sizes[2]), tile_rows(sizes[2], low_memory=True)
    print(f"\nPeak memory beyond the gradients / full logits (tiles of {rows[0]} rows, low memory {rows[1]}):\n")
    for name in runs:
        command = [sys.executable, __file__, "--memory-of", name, "--threads", str(arguments.threads)]
        for key, size in zip(("--tokens", "--hidden", "--vocabulary"), sizes, strict=True):
            command += [key, str(size)]
        share = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"- {name}: {share:.3f}")


if __name__ == "__main__":
    main()
