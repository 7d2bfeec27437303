"""Folders with a plan and data of the tasks beside language modelling, small enough to run in seconds."""

import json

import yaml

from tokenwise.comparison.plan import read_plan
from tokenwise.errors import InputError

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENIZER = {"train": "byte_bpe", "vocab_size": 280}
OWN = '''
from tokenwise.weighting.uniform import Uniform
from tokenwise.weighting.base import TokenWeighter

class Plain(Uniform):
    """The plain loss, called a method of classes."""
    kind = "classes"

class Objective(TokenWeighter):
    """Stands for a loss over classes."""
    kind = "classes"
    reads = frozenset({"counts"})
    counts: tuple[int, ...] | None = None
    def weights(self, batch, state=None):
        raise NotImplementedError
'''


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sum_rows(start, stop):
    """Sums with their answers as GSM8K has them."""
    return [
        {
            "question": f"What is {n} and {n % 3}?",
            "answer": f"It is {n + n % 3}.\n#### {n + n % 3}",
            "weight": 1 + n % 2,
        }
        for n in range(start, stop)
    ]


def word_rows(start, stop):
    """Texts of two classes, one of four rare."""
    return [
        {"text": f"{'yes' if n % 4 else 'no'} number {n}", "label": "common" if n % 4 else "rare"}
        for n in range(start, stop)
    ]


def write_plan(folder, task, methods, **sections):
    """A plan of one seed and three steps."""
    plan = {
        "task": task,
        "training": {"batch_size": 4, "learning_rate": 1e-2, "evaluations": 2},
        "budget": {"unit": "steps", "amount": 3},
        "seeds": [0],
        "methods": methods,
        **sections,
    }
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder / "plan.yaml"


def sft_task(**changes):
    model = {"config": {"model_type": "llama", **SIZES, "max_position_embeddings": 96}, "tokenizer": TOKENIZER}
    data = {"train": "train.jsonl", "eval": "eval.jsonl"}
    return {"kind": "sft", "model": model, "data": data, "max_length": 64, "max_new_tokens": 8, **changes}


def classification_task(**changes):
    config = {"model_type": "bert", **SIZES, "max_position_embeddings": 64}
    data = {"train": "train.jsonl", "eval": "eval.jsonl"}
    model = {"config": config, "tokenizer": TOKENIZER}
    return {"kind": "classification", "model": model, "data": data, "max_length": 32, **changes}


def problems(folder):
    """What is wrong with the plan, or else with its data."""
    try:
        read_plan(folder / "plan.yaml").prepare(folder / "out")
    except InputError as error:
        return [str(problem) for problem in error.problems]
    return []
