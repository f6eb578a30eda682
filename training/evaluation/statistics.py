"""Rank correlations, risk-coverage curves and intervals: pure functions of numbers.

Scans of one anatomy are alike, so every interval resamples anatomies first and scans of the drawn anatomies second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    Attributes:
        value: the estimate.
        low, high: ends of the 95 % interval.
        n: scans. n_anatomies: label maps or persons, resampled first.
    """

    value: float
    low: float
    high: float
    n: int
    n_anatomies: int


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0.0 where one side is constant or fewer than 3 pairs are there."""
    a, b = stats.rankdata(np.asarray(x, dtype=float)), stats.rankdata(np.asarray(y, dtype=float))
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def aurc(badness: ArrayLike, dice: ArrayLike) -> float:
    """Area under the risk-coverage curve: mean over coverages of the mean of 1 - Dice among the scans kept.

    Args:
        badness: larger is worse; the best scans are kept first.
        dice: in [0, 1].

    Returns:
        In [0, 1], smaller is better. Ties keep the mean risk of the tied scans.

    Source: Geifman et al., ICLR 2019; Zenk et al., arXiv 2406.03323.
    """
    return float(risk_coverage(badness, dice)[1].mean())


def risk_coverage(badness: ArrayLike, dice: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coverage in (0, 1] and the mean of 1 - Dice of the scans kept at each."""
    bad, risk = np.asarray(badness, dtype=float), 1.0 - np.asarray(dice, dtype=float)
    order = np.argsort(bad, kind="stable")
    values, inverse = np.unique(bad[order], return_inverse=True)
    tied = np.bincount(inverse, weights=risk[order]) / np.bincount(inverse)
    kept = np.cumsum(tied[inverse]) / np.arange(1, len(bad) + 1)
    del values
    return np.arange(1, len(bad) + 1) / len(bad), kept


def two_level(anatomies: Sequence[str], rng: np.random.Generator) -> NDArray[np.intp]:
    """One resample: anatomies with replacement, then scans with replacement inside each."""
    names, inverse = np.unique(np.asarray(anatomies), return_inverse=True)
    members = [np.flatnonzero(inverse == i) for i in range(len(names))]
    drawn = rng.integers(len(names), size=len(names))
    return np.concatenate([rng.choice(members[i], len(members[i])) for i in drawn])


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    anatomies: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic under two-level resampling.

    Args:
        statistic: takes indices of scans.
        anatomies: of each scan.
        resamples: how many.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    n = len(anatomies)
    values = np.array([statistic(two_level(anatomies, rng)) for _ in range(resamples)])
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(statistic(np.arange(n)), float(low), float(high), n, len(set(anatomies)))


def spearman_interval(x: ArrayLike, y: ArrayLike, anatomies: Sequence[str], resamples: int = RESAMPLES) -> Interval:
    """Spearman's rho with its two-level interval."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return bootstrap(lambda index: spearman(a[index], b[index]), anatomies, resamples)


@dataclass(frozen=True)
class Share:
    """A share with its exact binomial interval (Clopper-Pearson, 95 %)."""

    hits: int
    n: int
    value: float
    low: float
    high: float


def share(hits: int, n: int) -> Share:
    """Exact binomial interval of `hits` out of `n`; the interval is [0, 1] where n is 0.

    Raises:
        ValueError: hits outside 0 to n.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"hits: expected 0 to {n}, got {hits}")
    if n == 0:
        return Share(0, 0, 0.0, 0.0, 1.0)
    alpha = 1.0 - LEVEL
    low = float(stats.beta.ppf(alpha / 2, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(stats.beta.ppf(1 - alpha / 2, hits + 1, n - hits)) if hits < n else 1.0
    return Share(hits, n, hits / n, low, high)


def reliability(predicted: ArrayLike, observed: ArrayLike, bins: int = 10) -> list[tuple[float, float, int]]:
    """Mean prediction, mean observation and number of scans in bins of equal count, for a reliability diagram."""
    p, o = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p))) if len(p) else []
    return [(float(p[i].mean()), float(o[i].mean()), len(i)) for i in parts if len(i)]
