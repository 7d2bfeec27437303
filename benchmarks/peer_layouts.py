"""Whose update does not depend on how the batch is cut: LLaMA-Factory's and open-unlearning's losses, and tokenwise's.

Usage:
    python benchmarks/peer_layouts.py --llama-factory CHECKOUT PYTHON --open-unlearning CHECKOUT PYTHON

CHECKOUT is a git checkout of the peer, PYTHON the interpreter of an environment with what it requires; either peer may
be left out. Each loss runs in the peer's own trainer, started by `peers/layouts_worker.py` in the peer's environment;
tokenwise's counterpart runs in transformers' Trainer in this one.

One step of gradient descent in fp64, with every way of cutting the same rows. Each cell is the largest difference of a
parameter from the step on the whole batch, as a share of the largest change. Rounding is 1e-6: transformers' norms and
rotary embeddings compute in fp32, and so do the peers' losses. The last column is how far the whole batch's step is
from tokenwise's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).parent / "peers" / "layouts_worker.py"
ROUNDING = 1e-5
CONFIG = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
LENGTHS = {"forget": (12, 7, 12, 9, 4, 8, 5, 6), "retain": (6, 5, 8, 12, 11, 9, 12, 7)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "whole batch": {"batch": 8},
    "accumulation 2": {"batch": 4, "accumulate": 2},
    "accumulation 4": {"batch": 2, "accumulate": 4},
    "accumulation 8": {"batch": 1, "accumulate": 8},
    "accumulation 3 + 3 + 2": {"batch": 3, "accumulate": 3},
    "2 ranks": {"batch": 4, "ranks": 2},
    "left padding": {"batch": 8, "side": "left"},
    "padded to 24": {"batch": 8, "length": 24},
}
PACKED = {"packed by twos": {"batch": 8, "pack": 2}}
Loss = tuple[str, dict[str, Any]]
Models = dict[str, dict[str, torch.Tensor]]
SUPERVISED: dict[str, tuple[Loss, Loss]] = {
    "nll": (("", {}), ("Uniform", {})),
    "DFT": (("", {"use_dft_loss": True}), ("DFT", {})),
    "EAFT": (("", {"use_eaft_loss": True}), ("EAFT", {})),
    "ASFT": (("", {"use_asft_loss": True}), ("ASFT", {})),
}
"""By name: how the peer is asked for it, and how tokenwise is."""
UNLEARNING: dict[str, tuple[Loss, Loss]] = {
    "GradAscent": (("grad_ascent.GradAscent", {}), ("GradientAscent", {})),
    "GradDiff": (("grad_diff.GradDiff", {}), ("GradientDifference", {})),
    "GradDiff, KL": (("grad_diff.GradDiff", {"retain_loss_type": "KL"}), ("GradientDifference", {"retain": "kl"})),
    "NPO": (("npo.NPO", {"beta": 0.1}), ("NPO", {})),
    "NPO, forget term alone": (("npo.NPO", {"beta": 0.1, "alpha": 0.0}), ("NPO", {"retain": "none"})),
    "SimNPO": (("simnpo.SimNPO", {"beta": 4.5, "gamma": 0.125}), ("SimNPO", {})),
    "SimNPO, forget term alone": (
        ("simnpo.SimNPO", {"beta": 4.5, "gamma": 0.125, "alpha": 0.0}),
        ("SimNPO", {"retain": "none"}),
    ),
    "WGA": (("wga.WGA", {"beta": 1.0}), ("WGA", {})),
    "SatImp": (("satimp.SatImp", {"beta1": 5.0, "beta2": 1.0, "gamma": 0.1, "alpha": 1.0}), ("SatImp", {})),
    "UNDIAL": (("undial.UNDIAL", {"beta": 10.0, "alpha": 0.0}), ("UNDIAL", {})),
    "CEU": (("ceu.CEU", {}), ("CEU", {})),
}
"""With the settings in open-unlearning's configs/trainer, which are tokenwise's defaults."""


def rows(lengths: tuple[int, ...], seed: int) -> list[dict[str, list[int]]]:
    """Sequences of different lengths, the first tokens of each without a label."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, length in enumerate(lengths):
        ids = torch.randint(2, 128, (length,), generator=generator).tolist()
        masked = index % 3 + 1
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


def starting_models(examples: list[dict[str, list[int]]]) -> Models:
    """The reference, which knows the examples in part, and the model in training, which has moved away from it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(40):
        for row in examples:
            labels = {name: torch.tensor([values]) for name, values in row.items()}
            model(**labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = {name: weights.detach().clone() for name, weights in model.state_dict().items()}
    moved = {name: weights + 0.01 * torch.randn_like(weights) for name, weights in reference.items()}
    return {"reference": reference, "model": moved}


def updates(
    library: str, python: str, checkout: str | None, losses: dict[str, Loss], job: dict[str, Any], models: Models
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The change of the parameters by loss and layout, and the versions it was measured with."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        named = [{"name": name, "kind": kind, "options": options} for name, (kind, options) in losses.items()]
        (folder / "job.json").write_text(json.dumps({**job, "losses": named}), encoding="utf-8")
        for name, weights in models.items():
            save_file(weights, folder / f"{name}.safetensors")
        found: dict[str, torch.Tensor] = {}
        for ranks in sorted({layout.get("ranks", 1) for layout in job["layouts"].values()}):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            command = [python, *(launcher if ranks > 1 else []), str(WORKER), library, directory]
            subprocess.run(
                command + ([checkout] if checkout else []),
                check=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )
            path = folder / f"updates-{ranks}.safetensors"
            found |= load_file(path)
            with safe_open(path, "pt") as file:
                versions = file.metadata()
    return found, versions


def share(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return (difference.abs().max() / whole.abs().max()).item()


def written(value: float) -> str:
    return f"{value:.0e}" if value < ROUNDING else f"{value:.1%}" if value < 0.01 else f"{value:.0%}"


def compare(
    title: str,
    library: str,
    checkout: str,
    python: str,
    losses: dict[str, tuple[Loss, Loss]],
    layouts: dict[str, dict[str, Any]],
    data: list[Any],
    models: Models,
) -> None:
    """Run a peer's losses and tokenwise's, and print the table."""
    job = {"config": CONFIG, "layouts": layouts, "rows": data}
    theirs, versions = updates(library, python, checkout, {name: pair[0] for name, pair in losses.items()}, job, models)
    own = {name: pair[1] for name, pair in losses.items()}
    ours, own_versions = updates("tokenwise", sys.executable, None, own, job, models)
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    for name, used in ((f"{title} {commit.stdout.strip()}", versions), ("tokenwise", own_versions)):
        print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in sorted(used.items())))
    cuts = [name for name in layouts if name != "whole batch"]
    print(f"\n| | {' | '.join(cuts)} | invariant | whole batch against tokenwise |")
    print("|---" * (len(cuts) + 3) + "|")
    for who, found in ((title, theirs), ("tokenwise", ours)):
        for name in losses:
            whole = found[f"{name}/whole batch"]
            shares = [share(found[f"{name}/{cut}"] - whole, whole) for cut in cuts]
            away = share(whole - ours[f"{name}/whole batch"], ours[f"{name}/whole batch"])
            verdict = "yes" if max(shares) < ROUNDING else "no"
            apart = written(away) if found is theirs else ""
            print(f"| {who} {name} | {' | '.join(map(written, shares))} | {verdict} | {apart} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--llama-factory", "--open-unlearning"):
        parser.add_argument(name, nargs=2, metavar=("CHECKOUT", "PYTHON"))
    chosen = parser.parse_args()
    if not chosen.llama_factory and not chosen.open_unlearning:
        parser.error("name a peer: --llama-factory or --open-unlearning, with its checkout and its Python")
    forget, retain = rows(LENGTHS["forget"], 0), rows(LENGTHS["retain"], 1)
    models = starting_models(forget + retain)
    if chosen.llama_factory:
        layouts = {**LAYOUTS, **PACKED}
        compare("LLaMA-Factory", "llama_factory", *chosen.llama_factory, SUPERVISED, layouts, forget, models)
    if chosen.open_unlearning:
        pairs = [{"forget": one, "retain": other} for one, other in zip(forget, retain, strict=True)]
        compare("open-unlearning", "open_unlearning", *chosen.open_unlearning, UNLEARNING, LAYOUTS, pairs, models)


if __name__ == "__main__":
    main()
