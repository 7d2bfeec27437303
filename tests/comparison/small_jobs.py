"""Jobs that take a second: two small layers, a few steps, the source of a module as text."""

import inspect
import textwrap

import numpy as np

from tokenwise.comparison.data import held_out_windows, token_blocks
from tokenwise.comparison.records import Job
from tokenwise.models.load import train_tokenizer

LENGTH, BATCH, ACCUMULATE = 32, 4, 2
LABELS_OF_A_STEP = BATCH * ACCUMULATE * (LENGTH - 1)

TRAINING = {
    "batch_size": BATCH,
    "accumulate": ACCUMULATE,
    "learning_rate": 1e-2,
    "warmup": 0.1,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "precision": "fp32",
    "normalize": "none",
    "evaluations": 2,
}

# Methods of a user's own: one that works, and those that go wrong.
METHODS = '''
import os, signal
import torch
from tokenwise.weighting.base import TokenWeighter
from tokenwise.weighting.excess_loss import ExcessLoss

class OwnExcessLoss(ExcessLoss):
    """One of the catalog's, by another name."""
    reference: str | None = None

class Diverging(TokenWeighter):
    """Weights that turn into NaN."""
    def weights(self, batch, state):
        return torch.full(batch.labels.shape, float("nan") if batch.step == 2 else 1.0)

class Dying(TokenWeighter):
    """Kills its own process."""
    def weights(self, batch, state):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(batch.labels.shape)

class Greedy(TokenWeighter):
    """Wants more memory than there is."""
    def weights(self, batch, state):
        return torch.ones(2**50)
'''


def make_task(folder):
    """A task with everything that a plan prepares lying in `folder`."""
    documents = [text for text in inspect.getsource(textwrap).split("\n\n") if len(text) > 80]
    train, held_out = documents[:-6], documents[-6:]
    tokenizer = train_tokenizer(train, 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    np.save(folder / "blocks.npy", token_blocks(train, tokenizer, LENGTH))
    with (folder / "windows.npz").open("wb") as stream:
        held_out_windows(held_out, tokenizer, LENGTH).save(stream)
    (folder / "own.py").write_text(METHODS)
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return {
        "kind": "language_modeling",
        "model": {"config": llama},
        "tokenizer": str(folder / "tokenizer"),
        "train_blocks": str(folder / "blocks.npy"),
        "held_out_windows": str(folder / "windows.npz"),
        "method_folder": str(folder),
        "sequence_length": LENGTH,
        "training": TRAINING,
    }


def make_job(task, method="uniform", seed=1, steps=3, unit="steps", reference=None, kind="run", label=None, **training):
    spec = method if isinstance(method, dict) else {method: {}}
    return Job(
        kind=kind,
        label=label or next(iter(spec)).rpartition(":")[2],
        seed=seed,
        method=spec,
        role="baseline" if method == "uniform" else "candidate",
        task={**task, "training": {**task["training"], **training}},
        budget={"unit": unit, "amount": steps},
        reference=reference,
    )


class SmallPlan:
    """Stands in for a plan whose jobs are given."""

    def __init__(self, *jobs):
        self._jobs = list(jobs)

    def prepare(self, folder, progress):
        progress("preparing nothing")

    def jobs(self, folder):
        return self._jobs
