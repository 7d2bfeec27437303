"""How many tokens stay after each block of a model: plans, and the plan that meets a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What a plan is made for.

    Args:
        tokens: tokens at the beginning, protected ones included.
        layers: how many blocks there are.
        prefix: how many of the tokens are protected.
        width: channels of a token.
        hidden_width: channels inside the feed-forward layer.
        gated: whether the feed-forward layer has a gate, and so three matrices instead of two.
        key_width: channels of all keys together; `width` unless given.
    """

    tokens: int
    layers: int
    prefix: int = 0
    width: int = 1
    hidden_width: int = 4
    gated: bool = False
    key_width: int | None = None

    def macs(self, attended: Sequence[Any], processed: Sequence[Any]) -> Any:
        """Multiply-accumulates of all blocks: projections and scores of attention, and feed-forward layers.

        A number of the kind that the tokens are given in: whole numbers, or tensors with a gradient.

        Args:
            attended: tokens in the attention of each block.
            processed: tokens in the feed-forward layer of each block.
        """
        keys = self.width if self.key_width is None else self.key_width
        projections = 2 * self.width * self.width + 2 * self.width * keys
        matrices = (3 if self.gated else 2) * self.width * self.hidden_width
        return sum(
            before * projections + 2 * before * before * self.width + after * matrices
            for before, after in zip(attended, processed, strict=True)
        )


def removed_evenly(rate: float, layers: int) -> list[int]:
    """Tokens removed in each of `layers` blocks, `rate` on average: whole numbers that add up to the rounded sum."""
    ends = [math.floor(rate * (layer + 1) + 0.5) for layer in range(layers)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def removed_linearly(rate: float, inflection: float, layers: int) -> list[int]:
    """Tokens removed in each block, in a line from ``rate * (1 - inflection)`` to ``rate * (1 + inflection)``.

    Args:
        rate: their mean.
        inflection: in [-1, 1]: -1 removes most at the beginning, 1 most at the end, 0 the same everywhere.
        layers: how many blocks.
    """
    low = int(rate * (1 - inflection) + 1e-9)
    step = (2 * rate - 2 * low) / max(layers - 1, 1)
    # A rounding error below a whole number must not cost a token.
    return [int(low + step * layer + 1e-9) for layer in range(layers)]


def counts_after_merging(shape: Shape, removed: Sequence[int]) -> list[int]:
    """Tokens after each block when at most half of the unprotected ones can be merged at once."""
    counts, tokens = [], shape.tokens
    for wanted in removed:
        tokens -= max(min(wanted, (tokens - shape.prefix) // 2), 0)
        counts.append(tokens)
    return counts


def counts_after_dropping(shape: Shape, removed: Sequence[int]) -> list[int]:
    """Tokens after each block when all unprotected ones but one can be dropped at once."""
    counts, tokens = [], shape.tokens
    for wanted in removed:
        tokens -= max(min(wanted, tokens - shape.prefix - 1), 0)
        counts.append(tokens)
    return counts


def entering(shape: Shape, counts: Sequence[int]) -> list[int]:
    """Tokens that enter each block, from those after each block."""
    return [shape.tokens, *counts[:-1]]


def fit(
    plan: Callable[[float], list[int]], keep: float | str, shape: Shape, *, between: bool, largest: float
) -> list[int]:
    """The plan of a one-parameter family that comes closest to a budget without exceeding it.

    Args:
        plan: tokens after each block for a parameter that rises with what is removed; 0 removes nothing.
        keep: the share of tokens that the feed-forward layers work on, averaged over all blocks, in (0, 1]; or
            ``"N tokens"`` after the last block; or ``"X flops"``, a share of the dense model's.
        shape: of the model.
        between: whether tokens go between the attention and the feed-forward layer of a block, or after it.
        largest: a parameter at which nothing more can be removed.

    Returns:
        Tokens after each block; the smallest possible plan where even that exceeds the budget.
    """

    def cost(counts: list[int]) -> float:
        before = entering(shape, counts)
        processed = counts if between else before
        if isinstance(keep, str) and keep.endswith("tokens"):
            return counts[-1]
        if isinstance(keep, str):
            dense = [shape.tokens] * shape.layers
            return float(shape.macs(before, processed) / shape.macs(dense, dense))
        return sum(processed) / (shape.tokens * shape.layers)

    budget = float(keep.split()[0]) if isinstance(keep, str) else keep
    if budget >= (shape.tokens if isinstance(keep, str) and keep.endswith("tokens") else 1):
        return [shape.tokens] * shape.layers
    low, high = 0.0, largest
    for _ in range(60):
        middle = (low + high) / 2
        if cost(plan(middle)) > budget:
            low = middle
        else:
            high = middle
    return plan(high)


def fit_macs(
    plan: Callable[[int], list[int] | None], share: float, shape: Shape, candidates: int
) -> tuple[list[int] | None, float]:
    """The largest plan of a decoder's layers within a share of the dense layers' multiply-accumulates.

    Args:
        plan: candidates in each layer for the sum over all layers that they may reach; falls with it, and None where no
            plan is that small.
        share: of the multiply-accumulates, in (0, 1].
        shape: of the decoder; its tokens are those of the whole prompt.
        candidates: how many of them may go.

    Returns:
        The plan, None where even the smallest exceeds the share; and the share that it, or the smallest, takes.
    """
    layers, others = shape.layers, shape.tokens - candidates
    dense = shape.macs([shape.tokens] * layers, [shape.tokens] * layers)

    def cost(counts: list[int]) -> float:
        tokens = [others + count for count in counts]
        return float(shape.macs(tokens, tokens) / dense)

    best, smallest = None, 1.0
    low, high = 0, candidates * layers + 1
    while low + 1 < high:
        middle = (low + high) // 2
        counts = plan(middle)
        if counts is None:
            low = middle
            continue
        taken = cost(counts)
        if taken <= share:
            best, low = (counts, taken), middle
        else:
            smallest, high = min(smallest, taken), middle
    return best if best is not None else (None, smallest)


def tokens_in_stages(candidates: int, layers: int, starts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Tokens in each layer when they fall at some layers to shares of their first number.

    Args:
        candidates: tokens that may go.
        layers: how many layers there are.
        starts: the layer from which on each share holds, from 0; of shares that begin together the least holds.
        shares: in [0, 1].

    Returns:
        Tokens in each layer, rounded down, never rising, at least one while any share is above 0.
    """
    counts = []
    for layer in range(layers):
        held = [share for start, share in zip(starts, shares, strict=True) if start <= layer]
        share = min(held, default=1.0)
        # A rounding error below a whole number must not cost a token.
        counts.append(max(int(candidates * share + 1e-9), min(candidates, 1) if share > 0 else 0))
    return counts


def fit_stages(
    candidates: int, layers: int, starts: Sequence[int], shares: Sequence[float], keep: float | str
) -> list[int] | None:
    """The plan of `tokens_in_stages` closest to a budget without exceeding it: all shares raised to one power.

    Args:
        candidates, layers, starts, shares: as there; shares in (0, 1).
        keep: share of token x layer that stays, in (0, 1], or ``"N tokens"`` as a mean over the layers.

    Returns:
        Tokens in each layer; None where no plan of these stages is that small.
    """
    share = float(keep.split()[0]) / max(candidates, 1) if isinstance(keep, str) else keep
    if share >= 1 or not candidates:
        return [candidates] * layers

    def plan(power: float) -> list[int]:
        return tokens_in_stages(candidates, layers, starts, [each**power for each in shares])

    budget = math.floor(share * candidates * layers + 0.5)
    low, high = 0.0, 200.0
    if sum(plan(high)) > budget:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        if sum(plan(middle)) > budget:
            low = middle
        else:
            high = middle
    return plan(high)
