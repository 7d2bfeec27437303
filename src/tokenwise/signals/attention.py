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


Bias = Callable[[Tensor], "Tensor | None"]
"""Gives what is added to the scores of queries at some positions [batch, rows]: 4 dimensions that broadcast to
[batch, heads, rows, keys], or None."""


@torch.no_grad()
def attention_rows(
    query: Tensor, key: Tensor, positions: Tensor, bias: Bias, scaling: float, softcap: float | None = None
) -> Tensor:
    """The softmax rows of some queries.

    Args:
        query: [batch, heads, queries, head_dim], after rotary embedding.
        key: [batch, key heads, keys, head_dim]; heads is a multiple of key heads (grouped queries).
        positions: of the wanted queries, [rows] or [batch, rows], int64.
        bias: what is added to the scores.
        scaling: factor on the scores.
        softcap: bound of the scores as in Gemma 2, or None.

    Returns:
        [batch, heads, rows, keys], each row summing to 1, fp32 (fp64 for fp64 inputs).
    """
    batch, heads, _, width = query.shape
    positions = positions.expand(batch, -1) if positions.dim() == 1 else positions
    index = positions[:, None, :, None].expand(-1, heads, -1, width)
    return _softmax_of(query.gather(2, index), key, bias(positions), scaling, softcap)


@torch.no_grad()
def attention_columns(
    query: Tensor,
    key: Tensor,
    bias: Bias,
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The attention that each key receives, as a mean over the queries; made block by block, never a whole map.

    Args:
        query, key, bias, scaling, softcap: as for `attention_rows`.
        valid: queries to take the mean over, [batch, queries], bool; all unless given.

    Returns:
        [batch, heads, keys], summing to 1 over the keys, fp32 (fp64 for fp64 inputs).
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    total = torch.zeros(batch, heads, keys, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    size = max(1, _BLOCK_BYTES // (4 * batch * heads * max(keys, 1)))
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        positions = torch.arange(rows.start, rows.stop, device=query.device).expand(batch, -1)
        probabilities = _softmax_of(query[:, :, rows], key, bias(positions), scaling, softcap)
        if valid is None:
            total += probabilities.sum(2)
        else:
            total += (valid[:, None, None, rows].to(total.dtype) @ probabilities).squeeze(2)
    count = queries if valid is None else valid.sum(1).clamp_min(1)[:, None, None]
    return total / count


@torch.no_grad()
def attention_rank(
    query: Tensor,
    key: Tensor,
    bias: Bias,
    scaling: float,
    steps: int,
    softcap: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The importance of each token when all begin alike and each step hands it on to what a token attends to.

    One step is `attention_columns`. The map is made block by block in every step, and once where it is one block.

    Args:
        query, key, bias, scaling, softcap: as for `attention_rows`; there are as many queries as keys.
        steps: how often importance is handed on, at least 1.
        valid: tokens that have importance at the beginning, [batch, queries], bool; all unless given.

    Returns:
        [batch, heads, keys], summing to 1 over the keys, fp32 (fp64 for fp64 inputs).
    """
    batch, heads, queries, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    began = torch.ones(batch, queries, device=query.device) if valid is None else valid
    rank = (began / began.sum(1, keepdim=True).clamp_min(1)).to(dtype).unsqueeze(1).expand(-1, heads, -1)
    size = max(1, _BLOCK_BYTES // (4 * batch * heads * max(key.shape[2], 1)))

    def block(rows: slice) -> Tensor:
        positions = torch.arange(rows.start, rows.stop, device=query.device).expand(batch, -1)
        return _softmax_of(query[:, :, rows], key, bias(positions), scaling, softcap)

    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    only = block(blocks[0]) if len(blocks) == 1 else None
    for _ in range(steps):
        parts = (rank[:, :, None, rows] @ (block(rows) if only is None else only) for rows in blocks)
        rank = sum(parts, torch.zeros(batch, heads, 1, key.shape[2], dtype=dtype, device=query.device)).squeeze(2)
    return rank


def _softmax_of(query: Tensor, key: Tensor, bias: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        # Heads that share keys lie side by side: [batch, key heads, heads per key head, rows, head_dim].
        grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))
        scores = (grouped @ key.to(dtype).unsqueeze(2).transpose(3, 4)).flatten(1, 2).mul_(scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores, dim=-1)
