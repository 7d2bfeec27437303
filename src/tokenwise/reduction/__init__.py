"""Reduction: compute on the tokens that matter."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "EncoderReducer": "base",
    "InputReducer": "base",
    "LayerTokens": "base",
    "Merge": "merge",
    "Mixture": "merge",
    "TokenReducer": "base",
    "compression_aware_attack": "robustness",
    "identifier_groups": "code_identifiers",
    "keep_only": "merge",
    "prune_inputs": "inputs",
    "rank_stability": "robustness",
    "reduce": "apply",
    "verify_inputs": "inputs",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tokenwise.reduction.{_PUBLIC[name]}"), name)
    if name[:1].isupper():
        from tokenwise import catalog

        for entry in catalog.entries().values():
            if entry["family"] == "reduction" and entry["class"] == name:
                return getattr(importlib.import_module(entry["module"]), name)
    raise AttributeError(f"module 'tokenwise.reduction' has no attribute {name!r}")
