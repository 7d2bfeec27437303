"""What the keys and values of a cache take."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def layer_nbytes(layer: Any) -> int:
    """Bytes of the keys and values that a layer of a cache has in use."""
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(values.nbytes for values in held if isinstance(values, Tensor))


def cache_nbytes(cache: Any) -> int:
    """Bytes of the memory that holds the keys and values of all layers, whatever part of it they use."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for values in (layer.keys, layer.values):
            storage = values.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
