"""What reading a prompt costs with fewer image tokens: all of them dropped before the language model, or inside it.

Usage: python benchmarks/token_reduction_decoder.py [--rounds 7] [--threads 2]

A LLaVA-like model with random weights: hidden 512, 8 layers, 576 image and 64 text tokens, batch 1. Its images are
encoded beforehand, so that the language model alone is timed. Each contestant's share of the multiply-accumulates is
printed beside its share of the time; the peak is that of a process of its own, beyond what it had before the call.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, ratio
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokenwise as tw
from tokenwise.policies.plans import Shape

IMAGE, LAYERS, IMAGES, TEXT = 999, 8, 576, 64
SHAPE = Shape(IMAGES + TEXT, LAYERS, TEXT, 512, 1376, True)
METHODS: dict[str, Any] = {
    "FastV, layer 2, half": lambda: tw.FastV(ratios=(0.5,), layer=2),
    "FastV, layer 2, a quarter": lambda: tw.FastV(ratios=(0.25,), layer=2),
    "PyramidDrop": lambda: tw.PyramidDrop(ratios=(0.5, 0.25, 0.125)),
    "SparseVLM, keep 0.4": lambda: tw.SparseVLM(keep=0.4),
    "TransPrune, keep 0.5": lambda: tw.TransPrune(keep=0.5),
    "random, layer 2, half": lambda: tw.RandomDecoder(ratios=(0.5,), layer=2),
}
INPUT = {"input, keep 0.25": 0.25, "input, keep 0.11": 0.11}


def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=LAYERS, num_attention_heads=8
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 900, (1, IMAGES + TEXT), generator=torch.Generator().manual_seed(0))
    ids[0, 16 : 16 + IMAGES] = IMAGE
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def contestant(llava: LlavaForConditionalGeneration, name: str) -> tuple[Callable[[], object], float]:
    """What reads the prompt, and its share of the dense layers' multiply-accumulates."""
    keep = INPUT.get(name, 1.0)
    inputs = tw.reduction.prune_inputs(llava, batch(), tw.reduction.Random(keep=keep))
    count = inputs["input_ids"].shape[1]
    share = SHAPE.macs([count] * LAYERS, [count] * LAYERS) / SHAPE.macs(
        [SHAPE.tokens] * LAYERS, [SHAPE.tokens] * LAYERS
    )

    @torch.no_grad()
    def read() -> object:
        return llava(**inputs, logits_to_keep=1, use_cache=True)

    if name not in METHODS:
        return read, share

    def reduced() -> object:
        with tw.reduce(llava, METHODS[name]()) as handle:
            read()
        return handle.stats["macs_share"]

    return reduced, float("nan")


def peak(name: str) -> int:
    """KiB that one call takes beyond what this process had before it."""
    llava = model()
    contestant(llava, "input, keep 0.11")[0]()
    read, _ = contestant(llava, name)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    read()
    return resident("VmHWM") - before


def resident(line: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(each.split()[1]) for each in file if each.startswith(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", metavar="NAME", help="print the peak of one contestant and end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak))
        return
    llava = model()
    names = ["dense", *INPUT, *METHODS]
    made = {name: contestant(llava, name) for name in names}
    shares = {name: made[name][0]() if name in METHODS else made[name][1] for name in names}
    seconds = interleaved({name: read for name, (read, _) in made.items()}, options.rounds)
    print("| | time / dense | multiply-accumulates / dense | peak memory, MiB |\n|---|---|---|---|", flush=True)
    for name in names:
        run = [sys.executable, __file__, "--threads", str(options.threads), "--peak", name]
        found = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        time = ratio(seconds, name, "dense")
        print(f"| {name} | {time:.2f} | {shares[name]:.2f} | {found / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
