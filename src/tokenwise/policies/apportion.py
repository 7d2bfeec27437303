"""A budget shared out."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(count: int, weights: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Share `count` out in proportion to `weights`, none getting more than its capacity.

    What a full one cannot take goes to the others in proportion; remainders go to the largest fractions, of equal ones
    to the first. Where all weights left are 0 the shares are even.

    Args:
        count: what there is; more than all capacities is cut to their sum.
        weights: not negative.
        capacity: the most each may get.

    Returns:
        Whole numbers that add up to `count`.
    """
    shares = [0] * len(weights)
    left, unfilled = min(count, sum(capacity)), list(range(len(weights)))
    while unfilled:
        total = sum(weights[one] for one in unfilled)
        quota = {one: left * (weights[one] / total if total else 1 / len(unfilled)) for one in unfilled}
        full = [one for one in unfilled if quota[one] >= capacity[one]]
        if not full:
            break
        for one in full:
            shares[one] = capacity[one]
            left -= capacity[one]
        unfilled = [one for one in unfilled if one not in full]
    if not unfilled:
        return shares
    for one in unfilled:
        shares[one] = int(quota[one])
    left -= sum(shares[one] for one in unfilled)
    for one in sorted(unfilled, key=lambda one: shares[one] - quota[one])[:left]:
        shares[one] += 1
    return shares
