"""Weighting: spend the gradient on the tokens and samples that matter."""

from __future__ import annotations

import importlib
from typing import Any

_BASES = ("PointwiseWeighter", "Run", "State", "TokenBatch", "TokenWeighter")


def __getattr__(name: str) -> Any:
    # The methods and their base classes under one name, loaded on first use: listing the catalog needs none of them.
    from tokenwise import catalog

    modules = {entry["class"]: entry["module"] for entry in catalog.entries().values() if entry["family"] == "weighting"}
    modules |= dict.fromkeys(_BASES, "tokenwise.weighting.base")
    if name not in modules:
        raise AttributeError(f"module 'tokenwise.weighting' has no attribute {name!r}")
    value = getattr(importlib.import_module(modules[name]), name)
    globals()[name] = value
    return value
