"""tokenwise: score how much each unit of a transformer's work matters, spend a budget on it, compare the methods."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Card": "tokenwise.method",
    "Handle": "tokenwise.method",
    "InputError": "tokenwise.errors",
    "Keep": "tokenwise.policies.budget",
    "Method": "tokenwise.method",
    "Paper": "tokenwise.method",
    "WeighMixin": "tokenwise.weighting.sft_trainer",
    "align_new_rows": "tokenwise.weighting.weight_aligning",
    "compare": "tokenwise.comparison",
    "evict": "tokenwise.cache.apply",
    "focal_info_nce": "tokenwise.signals.classes",
    "prune_inputs": "tokenwise.reduction.inputs",
    "reduce": "tokenwise.reduction.apply",
    "unlearn": "tokenwise.weighting.unlearning_run",
    "weigh": "tokenwise.weighting.apply",
    "weighted_linear_cross_entropy": "tokenwise.weighting.loss",
    "weighted_loss": "tokenwise.weighting.apply",
}
_SUBPACKAGES = {
    "cache",
    "catalog",
    "comparison",
    "errors",
    "method",
    "models",
    "policies",
    "reduction",
    "scores",
    "signals",
    "weighting",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing tokenwise must cost next to nothing, and never import torch.
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBPACKAGES:
        return importlib.import_module(f"tokenwise.{name}")
    elif name[:1].isupper():
        from tokenwise import catalog

        found = [entry for entry in catalog.entries().values() if entry["class"] == name]
        if len(found) != 1:
            fix = "; write " + " or ".join(f"tokenwise.{entry['family']}.{name}" for entry in found) if found else ""
            raise AttributeError(f"module 'tokenwise' has no attribute {name!r}{fix}")
        value = getattr(importlib.import_module(found[0]["module"]), name)
    else:
        raise AttributeError(f"module 'tokenwise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from tokenwise import catalog

    classes = [entry["class"] for entry in catalog.entries().values()]
    return sorted({*globals(), *_PUBLIC, *_SUBPACKAGES, *classes})
