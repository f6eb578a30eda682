"""Score trends with control limits: one individuals chart per scanner and protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from daemon.page.store import Entry

METRICS: dict[str, str] = {
    "predicted_dice": "Predicted Dice",
    "artefact_uncertainty": "Artefact uncertainty, field of view",
    "artefact_uncertainty_gm": "Artefact uncertainty, grey matter",
    "task_uncertainty": "Task uncertainty",
    "gm_volume_ml": "Grey matter, ml",
    "snr": "SNR",
    "cnr": "CNR",
}
"""Scores that are worth following over time, with the words for people."""

MIN_POINTS = 8
"""Fewer points than this give no limits: they would move with every scan."""

MEDIAN_RANGE_TO_LIMIT = 3.145
"""Three sigma from the median moving range of neighbours: 3 / 0.954 (individuals chart, normal data)."""


@dataclass(frozen=True)
class Limits:
    """Control limits in the unit of the score.

    Attributes:
        centre: median of the points.
        low: lower limit.
        high: upper limit.
        points: how many they rest on.
    """

    centre: float
    low: float
    high: float
    points: int


@dataclass(frozen=True)
class Point:
    """One result on a chart.

    Attributes:
        at: unix seconds.
        value: the score.
        outside: beyond the control limits.
    """

    at: float
    value: float
    verdict: str
    result_id: str
    outside: bool


@dataclass(frozen=True)
class Trend:
    """One chart: a score over time for one scanner and protocol; limits are None below `MIN_POINTS`."""

    scanner: str
    protocol: str
    points: tuple[Point, ...]
    limits: Limits | None


def control_limits(values: Sequence[float]) -> Limits | None:
    """Limits of an individuals chart that a few bad scans cannot move.

    Args:
        values: scores in the order of time.

    Returns:
        Median and median +- 3.145 times the median moving range; None below `MIN_POINTS` values.
    """
    if len(values) < MIN_POINTS:
        return None
    centre = median(values)
    spread = MEDIAN_RANGE_TO_LIMIT * median(abs(b - a) for a, b in pairwise(values))
    return Limits(centre, centre - spread, centre + spread, len(values))


def trends(entries: Sequence[Entry], metric: str) -> list[Trend]:
    """Group results by scanner and protocol, oldest point first; results without this score are left out.

    Raises:
        ValueError: a metric that is not followed.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}; use one of {', '.join(METRICS)}")
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.at):
        if metric in entry.result.get("scores", {}):
            groups.setdefault((str(entry.result.get("scanner", "unknown")), entry.protocol), []).append(entry)
    return [_trend(scanner, protocol, found, metric) for (scanner, protocol), found in sorted(groups.items())]


def _trend(scanner: str, protocol: str, entries: Sequence[Entry], metric: str) -> Trend:
    values = [float(entry.result["scores"][metric]) for entry in entries]
    limits = control_limits(values)
    points = tuple(
        Point(
            at=entry.at,
            value=value,
            verdict=str(entry.result["verdict"]),
            result_id=entry.result_id,
            outside=limits is not None and not limits.low <= value <= limits.high,
        )
        for entry, value in zip(entries, values, strict=True)
    )
    return Trend(scanner, protocol, points, limits)
