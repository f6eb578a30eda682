"""A site's own thresholds: order statistics, levels, the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from daemon.calibration import (
    FILE_NAME,
    CalibrationError,
    HistoryItem,
    conformal_rank,
    describe,
    fit_site,
    in_force,
    load_site,
    order_statistic_rank,
    read_history,
)
from daemon.calibration import _calibrate as run_calibrate


def items(scanner: str, protocol: str, n: int, *, dice: bool = False, start: int = 0) -> list[HistoryItem]:
    return [
        HistoryItem(
            scanner,
            protocol,
            f"{scanner}{protocol}{start + i}",
            -4.0 + 0.01 * i,
            0.85,
            0.84 + 0.001 * i if dice else None,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("scans", "rate", "rank"),
    [(58, 0.05, None), (59, 0.05, 59), (200, 0.05, 196), (500, 0.05, 484), (298, 0.01, None), (299, 0.01, 299)],
)
def test_the_order_statistic_is_that_of_tong_2018(scans: int, rate: float, rank: int | None) -> None:
    """59 clean scans are needed for 5 %, 299 for 1 %, each at 95 % confidence; ranks as in the paper's table."""
    assert order_statistic_rank(scans, rate, 0.95) == rank


def test_the_order_statistic_agrees_with_the_binomial_tail_of_scipy() -> None:
    """Oracle: the smallest k with P(Binomial(n, 1 - rate) >= k) <= 1 - confidence."""
    for n in (59, 77, 123, 350):
        for rate in (0.05, 0.1):
            ranks = [k for k in range(1, n + 1) if stats.binom.sf(k - 1, n, 1 - rate) <= 0.05]
            assert order_statistic_rank(n, rate, 0.95) == (ranks[0] if ranks else None)


def test_the_stated_rate_holds_in_simulation() -> None:
    """In at most 5 % of 2,000 calibrations does the true false-alarm rate exceed 5 %."""
    rng = np.random.default_rng(5)
    rank = order_statistic_rank(80, 0.05, 0.95)
    assert rank is not None
    thresholds = np.sort(rng.random((2000, 80)), axis=1)[:, rank - 1]
    assert np.mean(1.0 - thresholds > 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_the_conformal_rank_needs_nineteen() -> None:
    """ceil((n + 1) 0.95): 19 of 19, 95 of 99 (method notes, section 8)."""
    assert [conformal_rank(n, 0.05) for n in (18, 19, 99, 199)] == [None, 19, 95, 190]


def test_the_most_specific_level_with_enough_scans_is_in_force(tmp_path: Path) -> None:
    """A protocol with 59 exams has its own numbers, one with 20 takes its scanner's, a new scanner the card's."""
    fitted = fit_site([*items("a", "t1", 60), *items("a", "rare", 20), *items("b", "t1", 10)])
    document = {"version": 1, "models": {"hash": fitted}}
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(document))
    loaded = load_site(path)
    levels = [in_force(loaded, "hash", s, p) for s, p in (("a", "t1"), ("a", "rare"), ("b", "t1"), ("c", "t1"))]
    assert [None if level is None else (level.level, level.scans) for level in levels] == [
        ("protocol", 60),
        ("scanner", 80),
        None,
        None,
    ]
    assert in_force(loaded, "another model", "a", "t1") is None


def test_repeated_scans_of_one_exam_count_once() -> None:
    """70 scans of 35 exams are 35: not enough."""
    twice = [*items("a", "t1", 35), *items("a", "t1", 35)]
    assert fit_site(twice)["a"] == {"protocols": {}}


def test_known_dice_gives_the_offset_of_test_a() -> None:
    """The residual of rank ceil((n + 1)(1 - rate)), never below 0."""
    fitted = fit_site(items("a", "t1", 100, dice=True))["a"]["protocols"]["t1"]
    residuals = sorted(0.84 + 0.001 * i - 0.85 for i in range(100))
    assert fitted["dice_high"] == pytest.approx(residuals[95])
    assert fitted["dice_scans"] == 100


def test_the_command_writes_the_file_and_says_what_is_in_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """History lines in, calibration.json out, other models kept; stderr tells level and sample size."""
    import argparse

    def result(i: int) -> dict[str, object]:
        scores = {"risk": -4 + i / 100, "predicted_dice": 0.9}
        return {
            "final": True, "scanner": "a", "policy": {"rule": "t1"}, "exam_ref": str(i), "model": {"sha256": "m"}, "scores": scores,
        }  # fmt: skip

    history = tmp_path / "history.jsonl"
    history.write_text("\n".join(json.dumps(result(i)) for i in range(64)) + '\n{"final": true, "scores": {}}\n')
    (tmp_path / FILE_NAME).write_text('{"version": 1, "models": {"other": {"kept": {}}}}')
    args = argparse.Namespace(history=history, state=tmp_path, rate=0.05, confidence=0.95)
    assert run_calibrate(args) == 0
    out = capsys.readouterr()
    assert "a / t1: 64 exams; in force: protocol (64 scans)" in out.err
    document = json.loads((tmp_path / FILE_NAME).read_text())
    assert set(document["models"]) == {"other", "m"}
    assert json.loads(out.out) == document["models"]["m"]
    assert run_calibrate(argparse.Namespace(**(vars(args) | {"rate": 2.0}))) == 1


def test_a_scanner_without_enough_scans_is_told_how_many_are_needed() -> None:
    """The card stays in force."""
    few = items("a", "t1", 12)
    assert describe(few, fit_site(few), 0.05, 0.95) == [
        "a / t1: 12 exams; in force: global (the model card; 59 scans of one kind are needed)"
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 7}'])
def test_a_broken_file_is_one_line(tmp_path: Path, text: str) -> None:
    """Unreadable, of another kind or version: the remedy is to calibrate again."""
    path = tmp_path / FILE_NAME
    path.write_text(text)
    with pytest.raises(CalibrationError, match="run `rescan calibrate` again"):
        load_site(path)
    assert load_site(tmp_path / "absent.json")["models"] == {}


def test_a_history_of_several_models_is_refused(tmp_path: Path) -> None:
    """Scores of different models cannot be pooled."""
    path = tmp_path / "h.jsonl"
    line = {"final": True, "scanner": "a", "scores": {"risk": 1.0, "predicted_dice": 0.5}}
    path.write_text("\n".join(json.dumps(line | {"model": {"sha256": m}}) for m in "ab"))
    with pytest.raises(CalibrationError, match="expected scored results of one model, got 2"):
        read_history(path)
