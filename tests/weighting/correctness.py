"""Every method on every batch layout against one short reference in fp64: makes docs/correctness.json.

Run it to write the file anew: ``python tests/weighting/correctness.py``. What a method is compared with is in
reference_steps.py.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tokenwise as tw
from tokenwise import catalog
from tokenwise.errors import InputError
from tokenwise.method import Method
from tokenwise.weighting.parameter_masks import ParameterMasks, load_masks, mask_parameters, save_masks

sys.path.insert(0, str(Path(__file__).parent))
from layouts import class_rows, classifier, forget_columns, laid_out, make_trainer, padded, sequences
from reference_steps import (
    TOLERANCE,
    chosen_parameters,
    class_step,
    distance,
    masked_step,
    objective_step,
    weighted_step,
)

FILE = Path(__file__).parents[2] / "docs" / "correctness.json"
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 batch": {"batch": 8, "accumulate": 1},
    "accumulation 2": {"batch": 4, "accumulate": 2},
    "accumulation 4": {"batch": 2, "accumulate": 4},
    "2 ranks": {"batch": 2, "accumulate": 2},
    "packed": {"batch": 1, "accumulate": 1, "layout": "packed"},
    "left padding": {"batch": 8, "accumulate": 1, "layout": "left"},
    "bf16": {"batch": 8, "accumulate": 1, "bf16": True},
    "clipping, accumulation 4": {"batch": 2, "accumulate": 4, "clip": 0.05},
}
SPLIT = ("accumulation 2", "accumulation 4", "2 ranks", "clipping, accumulation 4")
"""Layouts in which a step has several micro-batches."""
BF16_TOLERANCE = 0.1
"""With bf16 products the update may differ from the exact one by this share of its size."""
GROUPS = {"weights": "tokens", "pointwise": "tokens", "objective": "objectives", "classes": "classes", "masks": "masks"}
"""Kinds of methods, and the table each stands in. A kind that is missing here has no reference, which is an error."""

REQUIRED: dict[str, dict[str, Any]] = {
    # At their defaults these forget next to nothing of labels that the model does not know.
    "sat_imp": {"forget_coefficient": 1.0, "b1": 0.1},
    "sim_sat": {"beta": 0.1},
    "sim_npo": {"delta": 4.0},
    # Whole sequences have next to no probability, so that 1 - p tells them apart by its high powers alone.
    "sim_imp": {"beta": 100.0},
    "wagle": {"keep": 0.6},
    "largest_gradients": {"keep": 0.6},
    "largest_weights": {"keep": 0.6},
    "random_parameters": {"keep": 0.6},
}
"""Fields that are not at their defaults."""
CHOICES = ("scope", "granularity", "denominator", "divide_by")
"""Fields of which each choice has a row."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ldam": [{"defer": 0.0}],
    "gradient_difference": [{"retain": "kl"}],
}
"""More rows of a method."""
COLUMNS = ("loss_weights", "sample_id", "base_nll", "completion_mask", "difference")


@dataclass
class Case:
    """One row of the tables.

    Args:
        group: which table it stands in.
        name: what the row is called.
        method: the method; for masks of parameters what makes them.
        several: whether examples of a classifier have several labels.
    """

    group: str
    name: str
    method: Any
    several: bool = False

    def model(self) -> Any:
        """The model before the step."""
        return classifier("llama", self.several) if self.group == "classes" else model_of(0)

    def rows(self, layout: str) -> list[Any] | None:
        """The data set in `layout`; None where it does not apply."""
        if self.group == "classes":
            kind = "several" if self.several else "llama"
            return None if layout == "packed" else class_rows(kind, side=layout)
        return laid_out(sequences(), layout, self.columns(), per_row=len(sequences()))

    def columns(self) -> list[dict[str, torch.Tensor]]:
        """The columns that the method reads beside each sequence."""
        if self.group == "objectives":
            return forget_columns(sequences()) if "forget" in self.method.reads else [{} for _ in sequences()]
        if self.group == "masks":
            return [{} for _ in sequences()]
        paired = isinstance(self.method, tw.weighting.FaultAware)
        names = columns_of(self.method)
        return [{name: side[name] for name in names} for side in (pairs_of_programs() if paired else columns())]

    def expected(self, clip: float, reference: Any) -> Any:
        """The model after the step of the reference."""
        model, pairs = self.model(), sequences()
        if self.group == "classes":
            return class_step(model, class_rows("several" if self.several else "llama"), self.method, clip)[1]
        if self.group == "objectives":
            return objective_step(model, pairs, self.method, reference, forget_columns(pairs), clip)[1]
        if self.group == "masks":
            masks = chosen_parameters(model, self.method, *mask_batches())
            return masked_step(model, pairs, masks, clip)[1]
        return weighted_step(model, pairs, self.method, reference, self.columns(), clip)[1]

    def train(self, model: Any, rows: list[Any], folder: Path, **options: Any) -> Any:
        """A copy of the model after a step of transformers' Trainer."""
        model = copy.deepcopy(model)
        trainer = make_trainer(model, rows, folder / "out", **options)
        if self.group == "masks":
            tw.weigh(trainer, tw.Uniform())
            mask_parameters(trainer, load_masks(folder / f"{self.name}.masks"))
        else:
            tw.weigh(trainer, self.method)
        trainer.train()
        return model

    def depends_on_micro_batch(self) -> bool:
        """Whether the method's own definition says so; random draws go to tokens in the order in which they come."""
        fields = (getattr(self.method, name, None) for name in ("scope", "granularity", "denominator"))
        return isinstance(self.method, tw.weighting.Random) or any(
            value in ("micro_batch", "batch") for value in fields
        )


def cases(reference: str) -> dict[str, Case]:
    """Every weighting method of the catalog, each choice of its scope by itself."""
    found = []
    for entry in catalog.entries().values():
        if entry["family"] != "weighting":
            continue
        owner = catalog.load_class(entry["id"])
        group = GROUPS[entry["traits"]["kind"]]
        fields = {name: reference for name in ("reference", "base") if name in owner.model_fields}
        fields |= REQUIRED.get(entry["name"], {})
        for variant in variants(entry["name"], owner):
            name = ", ".join([entry["name"], *(f"{field} {value}" for field, value in variant.items())])
            method = owner(**{**fields, **variant})
            found.append(Case(group, name, method))
            if getattr(method, "multi_label", False) and "defer" not in variant:
                found.append(Case(group, f"{name}, several labels", method, several=True))
    return {case.name: case for case in found}


def variants(name: str, owner: type[Method]) -> Iterator[dict[str, Any]]:
    """The fields in which the rows of a method differ."""
    properties = owner.model_json_schema().get("properties", {})
    chosen = next((field for field in CHOICES if "enum" in properties.get(field, {})), None)
    if chosen is None:
        yield {}
    else:
        yield from ({chosen: value} for value in properties[chosen]["enum"])
    yield from VARIANTS.get(name, [])


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def columns() -> list[dict[str, torch.Tensor]]:
    """The side columns of each sequence, for the methods that read them."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "loss_weights": torch.rand(len(ids), generator=generator, dtype=torch.float64).round(decimals=1),
            "sample_id": torch.full((len(ids),), index),
            "base_nll": 4 * torch.rand(len(ids), generator=generator, dtype=torch.float64),
            "reference_nll": 4 * torch.rand(len(ids), generator=generator, dtype=torch.float64),
            "completion_mask": torch.randint(2, (len(ids),), generator=generator),
            "difference": torch.randint(2, (len(ids),), generator=generator),
        }
        for index, (ids, _) in enumerate(sequences())
    ]


def pairs_of_programs() -> list[dict[str, torch.Tensor]]:
    """Columns that make pairs of the sequences, the second of each the wrong program; one pair does not differ."""
    found = []
    for index, side in enumerate(columns()):
        difference = side["difference"] * (0 if index in (2, 3) else -1 if index % 2 else 1)
        found.append({"sample_id": torch.full_like(side["sample_id"], index // 2), "difference": difference})
    return found


def columns_of(method: Any) -> list[str]:
    """The side columns that `method` reads; losses of a reference are one of them where no model gives them."""
    given = {"reference_nll"} if isinstance(method, tw.TokenCleaning) else set()
    return sorted(method.reads & ({*COLUMNS} | given))


def mask_batches() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Batches to forget and batches to keep, from which masks of parameters are made."""
    rows = padded(sequences(), "right")
    batches = [{key: torch.stack([row[key] for row in rows[i : i + 2]]) for key in rows[0]} for i in (0, 2, 4, 6)]
    return batches[:2], batches[2:]


def two_ranks(folder: Path, reference: str) -> None:
    """Train every method for one step on two processes; the models are saved in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*command, "--standalone", __file__, "--rank", str(folder), reference]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def rank(folder: Path, reference: str) -> None:
    """What each of the two processes does."""
    for name, case in cases(reference).items():
        try:
            trained = case.train(case.model(), case.rows("right"), folder, **LAYOUTS["2 ranks"])
        except InputError:
            continue
        if torch.distributed.get_rank() == 0:
            tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Without the interpreter's shutdown, in which threads of gloo abort the process now and then.
    os._exit(0)


def references(case: Case, reference: Any) -> dict[float, Any]:
    """The model after the step of the reference, by the norm to which gradients are clipped."""
    first = case.model()
    found = {clip: case.expected(clip, reference) for clip in (0.0, 0.05)}
    assert distance(first, found[0.0]) > 100 * TOLERANCE, f"{case.name}: there is nothing to compare"
    assert distance(found[0.0], found[0.05]) > TOLERANCE, f"{case.name}: nothing is clipped"
    if getattr(case.method, "retain", "none") != "none":
        forgetting = replace(case, method=case.method.model_copy(update={"retain": "none"}))
        assert distance(first, forgetting.expected(0.0, reference)) > 100 * TOLERANCE, f"{case.name}: forgets nothing"
    return found


def difference(case: Case, layout: str, folder: Path, expected_with: dict[float, Any]) -> float | str:
    """How far the update in a layout is from the reference's; ``refused`` or ``does not apply`` where there is none.

    For bf16 it is the share of the update's own size.
    """
    options = dict(LAYOUTS[layout])
    rows = case.rows(options.pop("layout", "right"))
    if rows is None:
        return "does not apply"
    first = case.model()
    expected = expected_with[options.get("clip", 0.0)]
    if layout == "2 ranks":
        file = folder / f"{case.name}.safetensors"
        if not file.exists():
            return "refused"
        trained = copy.deepcopy(first)
        trained.load_state_dict(load_file(file))
    else:
        try:
            model = copy.deepcopy(first).float() if options.get("bf16") else first
            trained = case.train(model, rows, folder, **options).double()
        except InputError:
            return "refused"
    found = distance(trained, expected)
    return found / distance(first, expected) if options.get("bf16") else found


def verdict(case: Case, layout: str, found: float | str) -> str:
    """``yes``, ``no, by definition`` for methods whose losses are formed within the micro-batch, or ``NO``."""
    if isinstance(found, str):
        return found
    if found <= (BF16_TOLERANCE if layout == "bf16" else TOLERANCE):
        return "yes"
    return "no, by definition" if layout in SPLIT and case.depends_on_micro_batch() else "NO"


def verdicts(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """The tables of the documentation: group to row to layout to what was found."""
    model = model_of(1)
    reference = str(folder / "reference")
    model.float().save_pretrained(reference)
    model = model.double().eval()
    known = cases(reference)
    for name, case in known.items():
        if isinstance(case.method, ParameterMasks):
            save_masks(case.method.masks(case.model(), *mask_batches()), folder / f"{name}.masks")
    expected = {name: references(case, model) for name, case in known.items()}
    cells = {}
    with ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(two_ranks, folder, reference)
        for name, case in known.items():
            for layout in LAYOUTS:
                if layout != "2 ranks":
                    cells[name, layout] = difference(case, layout, folder, expected[name])
        ranks.result()
    for name, case in known.items():
        cells[name, "2 ranks"] = difference(case, "2 ranks", folder, expected[name])
    return {
        group: {
            name: {layout: verdict(case, layout, cells[name, layout]) for layout in LAYOUTS}
            for name, case in known.items()
            if case.group == group
        }
        for group in dict.fromkeys(GROUPS.values())
    }


if __name__ == "__main__":
    gc.collect = lambda *_: 0  # the Trainer collects at every start, which takes longer than all else here
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as folder:
            FILE.write_text(json.dumps(verdicts(Path(folder)), indent=1) + "\n", encoding="utf-8")
