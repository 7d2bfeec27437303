"""How often each method leaves the model of train.py right: exact match on the held-out questions.

Usage: python examples/marked_cell/measure.py FOLDER [METHOD ...]

METHOD is a name of the catalog, with fields where wanted: `faster_vlm`, `faster_vlm:layer=-1`. All methods of the site
`input` unless given; a method that the model does not suit is left out with a line that says so. `random` runs with
five seeds. Prints one table for each kind of question, with 95% intervals by bootstrap over the questions.
"""

from __future__ import annotations

import json
import sys
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

KEEPS = (0.75, 0.5, 0.25, 0.1)
BATCH = 100
SEEDS = range(5)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("Usage: python examples/marked_cell/measure.py FOLDER [METHOD ...]")
    folder = Path(sys.argv[1])
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = np.array([record["kind"] for record in records])
    batches = [inputs(processor, folder, records[start : start + BATCH]) for start in range(0, len(records), BATCH)]
    answers = [record["answer"] for record in records]
    dense = right(model, processor, batches, answers)
    found = {}
    for text in sys.argv[2:] or methods():
        try:
            found[text] = [measure(model, processor, batches, answers, text, keep) for keep in KEEPS]
        except InputError as error:
            print(f"left out: {text}: {error}")
    for kind in dict.fromkeys(kinds):
        of_kind = kinds == kind
        print(f"\nExact match in % by keep, questions for a {kind}; all tokens: {100 * dense[of_kind].mean():.1f}\n")
        print("| method | " + " | ".join(map(str, KEEPS)) + " |")
        print("|---" * (len(KEEPS) + 1) + "|")
        for name, by_keep in found.items():
            print(f"| {name} | " + " | ".join(interval(values[:, of_kind]) for values in by_keep) + " |")


def methods() -> list[str]:
    """The names of all methods of the site `input`."""
    entries = [entry for entry in catalog.entries().values() if entry["family"] == "reduction"]
    return [entry["name"] for entry in entries if entry["traits"].get("site") == "input"]


def method(text: str, **fields: Any) -> Any:
    """The method that `text` names, `name` or `name:field=value,field=value`."""
    name, _, given = text.partition(":")
    pairs = (pair.split("=", 1) for pair in given.split(",") if pair)
    spec = {name: {**{field: json.loads(value) for field, value in pairs}, **fields}}
    return catalog.build(spec, family="reduction")


def inputs(processor: Any, folder: Path, records: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """The model's inputs for some questions."""
    images = [Image.open(folder / record["image"]) for record in records]
    texts = [f"<image> {record['question']}" for record in records]
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))


@torch.no_grad()
def right(model: Any, processor: Any, batches: list[dict[str, torch.Tensor]], answers: list[str]) -> NDArray[np.bool_]:
    """Which questions are answered right, [questions]."""
    said: list[str] = []
    for batch in batches:
        ids = model.generate(**batch, max_new_tokens=2, do_sample=False)
        said += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return np.array([text.strip() == answer for text, answer in zip(said, answers, strict=True)])


def measure(
    model: Any, processor: Any, batches: list[dict[str, torch.Tensor]], answers: list[str], text: str, keep: float
) -> NDArray[np.bool_]:
    """Which questions are answered right with fewer tokens, [seeds, questions]."""
    seeds = [{"seed": seed} for seed in SEEDS] if text.partition(":")[0] == "random" else [{}]
    rows = []
    for seed in seeds:
        with tw.reduce(model, method(text, keep=keep, **seed)):
            rows.append(right(model, processor, batches, answers))
    return np.stack(rows)


def interval(values: NDArray[np.bool_]) -> str:
    """The mean of [seeds, questions] in percent, and its 95% interval by bootstrap over the questions."""
    each = values.mean(0)
    draws = np.random.default_rng(0).integers(len(each), size=(2000, len(each)))
    low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
    return f"{100 * each.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
