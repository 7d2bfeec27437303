"""What matters, read off attention: rows of one layer's softmax, never a whole map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK_BYTES = 32 * 2**20


@torch.no_grad()
def attention_mass(
    query: Tensor,
    key: Tensor,
    counted: Tensor,
    bias: Callable[[slice], Tensor],
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """The share of each query's attention that falls on the counted keys, as a mean over heads.

    Rows of the softmax are made in blocks of at most 32 MiB (at least one row) and summed at once.

    Args:
        query: [heads, queries, head_dim], after rotary embedding.
        key: [key heads, keys, head_dim]; heads is a multiple of key heads (grouped queries).
        counted: keys to sum over, [keys], bool.
        bias: what is added to the scores of a slice of the queries: [queries of the slice, keys], or with heads in
            front; 0 where the query sees the key and -inf (or the smallest number) where it does not.
        scaling: factor on the scores.
        softcap: bound of the scores as in Gemma 2, or None.

    Returns:
        [queries], in [0, 1], fp32 (fp64 for fp64 inputs).
    """
    heads, queries, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    mass = torch.empty(queries, dtype=dtype, device=query.device)
    size = max(1, _BLOCK_BYTES // (4 * heads * max(key.shape[1], 1)))
    keys = key.to(dtype).unsqueeze(1)
    summed = counted.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            # Heads that share keys lie side by side: [key heads, heads per key head, rows, head_dim].
            grouped = query[:, rows].to(dtype).unflatten(0, (key.shape[0], -1))
            scores = (grouped @ keys.transpose(2, 3)).flatten(0, 1) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            mass[rows] = (torch.softmax(scores + bias(rows), dim=-1) @ summed).mean(0)
    return mass
