"""Control limits and the grouping of trends."""

from __future__ import annotations

import numpy as np
import pytest

from daemon.page.trend import METRICS, control_limits, trends
from tests.browser.memory_store import MemoryStore, make_result


def test_limits_hold_three_sigma_of_normal_data() -> None:
    """For normal data the limits come out at three standard deviations, within sampling error."""
    values = np.random.default_rng(1).normal(10.0, 2.0, 4000)
    limits = control_limits(values.tolist())
    assert limits is not None
    assert limits.centre == pytest.approx(10.0, abs=0.15)
    assert (limits.high - limits.low) / 2 == pytest.approx(6.0, rel=0.06)


def test_a_few_bad_scans_do_not_move_the_limits() -> None:
    """Three outliers among forty points widen the limits by less than half, where a plain deviation would widen them tenfold."""
    values = np.random.default_rng(2).normal(0.93, 0.01, 40).tolist()
    clean = control_limits(values)
    values[5], values[20], values[33] = 0.4, 0.5, 0.3
    spoilt = control_limits(values)
    assert clean is not None
    assert spoilt is not None
    assert spoilt.high - spoilt.low < 1.5 * (clean.high - clean.low)
    assert 6 * np.std(values) > 10 * (clean.high - clean.low)


def test_few_points_give_no_limits() -> None:
    """Seven points give none, eight do."""
    assert control_limits([1.0] * 7) is None
    assert control_limits([1.0, 2.0] * 4) is not None


def test_trends_are_grouped_by_scanner_and_protocol_in_the_order_of_time() -> None:
    """Each scanner and protocol is one chart, its oldest point first; results without the score are left out."""
    store = MemoryStore("mr1", "mr2")
    for at, scanner, verdict in (
        (3, "mr1", "PASS"),
        (1, "mr1", "RESCAN"),
        (2, "mr2", "PASS"),
        (4, "mr1", "CANNOT_JUDGE"),
    ):
        store.add(make_result(verdict, scanner), 1, at=float(at))
    found = trends(store.past, "predicted_dice")
    assert [(t.scanner, [p.at for p in t.points]) for t in found] == [("mr1", [1.0, 3.0]), ("mr2", [2.0])]


def test_an_outlying_result_is_marked() -> None:
    """One low point among steady ones lies outside; the steady ones do not."""
    store = MemoryStore("mr1")
    for n in range(20):
        result = make_result("PASS")
        result["scores"]["predicted_dice"] = 0.93 + 0.002 * (-1) ** n if n != 11 else 0.7
        store.add(result, n, at=float(n))
    (trend,) = trends(store.past, "predicted_dice")
    assert [n for n, point in enumerate(trend.points) if point.outside] == [11]


def test_an_unknown_metric_is_refused_by_name() -> None:
    """The message shows what was asked for and what there is."""
    with pytest.raises(ValueError, match=r"'colour'.*predicted_dice"):
        trends([], "colour")
    assert "snr" in METRICS
