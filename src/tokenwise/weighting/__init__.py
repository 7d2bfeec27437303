"""Weighting: spend the gradient on the tokens and samples that matter."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ClassBatch": "classification",
    "ClassObjective": "classification",
    "ClassWeighing": "class_training",
    "PointwiseWeighter": "base",
    "Run": "base",
    "State": "base",
    "TokenBatch": "base",
    "TokenWeighter": "base",
    "TokenWeights": "apply",
    "Weighing": "weighing",
    "align_new_rows": "weight_aligning",
    "token_weights": "apply",
    "weigh": "apply",
    "weighted_linear_cross_entropy": "loss",
    "weighted_loss": "apply",
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
