"""What methods that evict from the key-value cache cost in right answers, and how many bytes they leave.

Usage: python benchmarks/cache_quality.py MODEL DATA.jsonl [METHOD ...] [--keep 0.05 0.1 0.2 0.3 0.5] [--rows N]

MODEL is a directory with a causal language model of transformers and its tokenizer, DATA holds rows {"context": ...,
"question": ..., "answer": ...}: both as examples/recall/train.py makes them. METHOD is a name of the catalog, with
fields where wanted: ``snap_kv``, ``snap_kv:allocate="heads"``. All methods of the family unless given, in the sizes of
`SCALED`, which fit contexts of some hundred tokens; ``all`` stands for them where others are named beside. One that
cannot run is left out, with a line that says why.

Prints a table for the question visible to the method and one for the question hidden from it (see docs/cache.md):
right answers in percent with their 95% interval by bootstrap over the rows, and whether that is better or worse than
``random``, paired by row. ``random``, and other methods that draw, are the mean of five seeds. A third table says which
share of the full cache's bytes is stored.

The budgets share one prefill, in a cache that hides what another would have evicted, where that gives the logits that
evicting gives; which is tried on the first rows at every budget. Else each budget has a prefill of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import tokenwise as tw
from tokenwise import catalog
from tokenwise.comparison.contexts import Contexts, read_contexts
from tokenwise.comparison.long_context import take_back
from tokenwise.errors import InputError
from tokenwise.models.cache_memory import cache_nbytes

CONTROL, BASELINE, SEEDS = "random", "full", range(5)
SCALED = {
    **{"sink": 1, "recent": 4, "queries": 4, "kernel": 3},
    **{"lag": 16, "page": 4, "future": 8, "dense_layers": 0},
}
"""What these fields are at most, where a method has them: the papers' defaults are larger than the budgets here."""
SCALED_OF = {"chunk_kv": {"chunk": 4}}
"""The same of one method."""
BATCH, TRIED, SAME = 50, 8, 1e-3
"""Rows at once; rows on which hiding is compared with evicting, and bytes are counted; how close logits must be."""

Right = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--rows", type=int)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, use_safetensors=True).eval()
    rows = read_contexts([options.data], options.rows, AutoTokenizer.from_pretrained(options.model), 10**6, "DATA")
    listed = [name for given in options.methods or ["all"] for name in (family() if given == "all" else [given])]
    names = [name for name in listed if name not in (CONTROL, BASELINE)]
    stored: dict[str, dict[float, float]] = {}
    full = measure(model, rows, BASELINE, [1.0], False, {})[1.0]
    print(f"{len(rows)} rows of {rows.lengths[:, 0].mean():.0f} tokens; right with the full cache: {interval(full)} %")
    for way in ("visible", "hidden"):
        print(f"\nQuestion {way}\n\n| method |{''.join(f' {keep:g} |' for keep in options.keep)}")
        print("|---|" + "---|" * len(options.keep))
        control = measure(model, rows, CONTROL, options.keep, way == "hidden", stored)
        print(line(CONTROL, [interval(control[keep]) for keep in options.keep]), flush=True)
        for name in names:
            try:
                found = measure(model, rows, name, options.keep, way == "hidden", stored)
            except (InputError, NotImplementedError) as error:
                print(f"left out: {name}: {error}")
                continue
            shown = [judged(found[keep], control[keep]) for keep in options.keep]
            print(line(name, shown), flush=True)
    print(f"\nBytes, share of the full cache's\n\n| method |{''.join(f' {keep:g} |' for keep in options.keep)}")
    print("|---|" + "---|" * len(options.keep))
    for name, shares in stored.items():
        print(line(name, [f"{shares[keep]:.3f}" for keep in options.keep if keep in shares]))


def family() -> list[str]:
    """The names of all methods of the family."""
    return [entry["name"] for entry in catalog.entries().values() if entry["family"] == "cache"]


def method(text: str, **fields: Any) -> Any:
    """The method that `text` names, ``name`` or ``name:field=value,field=value``, in the sizes of `SCALED`."""
    name, _, given = text.partition(":")
    pairs = (pair.split("=", 1) for pair in given.split(",") if pair)
    values = {field: json.loads(value) for field, value in pairs} | fields
    plain = catalog.build({name: values}, family="cache")
    kind = type(plain)
    for field, most in {**SCALED, **SCALED_OF.get(plain.card.name, {})}.items():
        default = kind.model_fields[field].default if field in kind.model_fields else None
        if field not in values and isinstance(default, int) and default > most:
            values[field] = most
    return catalog.build({name: values}, family="cache")


@torch.no_grad()
def measure(
    model: Any, rows: Contexts, text: str, keeps: list[float], hidden: bool, stored: dict[str, dict[float, float]]
) -> dict[float, Right]:
    """How often each row is answered right at each budget, [rows]; what is stored goes to `stored`."""
    whole = method(text, keep=1.0)
    draws = "seed" in type(whole).model_fields
    found: dict[float, list[Right]] = {keep: [] for keep in keeps}
    for seed in SEEDS if draws else (None,):
        one = whole if seed is None else whole.replace(seed=seed)
        right = {keep: np.empty(len(rows)) for keep in keeps}
        hides = None
        for batch in batches(rows):
            parts = [torch.tensor([rows.parts(row)[part] for row in batch]) for part in range(3)]
            if hides is None:
                some = [part[:TRIED] for part in parts]
                shares, hides = tried(model, one, keeps, some, hidden)
                stored.setdefault(text, {}).update(shares)
                if not hides and seed in (None, SEEDS[0]):
                    print(f"{text}: a prefill for each budget, as hiding is not evicting", file=sys.stderr)
            for keep, logits in answered(model, one, keeps, parts, hidden, hides):
                right[keep][batch] = (logits.argmax(-1) == parts[2]).all(1).numpy()
        for keep in keeps:
            found[keep].append(right[keep])
    return {keep: np.mean(values, 0) for keep, values in found.items()}


def batches(rows: Contexts) -> Iterator[list[int]]:
    """Rows whose parts are of one length each, so that nothing is padded."""
    for lengths in np.unique(rows.lengths, axis=0):
        same = np.flatnonzero((rows.lengths == lengths).all(1)).tolist()
        yield from (same[start : start + BATCH] for start in range(0, len(same), BATCH))


def answered(
    model: Any, one: Any, keeps: list[float], parts: list[Tensor], hidden: bool, hides: bool
) -> Iterator[tuple[float, Tensor]]:
    """For each budget the logits of the answer's tokens, [rows, tokens, vocabulary]."""
    if not hides:
        for keep in keeps:
            with tw.evict(model, one.replace(keep=keep)) as cache:
                model(first(parts, hidden), past_key_values=cache, logits_to_keep=1)
                yield keep, written(model, cache, parts, hidden)
        return
    with tw.evict(model, one, masked=True) as cache:
        model(first(parts, hidden), past_key_values=cache, logits_to_keep=1)
        for keep in keeps:
            with cache.with_keep(keep) as other:
                yield keep, written(model, other, parts, hidden)


def tried(
    model: Any, one: Any, keeps: list[float], parts: list[Tensor], hidden: bool
) -> tuple[dict[float, float], bool]:
    """The share of the full cache's bytes that each budget stores, and whether hiding is the same as evicting."""
    shares, logits, hides = {}, {}, True
    for keep in keeps:
        with tw.evict(model, one.replace(keep=keep)) as cache:
            model(first(parts, hidden), past_key_values=cache, logits_to_keep=1)
            stock = DynamicCache(config=model.config)
            model(first(parts, hidden), past_key_values=stock, logits_to_keep=1)
            shares[keep] = cache.nbytes() / cache_nbytes(stock)
            logits[keep] = written(model, cache, parts, hidden)
            hides = hasattr(cache, "with_keep")
    if not hides:
        return shares, False
    try:
        hiding = dict(answered(model, one, keeps, parts, hidden, True))
    except (InputError, NotImplementedError):
        return shares, False
    return shares, all(torch.allclose(hiding[keep], logits[keep], rtol=SAME, atol=SAME) for keep in keeps)


def first(parts: list[Tensor], hidden: bool) -> Tensor:
    """What the method sees before it evicts."""
    return parts[0] if hidden else torch.cat(parts[:2], 1)


def written(model: Any, cache: Any, parts: list[Tensor], hidden: bool) -> Tensor:
    """The logits of the answer's tokens, each after the right ones before it, from what is left in the cache."""
    ids = parts[1]
    if not hidden:
        take_back(cache)
        ids = ids[:, -1:]
    found = []
    for token in range(parts[2].shape[1]):
        found.append(model(ids, past_key_values=cache, logits_to_keep=1).logits)
        ids = parts[2][:, token : token + 1]
    return torch.cat(found, 1)


def interval(values: Right) -> str:
    """The mean in percent, and its 95% interval by bootstrap over the rows."""
    mean, low, high = (100 * value for value in spread(values))
    return f"{mean:.1f} [{low:.0f}, {high:.0f}]"


def judged(values: Right, control: Right) -> str:
    """As `interval`: bold where better than chance, with an arrow where worse."""
    _, low, high = spread(values - control)
    text = interval(values)
    return f"**{text}**" if low > 0 else f"{text} ↓" if high < 0 else text


def spread(values: Right) -> tuple[float, float, float]:
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
