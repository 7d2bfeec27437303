"""How much a cached value can change what attention gives."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 1024
"""Tokens that are projected at a time."""


def projected_value_norms(values: Tensor, projection: Tensor) -> Tensor:
    """The L1 norm of each value after the output projection, as a mean over the heads that read it.

    Args:
        values: [batch, key heads, stored, value_dim].
        projection: [heads * value_dim, hidden]; heads is a multiple of key heads.

    Returns:
        [batch, key heads, stored], fp32 (fp64 for fp64 values).
    """
    batch, heads, stored, width = values.shape
    dtype = torch.promote_types(values.dtype, torch.float32)
    found = torch.zeros(batch, heads, stored, dtype=dtype, device=values.device)
    # [key heads, heads that share one, value_dim, hidden]
    parts = projection.to(values.dtype).unflatten(0, (heads, -1, width))
    for start in range(0, stored, _TOKENS):
        some = slice(start, start + _TOKENS)
        for head in range(heads):
            for part in parts[head]:
                found[:, head, some] += (values[:, head, some] @ part).abs().sum(-1, dtype=dtype)
    found /= parts.shape[1]
    return found
