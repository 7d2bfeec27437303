"""The key-value cache: keep what matters, free the rest."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "CachePolicy": "base",
    "CacheSelector": "base",
    "EvictingCache": "evicting",
    "SelectingCache": "selecting",
    "StoredTokens": "base",
    "evict": "apply",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tokenwise.cache.{_PUBLIC[name]}"), name)
    if name[:1].isupper():
        from tokenwise import catalog

        for entry in catalog.entries().values():
            if entry["family"] == "cache" and entry["class"] == name:
                return getattr(importlib.import_module(entry["module"]), name)
    raise AttributeError(f"module 'tokenwise.cache' has no attribute {name!r}")
