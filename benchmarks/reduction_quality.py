"""What methods that reduce tokens inside an image classifier cost in accuracy, and what they save.

Usage: python benchmarks/reduction_quality.py MODEL DATA.parquet [METHOD ...] [--keep 0.75 0.5 0.25 0.1] [--images N]

MODEL is a directory with an image classifier of transformers, DATA a Parquet file with the columns ``image`` (an
encoded picture of the model's size, as bytes) and ``label``. METHOD is a name of the catalog, with fields where
wanted: ``tome``, ``evit:fuse=false``. All methods of the site ``encoder`` unless given; one that cannot run on the
model is left out, with a line that says why. Pixels are scaled to [-1, 1].

Prints accuracy with its 95% interval by bootstrap over the images, the share of the encoder's multiply-accumulates,
and the difference to ``random_drop``, paired by image. ``random_drop`` always runs, and is the mean of five seeds.
With ``--attack N`` a second table follows: for the first N images, how stable the kept tokens are under noise, and the
accuracy of the dense and of the reduced model, plain, under random signs, and under the compression-aware attack.
"""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageClassification

import tokenwise as tw
from tokenwise import catalog
from tokenwise.errors import InputError

CONTROL, SEEDS = "random_drop", range(5)
BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--images", type=int)
    parser.add_argument("--attack", type=int, default=0)
    parser.add_argument("--epsilon", type=float, default=0.03)
    options = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(options.model).eval()
    table = pyarrow.parquet.read_table(options.data, columns=["image", "label"]).slice(0, options.images)
    labels = np.array(table["label"])
    pictures = [np.array(Image.open(io.BytesIO(data)).convert("RGB")) for data in table["image"].to_pylist()]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    dense = right(model, pixels, labels)
    print(f"{len(labels)} images; accuracy with all tokens {interval(dense)} %\n")
    print("| method | keep | multiply-accumulates | accuracy, % | against random_drop, points |\n|---|---|---|---|---|")
    for keep in options.keep:
        control, share = measure(model, pixels, labels, CONTROL, keep)
        print(f"| {CONTROL} | {keep} | {share:.2f} | {interval(control)} | |", flush=True)
        for name in options.methods or names():
            if name == CONTROL:
                continue
            try:
                found, share = measure(model, pixels, labels, name, keep)
            except InputError as error:
                print(f"left out: {name}, keep {keep}: {error}")
                continue
            print(
                f"| {name} | {keep} | {share:.2f} | {interval(found)} | {interval(found - control, '+')} |", flush=True
            )
    if options.attack:
        batch = {"pixel_values": pixels[: options.attack], "labels": torch.tensor(labels[: options.attack]).long()}
        print(f"\n{options.attack} images, epsilon {options.epsilon}; accuracy in %, dense / reduced\n")
        print("| method | keep | Jaccard under noise | plain | random signs | attack |\n|---|---|---|---|---|---|")
        for keep in options.keep:
            for name in options.methods or names():
                print(attack(model, batch, name, keep, options.epsilon), flush=True)


def names() -> list[str]:
    """The names of all methods of the site `encoder`."""
    entries = [entry for entry in catalog.entries().values() if entry["family"] == "reduction"]
    return [entry["name"] for entry in entries if entry["traits"].get("site") == "encoder"]


def method(text: str, **fields: Any) -> Any:
    """The method that `text` names, ``name`` or ``name:field=value,field=value``."""
    name, _, given = text.partition(":")
    pairs = (pair.split("=", 1) for pair in given.split(",") if pair)
    spec = {name: {**{field: json.loads(value) for field, value in pairs}, **fields}}
    return catalog.build(spec, family="reduction")


@torch.no_grad()
def right(model: Any, pixels: torch.Tensor, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Which images the model classifies right, [images], 0 or 1."""
    said = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels.split(BATCH)])
    return (said.numpy() == labels).astype(float)


def measure(
    model: Any, pixels: torch.Tensor, labels: NDArray[np.int64], text: str, keep: float
) -> tuple[NDArray[np.float64], float]:
    """How often each image is classified right, [images], and the share of the multiply-accumulates."""
    seeds = [{"seed": seed} for seed in SEEDS] if text.partition(":")[0] == CONTROL else [{}]
    rows = []
    for seed in seeds:
        with tw.reduce(model, method(text, keep=keep, **seed)) as handle:
            rows.append(right(model, pixels, labels))
            share = handle.stats["macs_share"]
    return np.mean(rows, 0), share


def attack(model: Any, batch: dict[str, torch.Tensor], text: str, keep: float, epsilon: float) -> str:
    """A row of the second table; noise has the strength `epsilon`."""
    try:
        chosen = method(text, keep=keep)
        [stability] = tw.reduction.rank_stability(model, batch, chosen, noise=(epsilon,))
        report = tw.reduction.compression_aware_attack(model, batch, chosen, epsilon=epsilon)
    except InputError as error:
        return f"left out: {text}, keep {keep}: {error}"
    pairs = (
        (report.dense, report.reduced),
        (report.dense_noise, report.reduced_noise),
        (report.dense_attacked, report.reduced_attacked),
    )
    shares = " | ".join(f"{100 * dense:.0f} / {100 * reduced:.0f}" for dense, reduced in pairs)
    return f"| {text} | {keep} | {stability.jaccard:.2f} | {shares} |"


def interval(values: NDArray[np.float64], sign: str = "") -> str:
    """The mean in percent, and its 95% interval by bootstrap over the images."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (values.mean(), low, high))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
