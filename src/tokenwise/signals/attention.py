"""What matters, read off attention: rows of one layer's softmax, never a whole map."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor

from tokenwise.signals.products import multiply

_BLOCK_BYTES = 32 * 2**20
_CACHED_BYTES = 2 * 2**20
_DIVIDED = 2**19
_GRADIENT = ContextVar("gradient", default=False)
_Given = ParamSpec("_Given")


@contextmanager
def with_gradient() -> Iterator[None]:
    """Rows and columns made inside can be differentiated with respect to queries and keys; elsewhere they cannot."""
    token = _GRADIENT.set(True)
    try:
        yield
    finally:
        _GRADIENT.reset(token)


def _detached_unless_asked(function: Callable[_Given, Tensor]) -> Callable[_Given, Tensor]:
    @functools.wraps(function)
    def made(*args: _Given.args, **options: _Given.kwargs) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _GRADIENT.get()):
            return function(*args, **options)

    return made


def attention_softmax(scores: Tensor, sinks: Tensor | None = None, in_place: bool = False) -> Tensor:
    """The softmax over the last dimension, with the sinks as one more column that is not given back.

    Args:
        scores: [..., queries, keys].
        sinks: the score of that column, which broadcasts to [..., queries, 1]; None where there is none.
        in_place: write into `scores` rather than into new memory.

    Returns:
        As `scores`; each row sums to 1, or to less by what its sink takes.
    """
    if sinks is None:
        return torch.softmax(scores, -1, out=scores) if in_place else torch.softmax(scores, -1)
    largest = scores.amax(-1, keepdim=True)
    found = attention_softmax(scores, None, in_place)
    # The share of the largest score tells the sum of all exponentials, to which the column would add its own: cheaper
    # than to make room for the column.
    left = torch.sigmoid(largest - found.amax(-1, keepdim=True).log() - sinks.to(found.dtype))
    return found.mul_(left) if in_place else found * left


@torch.no_grad()
def attention_mass(
    query: Tensor,
    key: Tensor,
    counted: Tensor,
    bias: Callable[[slice], Tensor],
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        sinks: as for `attention_rows`.

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
            sunk = None if sinks is None else sinks.view(-1, 1, 1)
            mass[rows] = (attention_softmax(scores + bias(rows), sunk) @ summed).mean(0)
    return mass


Bias = Callable[[Tensor], "Tensor | None"]
"""Gives what is added to the scores of queries at some positions, [batch, rows] or [1, rows] where they are the same
throughout: 4 dimensions that broadcast to [batch, heads, rows, keys], or None."""


@_detached_unless_asked
def attention_rows(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    bias: Bias,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The softmax rows of some queries.

    Args:
        query: [batch, heads, queries, head_dim], after rotary embedding.
        key: [batch, key heads, keys, head_dim]; heads is a multiple of key heads (grouped queries).
        positions: of the wanted queries, [rows] or [batch, rows], int64.
        bias: what is added to the scores.
        scaling: factor on the scores.
        softcap: bound of the scores as in Gemma 2, or None.
        sinks: a further score of each head, [heads], which takes its share of every row as gpt-oss has it, or None;
            neither scaled nor bounded.

    Returns:
        [batch, heads, rows, keys], fp32 (fp64 for fp64 inputs). Each row sums to 1, with sinks to less.
    """
    batch, heads, _, width = query.shape
    positions = positions.unsqueeze(0) if positions.dim() == 1 else positions
    index = positions[:, None, :, None].expand(batch, heads, -1, width)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        queries = (query.gather(2, index).to(dtype) * scaling).contiguous()
        return _softmax_of(queries, key.to(dtype).contiguous(), bias(positions), softcap, 0, sinks)


@dataclass(frozen=True)
class Shown:
    """What a block of queries sees.

    Args:
        end: keys from here on are hidden from all of them, and not read.
        bias: what is added to the scores of the keys from `first` up to `end`, as for `attention_rows`; None for
            nothing.
        first: the keys before it are seen as they are.
    """

    end: int
    bias: Tensor | None = None
    first: int = 0


Divisors = Callable[[Tensor, slice, slice, int], Tensor]
"""Gives what the exponentials of the scores are divided by, positive numbers: for the queries at some positions,
[rows], of some sequences and heads, over the first so many keys; 4 dimensions that broadcast to
[sequences, heads, rows, keys]."""


@_detached_unless_asked
def attention_columns(
    query: Tensor,
    key: Tensor,
    shown: Callable[[Tensor], Shown],
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
    divisors: Divisors | None = None,
    power: float = 1.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention that each key receives, as a mean over the queries; made block by block, never a whole map.

    Args:
        query, key, scaling, softcap: as for `attention_rows`.
        shown: what queries that follow each other see, by their positions, [rows], int64.
        valid: queries to take the mean over, [batch, queries], bool; all unless given.
        divisors: what the exponentials of the scores are divided by before each row is made to sum to 1.
        power: what they are raised to.
        sinks: as for `attention_rows`; a sink is one more column of each row, which no divisor is asked for.

    Returns:
        [batch, heads, keys], fp32 (fp64 for fp64 inputs), summing to 1 over the keys, with sinks to less.
    """
    batch, heads, queries, _ = query.shape
    keys, shared = key.shape[2], heads // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(batch, heads, keys, dtype=dtype, device=query.device)
    # A block that stays in the cache: some rows of as many heads as fit, of as many sequences.
    rows = min(max(_CACHED_BYTES // (4 * max(keys, 1)), 64), 256, max(queries, 1))
    maps = max(_CACHED_BYTES // (4 * rows * max(keys, 1)), 1)
    groups = max(min(maps // shared, key.shape[1]), 1)
    sequences = max(maps // heads, 1) if groups == key.shape[1] else 1
    with torch.autocast(query.device.type, enabled=False):
        query, key = (query.to(dtype) * scaling).contiguous(), _multiplied(key.to(dtype))
        counted = torch.ones_like(query[:, 0, :, 0]) if valid is None else valid.to(dtype)
        for start in range(0, queries, rows):
            some = slice(start, min(start + rows, queries))
            positions = torch.arange(some.start, some.stop, device=query.device)
            seen = shown(positions)
            for first in range(0, batch, sequences):
                batches = slice(first, first + sequences)
                for group in range(0, key.shape[1], groups):
                    inner = slice(group, group + groups)
                    outer = slice(group * shared, (group + groups) * shared)
                    bias = None if seen.bias is None else _part(seen.bias, batches, outer)
                    near = key[batches, inner, : seen.end]
                    sunk = None if sinks is None else sinks[outer]
                    found = _softmax_of(query[batches, outer, some], near, bias, softcap, seen.first, sunk)
                    weight = counted[batches, None, some].expand(found.shape[:3])
                    if divisors is not None:
                        # What a sink takes is divided by nothing.
                        taken = None if sinks is None else (1 - found.sum(3)).clamp_min(0)
                        _divide(found, divisors, power, positions, batches, outer)
                        weight = weight / (found.sum(3) if taken is None else found.sum(3) + taken)
                    total[batches, outer, : seen.end] += (weight.unsqueeze(2) @ found).squeeze(2)
    count = queries if valid is None else valid.sum(1).clamp_min(1)[:, None, None]
    return total / count


@torch.no_grad()
def attention_scores(
    query: Tensor, key: Tensor, bias: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """What the softmax of attention is taken of, for few queries.

    Args:
        query, key, scaling, softcap: as for `attention_rows`.
        bias: what is added to the scores of all queries.

    Returns:
        [batch, heads, queries, keys], fp32 (fp64 for fp64 inputs).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return _scores_of((query.to(dtype) * scaling).contiguous(), _multiplied(key.to(dtype)), bias, softcap, 0)


@torch.no_grad()
def received_of(
    scores: Tensor,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    divisors: Divisors | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention_columns` of one query, from its scores.

    Args:
        scores: [batch, heads, 1, keys].
        valid: rows whose query counts, [batch, 1], bool; all unless given.
        temperature: what the scores, and the sinks, are divided by.
        divisors, sinks: as for `attention_columns`.
    """
    if divisors is not None:
        only = torch.zeros(1, dtype=torch.long, device=scores.device)
        noise = divisors(only, slice(0, scores.shape[0]), slice(0, scores.shape[1]), scores.shape[3])
        scores = scores - noise.log_()
    sunk = None if sinks is None else sinks.view(-1, 1, 1) / temperature
    found = attention_softmax(scores if temperature == 1 else scores / temperature, sunk)[:, :, 0]
    return found if valid is None else found * valid.unsqueeze(1)


def _divide(found: Tensor, divisors: Divisors, power: float, positions: Tensor, sequences: slice, heads: slice) -> None:
    """Divide a block in place, so many numbers at a time that those divided by stay in the cache."""
    size = max(_DIVIDED * found.shape[2] // max(found.numel(), 1), 1) if found.device.type == "cpu" else len(positions)
    for first in range(0, len(positions), size):
        part = slice(first, first + size)
        by = divisors(positions[part], sequences, heads, found.shape[3])
        found[:, :, part] /= by if power == 1 else by.pow_(power)


@_detached_unless_asked
def attention_rank(
    query: Tensor,
    key: Tensor,
    bias: Bias,
    scaling: float,
    steps: int,
    softcap: float | None = None,
    valid: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The importance of each token when all begin alike and each step hands it on to what a token attends to.

    One step is `attention_columns`. The map is made block by block in every step, and once where it is one block.

    Args:
        query, key, bias, scaling, softcap, sinks: as for `attention_rows`; there are as many queries as keys.
        steps: how often importance is handed on, at least 1.
        valid: tokens that have importance at the beginning, [batch, queries], bool; all unless given.

    Returns:
        [batch, heads, keys], fp32 (fp64 for fp64 inputs), summing to 1 over the keys; with sinks to less after each
        step, as they hand nothing on.
    """
    batch, heads, queries, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype) * scaling, key.to(dtype)
    began = torch.ones(batch, queries, device=query.device) if valid is None else valid
    rank = (began / began.sum(1, keepdim=True).clamp_min(1)).to(dtype).unsqueeze(1).expand(-1, heads, -1)
    size = max(1, _BLOCK_BYTES // (4 * batch * heads * max(key.shape[2], 1)))

    def block(rows: slice) -> Tensor:
        positions = torch.arange(rows.start, rows.stop, device=query.device).expand(batch, -1)
        return _softmax_of(query[:, :, rows], key, bias(positions), softcap, 0, sinks)

    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    with torch.autocast(query.device.type, enabled=False):
        only = block(blocks[0]) if len(blocks) == 1 else None
        for _ in range(steps):
            parts = (rank[:, :, None, rows] @ (block(rows) if only is None else only) for rows in blocks)
            rank = sum(parts, torch.zeros(batch, heads, 1, key.shape[2], dtype=dtype, device=query.device)).squeeze(2)
    return rank


def _part(bias: Tensor, batches: slice, heads: slice) -> Tensor:
    """The bias of some sequences and heads, where it is not the same for all."""
    bias = bias[batches] if bias.shape[0] > 1 else bias
    return bias[:, heads] if bias.shape[1] > 1 else bias


def _multiplied(key: Tensor) -> Tensor:
    """Keys ([batch, key heads, keys, head_dim]) as matrices that can be multiplied: copied only where they are none,
    not where there is room between them."""
    apart = key.stride(3) == 1 and key.stride(0) == key.stride(1) * key.shape[1]
    return key if apart else key.contiguous()


def _softmax_of(
    query: Tensor, key: Tensor, bias: Tensor | None, softcap: float | None, first: int, sinks: Tensor | None
) -> Tensor:
    """Softmax over the keys of scaled queries, the bias added to the keys from the first on; of the queries' type."""
    scores = _scores_of(query, key, bias, softcap, first)
    # In place, where it may be: new memory of this size takes longer than the work.
    return attention_softmax(scores, None if sinks is None else sinks.view(-1, 1, 1), not torch.is_grad_enabled())


def _scores_of(query: Tensor, key: Tensor, bias: Tensor | None, softcap: float | None, first: int) -> Tensor:
    # Heads that share keys lie side by side: [batch, key heads, heads per key head * rows, head_dim]. Keys are laid out
    # as they are multiplied: transposing them while they are copied takes ten times as long.
    rows = query.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    if grouped.shape[:2] == (1, 1) and not torch.is_grad_enabled():
        product = multiply(grouped[0, 0], key[0, 0], query.dtype)[None, None]
    else:
        product = grouped @ key.transpose(2, 3)
    scores: Tensor = product.unflatten(2, (-1, rows)).flatten(1, 2)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_() * softcap
    if bias is not None:
        scores[..., first:] += bias
    return scores
