"""What methods that evict from the key-value cache cost in right answers, and how many bytes they leave.

Usage: python benchmarks/cache_quality.py FOLDER ... [--methods METHOD ...] [--keep 0.05 0.1 0.2 0.3 0.5] [--rows N]
    [--out FOLDER] [--picture FILE.svg]

FOLDER holds a causal language model of transformers with its tokenizer in model/, and rows {"context": ...,
"question": ..., "answer": ...} in recall.jsonl, as examples/recall/train.py writes them; several are repetitions, each
with a training seed and contexts of its own. METHOD is a name of the catalog, with fields where wanted: ``snap_kv``,
``snap_kv:allocate="heads"``. All methods of the family unless given, in the sizes of `SCALED`, which fit contexts of
some hundred tokens; ``all`` stands for them where others are named beside. One that cannot run is left out, with a line
that says why.

Prints a table for the question visible to the method and one for the question hidden from it (see docs/cache.md):
right answers in percent, the mean of the folders, with their 95% interval, and whether that is better or worse than
``random``, paired by row. The interval is Student's t over the folders' means: each is a draw of a model and of its
rows, so that it holds both. Of one folder it is a bootstrap over the rows. ``random``, and other methods that draw, are
the mean of five seeds of their own. A third table says which share of the full cache's bytes is stored or, of methods
that store everything, which share of the tokens each step reads; a fourth shows the folders one by one, at the middle
budget.

What is finished, a method on a folder, is kept in --out, and measured again only where the model, the rows, the
method's fields, the budgets or the library's code changed. --picture draws right answers against bytes.

The budgets share one prefill, in a cache that hides what another would have evicted, where that gives the logits that
evicting gives; which is tried on the first rows at every budget. Else each budget has a prefill of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from cache_quality_picture import Line, Panel, picture
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import tokenwise as tw
from tokenwise import catalog
from tokenwise.cache.selecting import SelectingCache
from tokenwise.comparison.contexts import Contexts, read_contexts
from tokenwise.comparison.long_context import take_back
from tokenwise.errors import InputError
from tokenwise.files import write_text
from tokenwise.models.cache_memory import cache_nbytes

CONTROL, BASELINE, SEEDS = "random", "full", range(5)
SCALED = {
    **{"sink": 1, "recent": 4, "queries": 4, "kernel": 3},
    **{"lag": 16, "page": 4, "future": 8, "dense_layers": 0},
}
"""What these fields are at most, where a method has them: the papers' defaults are larger than the budgets here."""
SCALED_OF = {"chunk_kv": {"chunk": 4}}
"""The same of one method."""
WAYS = ("visible", "hidden")
VERSION = 1
"""Raised when the same is measured otherwise; stored results of older versions are then not reused."""
BATCH, TRIED, SAME = 50, 8, 1e-3
"""Rows at once; rows on which hiding is compared with evicting, and bytes are counted; how close logits must be."""

Right = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A method on a folder.

    Args:
        right: how often each row is answered right at each budget, [rows].
        stored: the share of the full cache's bytes at each budget.
        read: the share of the tokens that a step reads, of methods that select; else empty.
    """

    right: dict[str, list[float]]
    stored: dict[str, float]
    read: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=["all"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    listed = [name for given in options.methods for name in (family() if given == "all" else [given])]
    others = dict.fromkeys(name for name in listed if name not in (CONTROL, BASELINE))
    # Those that store everything last.
    names = [CONTROL, *sorted(others, key=lambda name: (selects(name), name))]
    found: dict[tuple[str, str], list[Measured]] = {}
    for folder in options.folders:
        study = Study(folder, options.rows, options.out)
        full = np.mean(study.measured(BASELINE, [1.0], "visible").right["1"])
        print(
            f"{folder.name}: {len(study.rows)} rows of {study.rows.lengths[:, 0].mean():.0f} tokens; right with the "
            f"full cache: {100 * full:.1f} %",
            flush=True,
        )
        for name in list(names):
            try:
                for way in WAYS:
                    found.setdefault((way, name), []).append(study.measured(name, options.keep, way))
            except (InputError, NotImplementedError) as error:
                print(f"left out: {name}: {error}")
                names.remove(name)
    for way in WAYS:
        print(f"\nQuestion {way}\n\n| method |{''.join(f' {keep:g} |' for keep in options.keep)}")
        print("|---|" + "---|" * len(options.keep))
        for name in names:
            cells = [judged(*(values(found[way, each], keep) for each in (name, CONTROL))) for keep in options.keep]
            print(line(shown(name), cells))
    print(f"\nShare of the full cache's bytes\n\n| method |{''.join(f' {keep:g} |' for keep in options.keep)}")
    print("|---|" + "---|" * len(options.keep))
    for name in names:
        both = [*found["visible", name], *found["hidden", name]]
        print(line(shown(name), [f"{share(both, keep):.3f}" for keep in options.keep]))
    keep = options.keep[len(options.keep) // 2]
    print(f"\nEach folder at {keep:g}, question visible / hidden\n")
    print(line("method", [folder.name for folder in options.folders]))
    print("|---|" + "---|" * len(options.folders))
    for name in names:
        right = ([f"{100 * mean:.1f}" for mean in means(found[way, name], keep)] for way in WAYS)
        print(line(shown(name), [" / ".join(pair) for pair in zip(*right, strict=True)]))
    if options.picture:
        write_text(options.picture, picture([panel(name, found, options.keep) for name in names[1:]]))


class Study:
    """A folder that examples/recall/train.py wrote, and what methods cost there.

    Args:
        folder: with model/ and recall.jsonl.
        limit: how many rows at most; None for all.
        out: where finished results are kept; None to keep none.
    """

    def __init__(self, folder: Path, limit: int | None, out: Path | None) -> None:
        directory, data = folder / "model", folder / "recall.jsonl"
        self.model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).eval()
        self.rows = read_contexts([data], limit, AutoTokenizer.from_pretrained(directory), 10**6, "recall.jsonl")
        self.folder, self.out = folder, out
        package = Path(tw.__file__).parent
        code = (path for part in ("cache", "models", "policies", "signals") for path in (package / part).rglob("*.py"))
        # Whatever a result depends on.
        self.inputs = [digest([*directory.iterdir(), data]), digest(code), len(self.rows)]

    def measured(self, text: str, keeps: list[float], way: str) -> Measured:
        """The method that `text` names at each budget; as it was stored, if it was."""
        one = method(text, keep=1.0)
        inputs = [VERSION, *self.inputs, one.card.id, one.version, one.model_dump(mode="json"), keeps, way]
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
        path = self.out and self.out / f"{self.folder.name}-{one.card.name}-{way}-{key}.json"
        if path and path.exists():
            return Measured(**json.loads(path.read_text(encoding="utf-8")))
        found = measure(self.model, self.rows, text, keeps, way == "hidden")
        if path:
            write_text(path, json.dumps(asdict(found)))
        return found


def selects(text: str) -> bool:
    """Whether the method that `text` names stores all tokens and reads a part of them."""
    return bool(method(text, keep=1.0).mode == "select")


def shown(text: str) -> str:
    """The name of what `text` names, and what its fields are set to."""
    name, _, fields = text.partition(":")
    pairs = (pair.split("=", 1) for pair in fields.split(",") if pair)
    # A word says what it is, a number does not.
    return ", ".join([name, *(json.loads(value) if '"' in value else f"{field} {value}" for field, value in pairs)])


def digest(paths: Iterable[Path]) -> str:
    """Of the contents of files, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


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
def measure(model: Any, rows: Contexts, text: str, keeps: list[float], hidden: bool) -> Measured:
    """How often each row is answered right at each budget, and what is stored."""
    whole = method(text, keep=1.0)
    draws = "seed" in type(whole).model_fields
    found: dict[float, list[Right]] = {keep: [] for keep in keeps}
    stored, read = {}, {}
    for seed in SEEDS if draws else (None,):
        one = whole if seed is None else whole.replace(seed=seed)
        right = {keep: np.empty(len(rows)) for keep in keeps}
        hides = None
        for batch in batches(rows):
            parts = [torch.tensor([rows.parts(row)[part] for row in batch]) for part in range(3)]
            if hides is None:
                some = [part[:TRIED] for part in parts]
                stored, read, hides = tried(model, one, keeps, some, hidden)
                if not hides and seed in (None, SEEDS[0]):
                    print(f"{text}: a prefill for each budget, as hiding is not evicting", file=sys.stderr)
            for keep, logits in answered(model, one, keeps, parts, hidden, hides):
                right[keep][batch] = (logits.argmax(-1) == parts[2]).all(1).numpy()
        for keep in keeps:
            found[keep].append(right[keep])
    return Measured(
        right={f"{keep:g}": np.mean(values, 0).tolist() for keep, values in found.items()},
        stored={f"{keep:g}": share for keep, share in stored.items()},
        read={f"{keep:g}": share for keep, share in read.items()},
    )


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
) -> tuple[dict[float, float], dict[float, float], bool]:
    """The share of the full cache's bytes that each budget stores, that of the tokens that a method which selects then
    reads, and whether hiding is the same as evicting."""
    stored, read, logits, hides = {}, {}, {}, True
    for keep in keeps:
        with tw.evict(model, one.replace(keep=keep)) as cache:
            model(first(parts, hidden), past_key_values=cache, logits_to_keep=1)
            stock = DynamicCache(config=model.config)
            model(first(parts, hidden), past_key_values=stock, logits_to_keep=1)
            stored[keep] = cache.nbytes() / cache_nbytes(stock)
            logits[keep] = written(model, cache, parts, hidden)
            hides = hasattr(cache, "with_keep")
            if isinstance(cache, SelectingCache):
                read[keep] = cache.stats["tokens_read"] / cache.stats["tokens_seen"]
    if not hides:
        return stored, read, False
    try:
        hiding = dict(answered(model, one, keeps, parts, hidden, True))
    except (InputError, NotImplementedError):
        return stored, read, False
    return stored, read, all(torch.allclose(hiding[keep], logits[keep], rtol=SAME, atol=SAME) for keep in keeps)


def first(parts: list[Tensor], hidden: bool) -> Tensor:
    """What the method sees before it evicts."""
    return parts[0] if hidden else torch.cat(parts[:2], 1)


def written(model: Any, cache: Any, parts: list[Tensor], hidden: bool) -> Tensor:
    """The logits of the answer's tokens, each after the right ones before it, from what is left in the cache."""
    ids = parts[1]
    if not hidden:
        take_back(cache)
        ids = ids[:, -1:]
    # What selects reads a part of a prompt whole, and single words by its choice: the question's are read so, too.
    question = ids.split(1, 1) if isinstance(cache, SelectingCache) else [ids]
    steps = [*question, *parts[2][:, :-1].split(1, 1)]
    found = [model(step, past_key_values=cache, logits_to_keep=1).logits for step in steps]
    return torch.cat(found[len(question) - 1 :], 1)


def values(found: list[Measured], keep: float) -> list[Right]:
    """How often each row of each folder was answered right."""
    return [np.array(one.right[f"{keep:g}"]) for one in found]


def means(found: list[Measured], keep: float) -> list[float]:
    """The share of right answers on each folder."""
    return [float(one.mean()) for one in values(found, keep)]


def share(found: list[Measured], keep: float) -> float:
    """The mean share of the full cache's bytes that is stored; of methods that select, that of the tokens read."""
    return float(np.mean([(one.read or one.stored)[f"{keep:g}"] for one in found]))


def judged(found: list[Right], control: list[Right]) -> str:
    """The mean in percent and its interval: bold where better than chance, with an arrow where worse."""
    mean, low, high = (100 * value for value in within(found))
    text = f"{mean:.1f} [{low:.0f}, {high:.0f}]"
    _, low, high = spread([one - other for one, other in zip(found, control, strict=True)])
    return f"**{text}**" if low > 0 else f"{text} ↓" if high < 0 else text


def within(found: list[Right]) -> tuple[float, ...]:
    """As `spread`, of shares: no interval ends outside [0, 1]."""
    return tuple(min(max(value, 0.0), 1.0) for value in spread(found))


def spread(found: list[Right]) -> tuple[float, float, float]:
    """The mean of the folders and its 95% interval: Student's t over folders, with one a bootstrap over the rows."""
    means = np.array([one.mean() for one in found])
    mean = float(means.mean())
    if len(found) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(means) - 1) * scipy.stats.sem(means))
        return mean, mean - half, mean + half
    draws = np.random.default_rng(0).integers(len(found[0]), size=(2000, len(found[0])))
    low, high = np.quantile(found[0][draws].mean(1), [0.025, 0.975])
    return mean, float(low), float(high)


def panel(name: str, found: dict[tuple[str, str], list[Measured]], keeps: list[float]) -> Panel:
    """What the picture shows of a method."""
    lines = {}
    for way in WAYS:
        shares, right = (
            [[of(found[way, each], keep) for keep in keeps] for each in (name, CONTROL)] for of in (share, means)
        )
        chance = np.mean(right[1], 1).tolist()
        lines[way] = Line(shares[0], np.transpose(right[0]).tolist(), shares[1], chance)
    return Panel(shown(name), selects(name), lines)


def line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
