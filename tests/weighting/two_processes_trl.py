"""Run by test_trl in two processes: one step of SFTTrainer per method, the first process saves what it got."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_trl import METHODS, samples, train

folder = Path(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
for name in ("weights per nonzero", "focal weight_mean", "top_entropy step", "weights per sequence"):
    trained, logs, _ = train(model, samples(), METHODS[name](None), folder / "out", 2, 2, max_grad_norm=0.05)
    if torch.distributed.get_rank() == 0:
        tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
        save_file({**tensors, "loss": torch.tensor(logs[0]["loss"])}, folder / f"{name}.safetensors")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Without the interpreter's shutdown, in which threads of gloo and of arrow abort the process now and then.
os._exit(0)
