"""How a budget is spread over the blocks of a model: tokens after each block, by one number that says how much goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenwise.policies.plans import Shape


def counts_by_weight(shape: Shape, rate: float, weights: Sequence[float]) -> list[int]:
    """Tokens after each block when each block takes out ``rate * weight / mean(weights)`` of the unprotected ones.

    Args:
        shape: of the model.
        rate: tokens taken out per block, on average.
        weights: of each block, at least 0 and not all 0.

    Returns:
        Whole numbers whose rounding does not add up; at least one unprotected token is left.
    """
    mean = sum(weights) / len(weights)
    counts, taken, left = [], 0.0, shape.tokens
    for weight in weights:
        taken += rate * weight / mean
        left = max(min(left, shape.tokens - math.floor(taken + 0.5)), shape.prefix + 1)
        counts.append(left)
    return counts


def at_most_half(shape: Shape, counts: Sequence[int]) -> list[int]:
    """The counts where no block takes out more than half of its unprotected tokens; what it may not, later ones do."""
    limited, left = [], shape.tokens
    for count in counts:
        left = min(left, max(count, left - (left - shape.prefix) // 2))
        limited.append(left)
    return limited


def linear_weights(layers: int, inflection: float) -> list[float]:
    """Weights in a line from ``1 - inflection`` to ``1 + inflection``; -1 takes most out at the beginning."""
    return [1 - inflection + 2 * inflection * layer / max(layers - 1, 1) for layer in range(layers)]


def entropy_weights(entropies: Sequence[float], tokens: int) -> list[float]:
    """``1 - (H / log N) ** 2`` of each block: where attention is concentrated, more can go.

    Args:
        entropies: of the attention in each block, in nats, in [0, log(tokens)].
        tokens: how many it is spread over, at least 2.

    Returns:
        Weights in [0, 1]; all 1 where attention is uniform everywhere.
    """
    weights = [max(1 - (entropy / math.log(tokens)) ** 2, 0.0) for entropy in entropies]
    return weights if any(weights) else [1.0] * len(weights)


def shifted_cosine(layers: int, shift: float, floor: float = 0.15, dense_above: float = 0.85) -> list[float]:
    """The share of the tokens in each block on half a cosine wave, ``(cos(pi l / (L - 1)) + 1) / 2 - shift``.

    Args:
        layers: how many blocks there are.
        shift: how far the wave is moved down, from 0; moved below 0 nothing goes.
        floor: the smallest share.
        dense_above: the share above which nothing goes.

    Returns:
        Shares from `floor` to `dense_above`, or 1.
    """
    shares = [(math.cos(math.pi * layer / max(layers - 1, 1)) + 1) / 2 - shift for layer in range(layers)]
    return [1.0 if share > dense_above else max(share, floor) for share in shares]


def counts_on_shifted_cosine(shape: Shape, shift: float, floor: float = 0.15, dense_above: float = 0.85) -> list[int]:
    """Tokens after each block when a `shifted_cosine` of the unprotected ones stays.

    Returns:
        Whole numbers, rounded down; at least one unprotected token is left.
    """
    patches = shape.tokens - shape.prefix
    shares = shifted_cosine(shape.layers, shift, floor, dense_above)
    return [shape.prefix + max(int(share * patches + 1e-9), 1) for share in shares]
