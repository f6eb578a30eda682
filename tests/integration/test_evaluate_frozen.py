"""The shipped student on a small frozen set: its numbers do not move unless the student does."""

from __future__ import annotations

import json

import pytest

from daemon.config import SHIPPED_MODEL
from tests.frozen import EXPECTED, measure_frozen

DICE_TOLERANCE = 0.01
SCORE_TOLERANCE = 0.05
"""Relative; the engines of other machines differ in the order of their sums."""


@pytest.mark.slow
def test_the_shipped_students_evaluation_has_not_moved() -> None:
    """Dice, uncertainties and verdicts of one built-in head, clean and with five artefacts, are those on record."""
    pytest.importorskip("nilearn")
    if not SHIPPED_MODEL.is_file() or not EXPECTED.is_file():
        pytest.skip("no student is shipped yet")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    found = measure_frozen(SHIPPED_MODEL)
    assert found["graph_sha256"] == expected["graph_sha256"], "another student: run `python -m tests.frozen` and review"
    assert found["scans"].keys() == expected["scans"].keys()
    for artefact, wanted in expected["scans"].items():
        got = found["scans"][artefact]
        assert got["dice"] == pytest.approx(wanted["dice"], abs=DICE_TOLERANCE), artefact
        assert got["verdict"] == wanted["verdict"], artefact
        for name in ("artefact_uncertainty", "artefact_uncertainty_gm", "task_uncertainty"):
            assert got[name] == pytest.approx(wanted[name], rel=SCORE_TOLERANCE), (artefact, name)
