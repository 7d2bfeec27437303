"""Started twice by torchrun: STORM where the second process sees its first labels two batches later."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from test_storm import drawn

from tokenwise.weighting.base import Run
from tokenwise.weighting.classification import ClassBatch
from tokenwise.weighting.storm import Storm

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
method = Storm(learning_rate=0.1)
state = method.start(Run(seed=0))
weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
for step in range(4):
    features, labels, _ = drawn(8, seed=10 * step + rank)
    if rank == 1 and step < 2:
        features, labels = features[:0], labels[:0]
    logits = features @ weight.T
    method.losses(ClassBatch(logits, labels, features=features, weight=weight), state)
parameters = torch.cat([parameter.detach().flatten() for parameter in state.rescaler.parameters()])
torch.save(parameters, Path(sys.argv[1]) / f"{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)
