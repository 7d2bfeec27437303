"""Whose update does not depend on how the batch is cut: TRL's own losses and tokenwise's on the same SFTTrainer.

Usage: python benchmarks/batch_layouts.py

One step of gradient descent on eight sequences, in fp64, with every way of cutting the batch. It prints the largest
difference of a parameter from the step on the whole batch, as a share of the largest change. Rounding is 1e-6:
transformers' norms and rotary embeddings compute in fp32.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

import tokenwise as tw

LENGTHS = (12, 7, 12, 4, 9, 12, 5, 10)
LAYOUTS: dict[str, dict[str, Any]] = {
    "whole batch": {"batch": 8},
    "accumulation 2": {"batch": 4, "accumulate": 2},
    "accumulation 4": {"batch": 2, "accumulate": 4},
    "accumulation 8": {"batch": 1, "accumulate": 8},
    "packed": {"batch": 8, "packing": True, "max_length": 24},
    "padding-free": {"batch": 4, "accumulate": 2, "padding_free": True, "max_length": None},
    "clipping, accumulation 4": {"batch": 2, "accumulate": 4, "clip": 0.05},
}


def rows() -> list[dict[str, list[int]]]:
    """Sequences of different lengths, the first tokens of each without a label."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(2, 64, (length,), generator=generator).tolist()
        masked = index % 3 + 1
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    rules = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="w0", eos_token="w1", unk_token="w0")


def step(
    model: LlamaForCausalLM,
    loss_type: str,
    method: Any,
    batch: int,
    accumulate: int = 1,
    clip: float = 0.0,
    **options: Any,
) -> LlamaForCausalLM:
    """The model after one step of gradient descent."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = SFTConfig(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=clip,
            loss_type=loss_type,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            **options,
        )
        trainer = SFTTrainer(
            copy.deepcopy(model), arguments, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer()
        )
        trainer.remove_callback(PrinterCallback)
        if method is not None:
            tw.weigh(trainer, method)
        trainer.train()
    return trainer.model


def distance(one: LlamaForCausalLM, other: LlamaForCausalLM) -> float:
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    contestants: dict[str, tuple[str, Any]] = {
        "TRL nll": ("nll", None),
        "TRL dft": ("dft", None),
        "tokenwise uniform": ("nll", tw.Uniform()),
        "tokenwise dft": ("nll", tw.DFT()),
        "tokenwise top_entropy, scope step": ("nll", tw.TopEntropy(keep=0.4, scope="step")),
        "tokenwise top_entropy, scope micro_batch": ("nll", tw.TopEntropy(keep=0.4, scope="micro_batch")),
    }
    print("| | " + " | ".join(LAYOUTS) + " |")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    for name, (loss_type, method) in contestants.items():
        wholes = {clip: step(model, loss_type, method, batch=8, clip=clip) for clip in (0.0, 0.05)}
        cells = []
        for options in LAYOUTS.values():
            whole = wholes[options.get("clip", 0.0)]
            cells.append(f"{distance(step(model, loss_type, method, **options), whole) / distance(whole, model):.0e}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
