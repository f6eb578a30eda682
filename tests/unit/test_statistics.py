"""The evaluation's statistics against oracles written another way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from training.evaluation.statistics import (
    aurc,
    bootstrap,
    reliability,
    risk_coverage,
    share,
    spearman,
    spearman_interval,
    two_level,
)


def test_spearman_equals_scipy_with_ties() -> None:
    """Ties take their mean rank, as in SciPy."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2], [2, 1]), ([], [])])
def test_spearman_without_information_is_zero(x: list[float], y: list[float]) -> None:
    """A constant side or fewer than three pairs say nothing, and no number that is not one comes out."""
    assert spearman(x, y) == 0.0


def test_aurc_equals_a_loop() -> None:
    """The area is the mean, over how many scans are kept, of the mean of 1 - Dice of the best ones."""
    rng = np.random.default_rng(1)
    bad, dice = rng.permutation(25).astype(float), rng.random(25)
    order = sorted(range(25), key=lambda i: bad[i])
    expected = np.mean([np.mean([1 - dice[i] for i in order[: k + 1]]) for k in range(25)])
    assert aurc(bad, dice) == pytest.approx(expected)


def test_aurc_of_a_perfect_order_is_smallest() -> None:
    """No order of the scans has a smaller area than that of their Dice."""
    rng = np.random.default_rng(2)
    dice = rng.random(30)
    best = aurc(-dice, dice)
    assert all(aurc(rng.random(30), dice) >= best for _ in range(50))
    assert aurc(dice, dice) > best


def test_ties_share_their_risk() -> None:
    """Scans that a measure cannot tell apart are not ordered by chance."""
    bad, dice = np.zeros(4), np.array([1.0, 0.0, 1.0, 0.0])
    assert risk_coverage(bad, dice)[1] == pytest.approx([0.5] * 4)
    assert aurc(bad, dice) == aurc(bad, dice[::-1])


def test_two_levels_draw_whole_anatomies() -> None:
    """A resample draws as many anatomies as there are, and scans only from these."""
    anatomies = ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    rng = np.random.default_rng(3)
    sizes = set()
    for _ in range(40):
        index = two_level(anatomies, rng)
        assert len(index) == 15
        sizes.add(len({anatomies[i] for i in index}))
    assert {1, 2, 3} >= sizes
    assert len(sizes) > 1


def test_anatomies_that_differ_widen_the_interval() -> None:
    """Resampling scans as if they were independent would be too sure where anatomies differ."""
    rng = np.random.default_rng(4)
    names = [f"s{i // 20}" for i in range(80)]
    values = np.repeat(rng.normal(0, 3, 4), 20) + rng.normal(0, 0.3, 80)
    clustered = bootstrap(lambda i: float(values[i].mean()), names, 400)
    alone = bootstrap(lambda i: float(values[i].mean()), [str(i) for i in range(80)], 400)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    assert (clustered.n, clustered.n_anatomies) == (80, 4)


def test_interval_holds_the_estimate_and_repeats() -> None:
    """The same scans give the same interval, around the estimate."""
    rng = np.random.default_rng(5)
    x = rng.random(40)
    y = -x + rng.normal(0, 0.2, 40)
    names = [f"s{i % 8}" for i in range(40)]
    first, second = spearman_interval(x, y, names, 300), spearman_interval(x, y, names, 300)
    assert first == second
    assert first.low < first.value < first.high < 0


@pytest.mark.parametrize(("hits", "n"), [(0, 59), (3, 60), (60, 60)])
def test_share_is_clopper_pearson(hits: int, n: int) -> None:
    """The exact interval equals SciPy's."""
    oracle = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    found = share(hits, n)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_share_of_nothing_knows_nothing() -> None:
    """Without scans the interval is everything; more hits than scans is an error that shows both."""
    assert (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="expected 0 to 2, got 3"):
        share(3, 2)


def test_reliability_keeps_every_scan() -> None:
    """The bins hold all scans, rising in the prediction."""
    rng = np.random.default_rng(6)
    p = rng.random(37)
    points = reliability(p, p)
    assert sum(n for _, _, n in points) == 37
    assert all(a == pytest.approx(b) for a, b, _ in points)
    assert [a for a, _, _ in points] == sorted(a for a, _, _ in points)
