"""The result object and the references in it."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest

from daemon import NOTICE
from daemon.result import Said, SiteKey, build_result
from daemon.words import Reason, Verdict

KEY = SiteKey(bytes(range(32)))
IDENTITY = KEY.identity("1.2.3", "1.2", "stack", "mr1")
SAID = Said(Verdict.PASS, (Reason("good_enough", "Fine."),), (), None, 0.8)


def build(**changes: object) -> dict[str, object]:
    parts: dict[str, object] = {
        "result_id": "abc",
        "final": True,
        "revision": 1,
        "supersedes": None,
        "shadow": False,
        "evidence": {"completeness": "quiet", "instances": 3, "expected": None, "rule": None},
        "model": {"name": "n", "version": "1", "sha256": "f"},
        "engine": {"provider": "cpu", "precision": "fp32", "device": "x"},
        "policy": {"rule": "t1", "calibration": "global"},
    }
    return build_result(IDENTITY, SAID, **{**parts, **changes})  # type: ignore[arg-type]


def test_the_keys_that_others_rely_on_are_there() -> None:
    """Every key of the documented object."""
    assert set(build()) >= {
        *(
            "verdict final revision supersedes series_ref scanner shadow reasons advice dominant_artefact required_dice".split()
        ),
        *("scores artefacts evidence model engine policy timing_s notice".split()),
    }
    assert build()["notice"] == NOTICE


def test_what_is_unknown_is_absent_never_nan_or_minus_one() -> None:
    """None, NaN and infinity do not appear; the object is strict JSON."""
    body = build(scores={"snr": math.nan, "cnr": None, "predicted_dice": 0.87654321, "task_uncertainty": math.inf})
    assert body["scores"] == {"predicted_dice": 0.876543}
    json.dumps(body, allow_nan=False)


def test_a_reference_is_stable_keyed_and_hides_the_uid() -> None:
    """The same UID gives the same reference at one site and another one elsewhere."""
    other = SiteKey(bytes(32))
    assert KEY.ref("1.2.3") == KEY.ref("1.2.3") != other.ref("1.2.3")
    assert IDENTITY.series_ref == KEY.ref("1.2.3")
    assert "1.2.3" not in json.dumps(build())


def test_the_site_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    """A second start reads the same key; a spoilt one is refused, not replaced."""
    first = SiteKey.load(tmp_path)
    path = tmp_path / "site.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SiteKey.load(tmp_path).ref("x") == first.ref("x")
    assert [p.name for p in tmp_path.iterdir()] == ["site.key"]
    path.write_text("spoilt")
    with pytest.raises(ValueError, match=r"site\.key"):
        SiteKey.load(tmp_path)


def test_an_extra_key_cannot_replace_a_documented_one() -> None:
    """`extra` adds, and never overrides a verdict."""
    body = build(extra={"verdict": "RESCAN", "series": {"number": 4}})
    assert (body["verdict"], body["series"]) == ("PASS", {"number": 4})
