"""Started twice by torchrun: one optimizer step per objective on two processes, the result saved by the first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from layouts import sequences, train
from test_unlearning_trainer import METHODS, rows_of

folder, reference, *names = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]
model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
for name in names:
    method = METHODS[name](reference)
    trained, losses, _ = train(model, rows_of(sequences(), "right"), method, folder / "out", batch=2, accumulate=2)
    if torch.distributed.get_rank() == 0:
        tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
        save_file({**tensors, "loss": torch.tensor(losses[0])}, folder / f"{name}.safetensors")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Without the interpreter's shutdown, in which threads of gloo and of arrow abort the process now and then.
os._exit(0)
