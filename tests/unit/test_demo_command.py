"""What the demo says, and when it counts as right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from daemon.__main__ import main
from daemon.demo import command
from daemon.demo.command import Outcome, Scan, how_to_go_on, predicted
from daemon.demo.hosted import Hosted
from daemon.words import Verdict, Volume

VOLUME = Volume(np.zeros((1, 1, 1), np.float32), np.eye(4))
CLEAN = Scan("clean", "", VOLUME, Verdict.PASS, None)
MOTION = Scan("motion", "", VOLUME, Verdict.RESCAN, "motion")


def result(verdict: str, artefact: str | None) -> dict[str, Any]:
    return {"verdict": verdict, "dominant_artefact": artefact, "scores": {}, "reasons": [{"text": "why"}], "advice": []}


@pytest.mark.parametrize(
    ("scan", "verdict", "artefact", "right"),
    [
        (CLEAN, "PASS", None, True),
        (CLEAN, "REVIEW", None, False),
        (CLEAN, "CANNOT_JUDGE", None, False),
        (MOTION, "RESCAN", "motion", True),
        (MOTION, "RESCAN", "blur", False),
        (MOTION, "REVIEW", "motion", False),
        (MOTION, "PASS", None, False),
    ],
)
def test_right(scan: Scan, verdict: str, artefact: str | None, right: bool) -> None:
    """Only the verdict that was made, for the artefact that was made, counts."""
    assert Outcome(scan, result(verdict, artefact), 1.0, 2.0).right is right


def test_unknown_dice_is_said() -> None:
    """Without a predicted Dice its place tells the reason."""
    assert predicted(result("CANNOT_JUDGE", None)) == "unknown: why"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without nilearn it ends with one line that names the extra."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "rescan demo: needs nilearn and matplotlib; install the extra `demo`\n"


def test_keep_tells_how_to_go_on(tmp_path: Any) -> None:
    """What is printed names every way in."""
    text = how_to_go_on(Hosted(tmp_path))
    for word in ("rescan send", "storescu", "rescan watch", "/metrics", "v1/score/", "kill", str(tmp_path)):
        assert word in text
