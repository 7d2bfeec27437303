"""Takes one optimizer step per loss and batch layout with one library's own trainer; `peer_layouts.py` starts it.

Usage: python layouts_worker.py LIBRARY FOLDER [CHECKOUT]

It runs in the environment of the library it measures, and needs nothing from tokenwise's where that is a peer. It reads
``job.json``, ``reference.safetensors`` and ``model.safetensors`` from FOLDER, and writes the change of all parameters
for each loss and layout to ``updates-RANKS.safetensors``. Under torchrun with N processes it takes the layouts meant
for N ranks.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, logging

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
Build = Callable[[str, dict[str, Any], dict[str, Any]], Trainer]


def padded(rows: list[dict[str, list[int]]], layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded on the layout's side, or packed so many to a row with attention within each only."""
    packs = [rows[start : start + layout.get("pack", 1)] for start in range(0, len(rows), layout.get("pack", 1))]
    length = max(layout.get("length", 0), max(sum(len(row["input_ids"]) for row in pack) for pack in packs))
    fills = {"input_ids": 0, "labels": -100, "sequence": 0}
    columns: dict[str, list[list[int]]] = {name: [] for name in fills}
    for pack in packs:
        numbered = [{**row, "sequence": [index] * len(row["input_ids"])} for index, row in enumerate(pack, 1)]
        for name, fill in fills.items():
            values = [value for row in numbered for value in row[name]]
            padding = [fill] * (length - len(values))
            columns[name].append(padding + values if layout.get("side") == "left" else values + padding)
    batch = {name: torch.tensor(values) for name, values in columns.items()}
    sequence = batch.pop("sequence")
    mask = (sequence > 0).long()
    if "pack" in layout:
        together = (sequence.unsqueeze(1) == sequence.unsqueeze(2)).tril()
        mask = torch.zeros(together.shape, dtype=torch.float64).masked_fill(~together, torch.finfo(torch.float32).min)
        mask = mask.unsqueeze(1)
    return {**batch, "attention_mask": mask}


def collator(layout: dict[str, Any]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Rows into a batch; pairs of rows into a batch of each kind."""

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        if "input_ids" in items[0]:
            return padded(items, layout)
        return {kind: padded([item[kind] for item in items], layout) for kind in items[0]}

    return collate


def empty_package(name: str, folder: Path) -> None:
    """A package without its __init__, whose imports (other trainers, audio, DeepSpeed) the losses do not need."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def llama_factory(checkout: Path) -> Build:
    sys.path.insert(0, str(checkout / "src"))
    empty_package("llamafactory.train.sft", checkout / "src/llamafactory/train/sft")
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.hparams import TrainingArguments as Arguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    def build(kind: str, options: dict[str, Any], common: dict[str, Any]) -> Trainer:
        reference = copy.deepcopy(common["model"]) if options.get("use_asft_loss") else None
        return CustomSeq2SeqTrainer(
            FinetuningArguments(**options),
            processor=None,
            tokenizer=None,
            ref_model=reference,
            **{**common, "args": Arguments(**common["args"])},
        )

    return build


def open_unlearning(checkout: Path) -> Build:
    sys.path.insert(0, str(checkout / "src"))
    empty_package("trainer", checkout / "src/trainer")

    def build(kind: str, options: dict[str, Any], common: dict[str, Any]) -> Trainer:
        module, name = kind.split(".")
        trainer = getattr(importlib.import_module(f"trainer.unlearn.{module}"), name)
        return trainer(**{**common, "args": TrainingArguments(**common["args"])}, **options)

    return build


def tokenwise(checkout: None) -> Build:
    import tokenwise as tw

    def build(kind: str, options: dict[str, Any], common: dict[str, Any]) -> Trainer:
        trainer = Trainer(**{**common, "args": TrainingArguments(**common["args"])})
        collate = trainer.data_collator

        def marked(items: list[dict[str, Any]]) -> dict[str, Any]:
            if "input_ids" in items[0]:
                return collate(items)
            batch = collate([row for item in items for row in (item["forget"], item["retain"])])
            forget = torch.tensor([1, 0] * len(items)).unsqueeze(1).expand_as(batch["labels"])
            return {**batch, "forget": forget}

        trainer.data_collator = marked
        tw.weigh(trainer, getattr(tw, kind)(**options))
        return trainer

    return build


def step(build: Build, job: dict[str, Any], loss: dict[str, Any], layout: dict[str, Any]) -> torch.Tensor:
    """The change of all parameters in one step of gradient descent, as one vector."""
    model = LlamaForCausalLM(LlamaConfig(**job["config"], attn_implementation="sdpa")).double()
    # The losses with a reference take the model as it is when their trainer is made.
    model.load_state_dict(job["reference"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "per_device_train_batch_size": layout["batch"],
            "gradient_accumulation_steps": layout.get("accumulate", 1),
            "max_steps": 1,
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "report_to": [],
            "log_level": "error",
            "log_level_replica": "error",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            **({"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if RANKS > 1 else {}),
        }
        common = {
            "model": model,
            "args": arguments,
            "train_dataset": job["rows"],
            "data_collator": collator(layout),
        }
        trainer = build(loss["kind"], loss["options"], common)
        # The same rows in the same order everywhere: only the cuts between them differ.
        trainer._get_train_sampler = lambda *_: SequentialSampler(job["rows"])
        trainer.remove_callback(PrinterCallback)
        model.load_state_dict(job["model"])
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before


def main() -> None:
    library, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    build = {"llama_factory": llama_factory, "open_unlearning": open_unlearning, "tokenwise": tokenwise}[library](
        Path(sys.argv[3]) if len(sys.argv) > 3 else None
    )
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    job |= {name: load_file(folder / f"{name}.safetensors") for name in ("reference", "model")}
    updates = {
        f"{loss['name']}/{name}": step(build, job, loss, layout)
        for loss in job["losses"]
        for name, layout in job["layouts"].items()
        if layout.get("ranks", 1) == RANKS
    }
    if int(os.environ.get("RANK", "0")) == 0:
        versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "accelerate")}
        save_file(updates, folder / f"updates-{RANKS}.safetensors", versions)
    if RANKS > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        # Without the interpreter's shutdown, in which threads of gloo abort the process now and then.
        os._exit(0)


if __name__ == "__main__":
    main()
