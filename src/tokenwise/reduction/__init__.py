"""Reduction: compute on the tokens that matter."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "AttentionDiversity": "robust_attention",
    "DecoderReducer": "base",
    "DecoderTokens": "base",
    "EncoderReducer": "base",
    "InputReducer": "base",
    "LayerTokens": "base",
    "Merge": "merge",
    "Mixture": "merge",
    "MixtureOfDepths": "p_mod",
    "Plan": "plan",
    "ReverseSlimming": "slimming",
    "Stay": "base",
    "TokenAwarePooling": "robust_attention",
    "TokenExits": "token_exits",
    "TokenReducer": "base",
    "TokenSlimming": "slimming",
    "allocate": "allocation",
    "allocate_by_entropy": "allocation",
    "allocate_by_search": "allocation",
    "attach_slimming": "slimming",
    "calibrate_thresholds": "dy_mu",
    "compression_aware_attack": "robustness",
    "identifier_groups": "code_identifiers",
    "keep_only": "merge",
    "learn_rates": "rate_learning",
    "mixture_ratios": "p_mod",
    "prune_inputs": "inputs",
    "push_apart": "diffusion",
    "rank_stability": "robustness",
    "reduce": "apply",
    "shape_of": "allocation",
    "slimming_loss": "slimming",
    "verify_inputs": "inputs",
    "virtual_unmerge": "virtual_unmerging",
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
