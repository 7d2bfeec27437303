"""Is a difference in held-out quality more than chance? Intervals over seeds and held-out items, paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenwise.comparison.quality import Array, Quality

LEVEL = 0.95
"""How often all intervals of a comparison together are to cover the truth."""
RESAMPLES = 10_000
_SEED_DRAWS = 16  # per resample of the items: the tails of Student's t need more draws, and these cost nothing
_CELLS = 4_000_000  # resampled item counts held at once


@dataclass(frozen=True)
class Interval:
    """A difference in the ranking measure, method minus other (below zero: the method is better), and its interval.

    Args:
        mean: the difference over all shared seeds and items.
        low: lower end; NaN where a number is not finite, -inf where nothing can be said.
        high: upper end.
        level: the confidence level of this one interval, in (0, 1).
        seeds: how many seeds were paired.
    """

    mean: float
    low: float
    high: float
    level: float
    seeds: int

    @property
    def below_zero(self) -> bool:
        return self.high < 0

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def finite(self) -> bool:
        """Whether the losses behind it were."""
        return bool(np.isfinite(self.mean)) and not np.isnan(self.low)


def difference(runs: Mapping[int, Quality], others: Mapping[int, Quality], level: float = 0.95) -> Interval:
    """The difference in the ranking measure between two methods, paired by seed and by held-out item.

    The items are resampled with replacement, each within its stratum (the same draw for every seed, and for every
    call with as many items). For the seeds, resampling would not do: there are three or five of them, and such a
    bootstrap covers the truth about 70% of the time when it should 95%. Each resample instead adds Student's t,
    scaled by the standard error of the mean over seeds. With one seed only the items are resampled, with one item
    only the seeds count, and with one of each the interval is infinite. Nothing is filtered: a number that is not
    finite gives a NaN interval. The result is deterministic.

    Args:
        runs: the method's held-out quality by seed.
        others: that of the method it is compared with; only the seeds in both are used.
        level: confidence level in (0, 1).

    Raises:
        ValueError: when no seed is in both, or the runs were not evaluated on the same items.
    """
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        raise ValueError("no seed was finished by both")
    pairs = [(runs[seed], others[seed]) for seed in seeds]
    if len({quality.identity() for pair in pairs for quality in pair}) != 1:
        raise ValueError("the runs were evaluated on different held-out items")
    first = pairs[0][0]
    by_seed = np.array([run.value - other.value for run, other in pairs])
    mean = float(by_seed.mean())
    if not all(quality.finite for pair in pairs for quality in pair):
        return Interval(mean, np.nan, np.nan, level, len(seeds))
    if len(seeds) == 1 and first.items == 1:
        return Interval(mean, -np.inf, np.inf, level, 1)

    generator = np.random.default_rng(0)
    draws = np.concatenate(
        [
            np.mean([_values(counts, run) - _values(counts, other) for run, other in pairs], axis=0)
            for counts in _draws(first.strata(), first.items, generator)
        ]
    )
    if len(seeds) > 1:
        error = by_seed.std(ddof=1) / np.sqrt(len(seeds))
        draws = draws[:, None] + error * generator.standard_t(len(seeds) - 1, size=(RESAMPLES, _SEED_DRAWS))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), level, len(seeds))


def _values(counts: Array, quality: Quality) -> Array:
    """The measure of each draw: [draws, items] to [draws]."""
    return quality.of_sums(counts @ quality.columns())


def _draws(strata: NDArray[np.int64] | None, items: int, generator: np.random.Generator) -> Iterator[Array]:
    """How often each item is drawn, with replacement within its stratum: `RESAMPLES` rows of [items], in parts."""
    members = [np.arange(items)] if strata is None else [np.flatnonzero(strata == name) for name in np.unique(strata)]
    done = 0
    while done < RESAMPLES:
        rows = min(RESAMPLES - done, max(1, _CELLS // items))
        counts = np.empty((rows, items))
        for where in members:
            size = len(where)
            drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            counts[:, where] = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        yield counts
        done += rows
