"""Started twice by torchrun: an optimizer step per method on two processes, the result saved by the first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from layouts import class_rows, classifier, train
from test_class_training import METHODS, PARALLEL, Storm

folder = Path(sys.argv[1])
for kind, name in PARALLEL:
    trained, losses, _ = train(classifier(kind), class_rows(kind), METHODS[name], folder / "out", batch=2, accumulate=2)
    if torch.distributed.get_rank() == 0:
        tensors = {key: value.contiguous() for key, value in trained.state_dict().items()}
        save_file({**tensors, "loss": torch.tensor(losses[0])}, folder / f"{kind} {name}.safetensors")
_, _, handle = train(
    classifier("bert"), class_rows("bert", 16), Storm(), folder / "out", batch=2, accumulate=2, steps=2
)
save_file(handle.state.tensors(), folder / f"storm {torch.distributed.get_rank()}.safetensors")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Without the interpreter's shutdown, in which threads of gloo and of arrow abort the process now and then.
os._exit(0)
