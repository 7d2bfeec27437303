"""Reads a prompt and decodes under one of kvpress's presses; `cache_peer.py` starts it.

Usage: python kvpress_worker.py FOLDER THREADS CLOCK

It runs in an environment of kvpress, and needs nothing of tokenwise. FOLDER holds a saved model and ``prompt.json``.
CLOCK is a function of `time`. For each line of JSON with a press on standard input it writes one with the seconds and
the decoded tokens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from kvpress.presses import kvzip_press
from transformers import AutoModelForCausalLM, DynamicCache


def tokenizer_of_ids(prompts: dict[str, list[int]]) -> Any:
    """A tokenizer that knows KVzip's prompts."""

    def encode(text: str, **_: Any) -> torch.Tensor:
        return torch.tensor([prompts["suffix" if text == "\n" else "instruction"] if text else []], dtype=torch.long)

    tokenizer = types.SimpleNamespace(chat_template=None, encode=encode)
    return types.SimpleNamespace(from_pretrained=lambda _: tokenizer)


def press_of(described: dict[str, Any]) -> Any:
    """``{"class": name, field: value, ...}``, where a value may be a press again; without a class none is used."""
    if "class" not in described:
        return lambda model: contextlib.nullcontext()
    fields = {name: press_of(value) if isinstance(value, dict) else value for name, value in described.items()}
    return getattr(kvpress, fields.pop("class"))(**fields)


@torch.no_grad()
def run(
    model: Any, ids: torch.Tensor, decoded: int, press: Any, clock: Callable[[], float]
) -> tuple[list[float], list[int]]:
    """Seconds of reading and of decoding, and what was decoded."""
    start, count = clock(), ids.shape[1]
    cache, found = DynamicCache(config=model.config), []
    with press(model):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    read = clock()
    for step in range(decoded):
        found.append(int(logits[0, -1].argmax()))
        place = torch.tensor([[count + step]])
        logits = model(torch.tensor([found[-1:]]), past_key_values=cache, position_ids=place).logits
    return [read - start, clock() - read], found


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(sys.argv[2]))
    folder = Path(sys.argv[1])
    job = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    kvzip_press.AutoTokenizer = tokenizer_of_ids(job["kv_zip"])
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.tensor([job["ids"]])
    for line in sys.stdin:
        described = json.loads(line)
        # Attention that is looked at needs the implementation that returns it.
        model.set_attn_implementation("eager" if described.get("class") == "ObservedAttentionPress" else "sdpa")
        seconds, found = run(model, ids, job["decoded"], press_of(described), getattr(time, sys.argv[3]))
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        print(json.dumps({"seconds": seconds, "tokens": found}), flush=True)


if __name__ == "__main__":
    main()
