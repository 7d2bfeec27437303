"""Started twice by torchrun: one optimizer step per method, three epochs of GLOW; the results saved."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from layouts import padded, sequences, train, with_sample_ids
from test_trainer import METHODS

import tokenwise as tw

folder, reference = Path(sys.argv[1]), sys.argv[2]
model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
rows = padded(sequences(), "right")
for name in ("dft", "excess_loss step", "dynamic_loss step", "focal weight_mean", "focal sequence_mean"):
    trained, losses, _ = train(model, rows, METHODS[name](reference), folder / "out", batch=2, accumulate=2, clip=0.05)
    if torch.distributed.get_rank() == 0:
        tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
        save_file({**tensors, "loss": torch.tensor(losses[0])}, folder / f"{name}.safetensors")
trained, losses, handle = train(model, with_sample_ids(rows), tw.GLOW(), folder / "out", batch=2, accumulate=2, steps=3)
save_file(handle.state.tensors(), folder / f"history {torch.distributed.get_rank()}.safetensors")
if torch.distributed.get_rank() == 0:
    tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
    save_file({**tensors, "loss": torch.tensor(losses[-1])}, folder / "glow.safetensors")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Without the interpreter's shutdown, in which threads of gloo and of arrow abort the process now and then.
os._exit(0)
