"""How often each method leaves the model of train.py right: exact match on the held-out questions.

Usage: python examples/marked_cell/measure.py FOLDER [METHOD ...] [--against METHOD]

METHOD is a name of the catalog, with fields where wanted: `faster_vlm`, `faster_vlm:layer=-1`; or a site, `input` or
`decoder`, for all its methods. Those of `input` unless given. A method that the model does not suit, or a budget that
it cannot reach, is left out with a line that says so. Chance (`random`, `random_decoder`) runs with five seeds.

Prints one table for each kind of question, with 95% intervals by bootstrap over the questions, and one of what the
language model computes to read a prompt: at the input `keep` is a share of the image tokens, inside the language model
that of image token x layer. With --against, tables of how many points each method is above that one, too, paired by
question.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import tokenwise as tw
from tokenwise import catalog
from tokenwise.errors import InputError
from tokenwise.models.decoders import find_decoder
from tokenwise.policies.plans import Shape

KEEPS = (0.75, 0.5, 0.25, 0.1)
BATCH = 100
CHANCE, SEEDS = ("random", "random_decoder"), range(5)

Batch = dict[str, torch.Tensor]


@dataclass
class Measured:
    """What a method does at one budget.

    Args:
        right: which questions are answered right, [seeds, questions].
        work: share of the language model's multiply-accumulates for a prompt.
    """

    right: NDArray[np.bool_]
    work: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", default=["input"], metavar="METHOD")
    parser.add_argument("--against", metavar="METHOD", help="the method that the others are compared with")
    options = parser.parse_args()
    folder: Path = options.folder
    against = [] if options.against is None else [options.against]
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = np.array([record["kind"] for record in records])
    batches = [inputs(processor, folder, records[start : start + BATCH]) for start in range(0, len(records), BATCH)]
    answers = [record["answer"] for record in records]
    dense = right(model, processor, batches, answers)
    found: dict[str, list[Measured | None]] = {}
    refused = {}
    for text in methods([*against, *options.methods]):
        found[text] = []
        for keep in KEEPS:
            try:
                found[text].append(measure(model, processor, batches, answers, text, keep))
            except InputError as error:
                found[text].append(None)
                refused[f"left out: {text}: {error}"] = True
    print("\n".join(refused))
    found = {text: by_keep for text, by_keep in found.items() if any(by_keep)}
    for kind in dict.fromkeys(kinds):
        of_kind = kinds == kind
        print(f"\nExact match in % by keep, questions for a {kind}; all tokens: {100 * dense[of_kind].mean():.1f}\n")
        cells = {
            name: [None if each is None else each.right[:, of_kind].mean(0) for each in row]
            for name, row in found.items()
        }
        table({name: [None if each is None else interval(each) for each in row] for name, row in cells.items()})
        for other in (name for name in against if name in found):
            print(f"\nPoints above {other} by keep, questions for a {kind}\n")
            pairs = {name: list(zip(row, cells[other], strict=True)) for name, row in cells.items() if name != other}
            differ = {
                name: [None if each is None or base is None else interval(each - base) for each, base in row]
                for name, row in pairs.items()
            }
            table(differ)
    print(
        "\nMultiply-accumulates of the language model's layers for a prompt by keep, shares of those for all tokens\n"
    )
    table({name: [each and f"{each.work:.2f}" for each in row] for name, row in found.items()})


def table(rows: dict[str, list[str | None]]) -> None:
    """Print the methods' cells by budget, empty ones for what was left out."""
    print("| method | " + " | ".join(map(str, KEEPS)) + " |")
    print("|---" * (len(KEEPS) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cell or "" for cell in cells) + " |")


def methods(given: list[str]) -> list[str]:
    """What was given, with the names of all methods of a site in its place."""
    entries = [entry for entry in catalog.entries().values() if entry["family"] == "reduction"]
    names: list[str] = []
    for text in given:
        of_site = [entry["name"] for entry in entries if entry["traits"].get("site") == text]
        names += of_site or [text]
    return list(dict.fromkeys(names))


def method(text: str, **fields: Any) -> Any:
    """The method that `text` names, `name` or `name:field=value,field=value`."""
    name, _, given = text.partition(":")
    pairs = (pair.split("=", 1) for pair in given.split(",") if pair)
    spec = {name: {**{field: json.loads(value) for field, value in pairs}, **fields}}
    return catalog.build(spec, family="reduction")


def inputs(processor: Any, folder: Path, records: list[dict[str, str]]) -> Batch:
    """The model's inputs for some questions."""
    images = [Image.open(folder / record["image"]) for record in records]
    texts = [f"<image> {record['question']}" for record in records]
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))


@torch.no_grad()
def right(
    model: Any, processor: Any, batches: list[Batch], answers: list[str], done: Callable[[Batch], object] | None = None
) -> NDArray[np.bool_]:
    """Which questions are answered right, [questions]; `done` is called after each batch."""
    said: list[str] = []
    for batch in batches:
        ids = model.generate(**batch, max_new_tokens=2, do_sample=False)
        said += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        if done is not None:
            done(batch)
    return np.array([text.strip() == answer for text, answer in zip(said, answers, strict=True)])


def measure(model: Any, processor: Any, batches: list[Batch], answers: list[str], text: str, keep: float) -> Measured:
    """What a method does to the answers.

    Raises:
        InputError: when the model does not suit the method, or the budget is too small for it.
    """
    seeds = [{"seed": seed} for seed in SEEDS] if text.partition(":")[0] in CHANCE else [{}]
    rows, work = [], []
    for seed in seeds:
        with tw.reduce(model, method(text, keep=keep, **seed)) as handle:
            rows.append(
                right(
                    model,
                    processor,
                    batches,
                    answers,
                    lambda batch, handle=handle: work.append(share(model, handle, batch)),
                )
            )
    return Measured(np.stack(rows), float(np.mean(work)))


def share(model: Any, handle: Any, batch: Batch) -> float:
    """What the language model computed to read a batch of prompts, as a share of that for all tokens."""
    if "macs_share" in handle.stats:
        return float(handle.stats["macs_share"])
    decoder = find_decoder(model)
    shape = Shape(0, 1, 0, decoder.width, decoder.hidden_width, True, decoder.key_width)
    image = (batch["input_ids"] == model.config.image_token_id).sum(1)
    whole = batch["attention_mask"].sum(1)
    left = whole - image * (1 - handle.stats["image_tokens_after"] / handle.stats["image_tokens_before"])
    return float(shape.macs([left], [left]).sum() / shape.macs([whole], [whole]).sum())


def interval(each: NDArray[np.float64]) -> str:
    """The mean over [questions] in percent, and its 95% interval by bootstrap over them."""
    draws = np.random.default_rng(0).integers(len(each), size=(2000, len(each)))
    low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
    return f"{100 * each.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
