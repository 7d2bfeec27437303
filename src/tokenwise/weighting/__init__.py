"""Weighting: spend the gradient on the tokens and samples that matter."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ClassBatch": "classification",
    "ClassObjective": "classification",
    "ClassWeighing": "class_training",
    "LogitObjective": "logit_objective",
    "ExampleWeights": "example_weights",
    "Objective": "objective",
    "PointwiseWeighter": "base",
    "Rule": "segments",
    "Run": "base",
    "State": "base",
    "TokenBatch": "base",
    "TokenWeighter": "base",
    "Term": "objective",
    "TokenWeights": "apply",
    "UnlearningCollator": "unlearning_data",
    "WeighMixin": "sft_trainer",
    "Weighing": "weighing",
    "align_new_rows": "weight_aligning",
    "clean_tokens": "token_cleaning",
    "example_weights": "example_weights",
    "fault_pair": "fault_aware",
    "fila_initialize": "fila",
    "load_masks": "parameter_masks",
    "mask_parameters": "parameter_masks",
    "pair": "unlearning_data",
    "read_examples": "unlearning_data",
    "recall": "unlearning_run",
    "save_masks": "parameter_masks",
    "segment_weights": "segments",
    "self_evolving_cleaning": "self_evolving",
    "token_weights": "apply",
    "unlearn": "unlearning_run",
    "weigh": "apply",
    "weighted_linear_cross_entropy": "loss",
    "weighted_loss": "apply",
    "weighting_gradients": "parameter_masks",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tokenwise.weighting.{_PUBLIC[name]}"), name)
    if name[:1].isupper():
        from tokenwise import catalog

        for entry in catalog.entries().values():
            if entry["family"] == "weighting" and entry["class"] == name:
                return getattr(importlib.import_module(entry["module"]), name)
    raise AttributeError(f"module 'tokenwise.weighting' has no attribute {name!r}")
