"""Is a difference in held-out loss more than chance? Intervals over seeds and held-out documents, paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenwise.comparison.records import Quality

LEVEL = 0.95
"""How often all intervals of a comparison together are to cover the truth."""
RESAMPLES = 10_000
_SEED_DRAWS = 16  # per resample of the documents: the tails of Student's t need more draws, and these cost nothing
_CELLS = 4_000_000  # resampled document counts held at once


@dataclass(frozen=True)
class Interval:
    """A difference in nats/token, method minus other (below zero: the method is better), and its interval.

    Args:
        mean: the difference over all shared seeds and documents.
        low: lower end; NaN where a loss is not finite, -inf where nothing can be said.
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
    """The difference in nats/token between two methods, paired by seed and by held-out document.

    The documents are resampled with replacement (the same draw for every seed, and for every call with as many
    documents). For the seeds, resampling would not do: there are three or five of them, and such a bootstrap covers
    the truth about 70% of the time when it should 95%. Each resample instead adds Student's t, scaled by the
    standard error of the mean over seeds. With one seed only the documents are resampled, with one document only the
    seeds count, and with one of each the interval is infinite. Nothing is filtered: a loss that is not finite gives
    a NaN interval. The result is deterministic.

    Args:
        runs: the method's held-out losses by seed.
        others: those of the method it is compared with; only the seeds in both are used.
        level: confidence level in (0, 1).

    Raises:
        ValueError: when no seed is in both, or the runs were not evaluated on the same documents.
    """
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        raise ValueError("no seed was finished by both")
    counts = {tuple(quality.tokens) for seed in seeds for quality in (runs[seed], others[seed])}
    if len(counts) != 1:
        raise ValueError("the runs were evaluated on different held-out documents")
    tokens = np.array(counts.pop(), dtype=np.float64)  # [documents]
    losses = np.array([[runs[seed].nll, others[seed].nll] for seed in seeds], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        differences = losses[:, 0] - losses[:, 1]  # [seeds, documents]
    by_seed = differences.sum(axis=1) / tokens.sum()
    mean = float(by_seed.mean())
    if not np.isfinite(differences).all():
        return Interval(mean, np.nan, np.nan, level, len(seeds))
    if len(seeds) == 1 and len(tokens) == 1:
        return Interval(mean, -np.inf, np.inf, level, 1)

    generator = np.random.default_rng(0)
    sums = _resampled_sums(np.stack([differences.mean(axis=0), tokens], axis=1), generator)
    draws = sums[:, 0] / sums[:, 1]
    if len(seeds) > 1:
        error = by_seed.std(ddof=1) / np.sqrt(len(seeds))
        draws = draws[:, None] + error * generator.standard_t(len(seeds) - 1, size=(RESAMPLES, _SEED_DRAWS))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), level, len(seeds))


def _resampled_sums(columns: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Column sums over documents drawn with replacement: [documents, k] to [RESAMPLES, k]."""
    documents = len(columns)
    sums = []
    done = 0
    while done < RESAMPLES:
        rows = min(RESAMPLES - done, max(1, _CELLS // documents))
        drawn = generator.integers(documents, size=(rows, documents)) + documents * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents)
        sums.append(counts.astype(np.float64) @ columns)
        done += rows
    return np.concatenate(sums)
