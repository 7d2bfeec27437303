"""Every method on every batch layout against one short reference in fp64: makes docs/correctness.json.

Run it to write the file anew: ``python tests/weighting/correctness.py``. The reference holds whole logits, knows
nothing of batches, and takes one step of plain gradient descent on all sequences at once.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tokenwise as tw
from tokenwise import catalog
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.base import Run, TokenBatch, TokenWeighter

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import TOLERANCE, distance, packed, padded, sequences, train

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
BF16_TOLERANCE = 0.1
"""With bf16 products the update may differ from the exact one by this share of its size."""


def methods(reference: str) -> dict[str, TokenWeighter]:
    """Every weighting method of the catalog that a language model trains with, each scope by itself."""
    found: dict[str, TokenWeighter] = {}
    for entry in catalog.entries().values():
        if entry["family"] != "weighting" or entry["traits"].get("kind") not in ("weights", "pointwise"):
            continue
        if entry["name"] in NOT_HERE:
            continue
        owner = catalog.load_class(entry["id"])
        fields = {name: reference for name in owner.model_fields if name in ("reference", "base")}
        fields |= REQUIRED.get(entry["name"], {})
        scopes = _choices(owner, "scope")
        for scope in scopes or [None]:
            method = owner(**fields, **({} if scope is None else {"scope": scope}))
            found[entry["name"] + (f", scope {scope}" if scope else "")] = method
    return found


REQUIRED: dict[str, dict[str, Any]] = {}
"""Values of fields that have no default."""
NOT_HERE = {
    "random": "draws anew for every batch",
    "fault_aware": "needs both programs of a pair in one micro-batch",
    "ss_token_previous_epoch": "refuses several processes, and has no history in its first step",
}
"""Methods that cannot be in the table, and why."""
COLUMNS = ("loss_weights", "sample_id", "base_nll", "completion_mask", "difference")


def _choices(owner: type, field: str) -> list[str]:
    described = owner.model_json_schema().get("properties", {}).get(field, {})
    return list(described.get("enum", []))


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


def columns_of(method: TokenWeighter) -> list[str]:
    """The side columns that `method` reads; losses of a reference are one of them where no model gives them."""
    given = {"reference_nll"} if isinstance(method, tw.TokenCleaning) else set()
    return sorted(method.reads & ({*COLUMNS} | given))


def rows_of(method: TokenWeighter, layout: str) -> list[dict[str, torch.Tensor]]:
    """The sequences as a data set in `layout`, with the columns that the method reads."""
    pairs, side = sequences(), columns()
    rows = packed(pairs, len(pairs)) if layout == "packed" else padded(pairs, layout)
    for name in columns_of(method):
        for index, row in enumerate(rows):
            if layout == "packed":
                row[name] = torch.cat([values[name] for values in side])
            else:
                values = side[index][name]
                missing = 12 - len(values)
                row[name] = F.pad(values, (0, missing) if layout == "right" else (missing, 0))
    return rows


def reference_step(
    model: LlamaForCausalLM, method: TokenWeighter, reference: LlamaForCausalLM, clip: float = 0.0
) -> LlamaForCausalLM:
    """The model after one step of gradient descent on whole logits, all sequences at once and unpadded."""
    model = copy.deepcopy(model)
    seen: dict[str, list[torch.Tensor]] = {}

    def add(**values: torch.Tensor) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(value)

    given = columns_of(method)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for index, ((ids, labels), side) in enumerate(zip(sequences(), columns(), strict=True)):
        kept = labels[1:] != IGNORED
        target = labels[1:][kept]
        logits = model(ids[None]).logits[0, :-1][kept]
        nll = F.cross_entropy(logits, target, reduction="none")
        top = logits.detach().topk(20).values.log_softmax(1)
        if "prompt_attention" in method.reads:
            # Eager attention computes its softmax in fp32, so it serves for nothing else.
            attention = eager(ids[None], output_attentions=True).attentions[-1][0].mean(0)[1:][kept].detach()
            add(prompt_attention=attention[:, labels == IGNORED].sum(1))
        add(
            nll=nll,
            entropy=-(logits.softmax(1) * logits.log_softmax(1)).sum(1).detach(),
            top_entropy=-(top.exp() * top).sum(1),
            labels=target,
            sequence=torch.full_like(target, index),
            **{name: side[name][1:][kept] for name in given},
        )
        if "reference_nll" not in given:
            add(reference_nll=_reference_nll(method, model, reference, ids, labels, nll))
    found = {name: torch.cat(values) for name, values in seen.items()}
    nll = found["nll"]
    names, sequence = torch.unique(found["sequence"], return_inverse=True)
    batch = TokenBatch(found["labels"], sequence, len(names), 0)
    for name in method.reads | {"nll"}:
        setattr(batch, name, found[name].detach())
    weights = method.weights(batch, method.start(Run(seed=3, model=model))).detach()
    divisor = {
        "token_mean": torch.tensor(len(nll)),
        "weight_mean": weights.sum(),
        "nonzero_mean": weights.count_nonzero(),
        "sequence_mean": torch.tensor(len(names)),
    }[method.reduction]
    if method.reduction == "sequence_mean":
        weights = weights / torch.bincount(sequence)[sequence]
    ((weights * nll).sum() / divisor).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    return model


def _reference_nll(
    method: TokenWeighter,
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    nll: torch.Tensor,
) -> torch.Tensor:
    """What each label of a sequence costs the model that the method measures against."""
    kept = labels[1:] != IGNORED
    if isinstance(method, tw.SsTokenAverage):  # the average of the model over no step yet
        return nll.detach()
    with torch.no_grad():
        if isinstance(method, tw.ContextualGap):  # the model itself, on the labelled tokens and the one before them
            first = int(kept.nonzero()[0]) if kept.any() else 0
            logits = torch.zeros(len(kept), model.config.vocab_size, dtype=torch.float64)
            logits[first:] = model(ids[None, first:]).logits[0, :-1]
        else:
            logits = reference(ids[None]).logits[0, :-1]
        return F.cross_entropy(logits[kept], labels[1:][kept], reduction="none")


def two_ranks(folder: Path, reference: str) -> None:
    """Train every method for one step on two processes; the models are saved in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*command, "--standalone", __file__, "--rank", str(folder), reference]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def rank(folder: Path, reference: str) -> None:
    """What each of the two processes does."""
    model = model_of(0)
    for name, method in methods(reference).items():
        trained, *_ = train(model, rows_of(method, "right"), method, folder / "out", **LAYOUTS["2 ranks"])
        if torch.distributed.get_rank() == 0:
            tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Without the interpreter's shutdown, in which threads of gloo abort the process now and then.
    os._exit(0)


def differences(folder: Path) -> dict[str, dict[str, float]]:
    """How far the update in each layout is from the reference's: method to layout to the largest difference.

    For bf16 it is the share of the update's own size.
    """
    first, second = model_of(0), model_of(1)
    reference = str(folder / "reference")
    second.float().save_pretrained(reference)
    second = second.double().eval()
    two_ranks(folder, reference)
    table: dict[str, dict[str, float]] = {}
    for name, method in methods(reference).items():
        table[name] = row = {}
        expected_with = {clip: reference_step(first, method, second, clip) for clip in (0.0, 0.05)}
        for layout, options in LAYOUTS.items():
            options = dict(options)
            rows = rows_of(method, options.pop("layout", "right"))
            expected = expected_with[options.get("clip", 0.0)]
            if layout == "2 ranks":
                found = copy.deepcopy(first)
                found.load_state_dict(load_file(folder / f"{name}.safetensors"))
            elif options.get("bf16"):
                found = train(copy.deepcopy(first).float(), rows, method, folder / "out", **options)[0].double()
            else:
                found = train(first, rows, method, folder / "out", **options)[0]
            row[layout] = distance(found, expected)
            if options.get("bf16"):
                row[layout] /= distance(first, expected)
    return table


def verdict(method: TokenWeighter, layout: str, difference: float) -> str:
    """``yes``, ``no, by definition`` for methods whose weights are formed within the micro-batch, or ``NO``."""
    if difference <= (BF16_TOLERANCE if layout == "bf16" else TOLERANCE):
        return "yes"
    split = layout != "1 batch"
    return "no, by definition" if split and getattr(method, "scope", None) == "micro_batch" else "NO"


def verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """The table of the documentation."""
    found = differences(folder)
    known = methods(str(folder / "reference"))
    return {
        name: {layout: verdict(known[name], layout, value) for layout, value in row.items()}
        for name, row in found.items()
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as folder:
            FILE.write_text(json.dumps(verdicts(Path(folder)), indent=1) + "\n", encoding="utf-8")
