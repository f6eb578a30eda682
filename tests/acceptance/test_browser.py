"""The page in a real Chromium against a running daemon that is really pushed to, killed and started again."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from daemon.pictures import draw
from daemon.prepare import prepare
from daemon.score import WorstSlice
from daemon.words import Maps
from tests.browser.browsing import Sight, launched
from tests.builders import head_phantom, volume_of
from tests.pushing import head, push
from tests.serving import QUICK, Serving

CONFIG = (
    QUICK
    + """
[[scanners]]
slug = "mr1"
ae_title = "SCANNER"
address = "127.0.0.1"
room = "MR 1"
"""
)
NOT_LIVE_S = 6.0
WAIT_MS = 60_000
STUDY = str(generate_uid(entropy_srcs=["browser"]))
CANARY = "ZZZ^CANARY"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


def series(number: int) -> list[Any]:
    """One series of the exam."""
    return head(
        f"browser {number}", StudyInstanceUID=STUDY, SeriesNumber=number, PatientName=CANARY, PatientID="CANARY7"
    )


def wait_for_word(page: Any, word: str) -> None:
    page.wait_for_function("w => document.querySelector('.word')?.textContent === w", arg=word, timeout=WAIT_MS)


def newest(page: Any) -> Any:
    """The newest result of the first scanner, as the page was told."""
    return page.evaluate("() => fetch('/api/state').then((a) => a.json()).then((s) => s.scanners[0].exam[0])")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def expected_picture(worst: list[dict[str, Any]], plane: str) -> np.ndarray:
    """The picture that the pushed head must give, drawn here from what was pushed."""
    volume = volume_of(head_phantom(), (2.0, 2.0, 2.0))
    prepared = prepare(volume)
    none = np.zeros(prepared.image.shape, np.float32)
    slices = [WorstSlice(w["plane"], w["index"], 0.0, 0.0, w["place"]) for w in worst]
    return pixels(draw(volume, prepared, Maps(none, none, np.stack([none] * 5)), slices).files[f"{plane}.png"])


@pytest.mark.slow
def test_from_push_to_alert_to_repeat_across_a_crash(
    browser: Any, tmp_path: Path, student: Path, strict_student: Path
) -> None:
    """Alert, picture, acknowledgement; kill -9 and NOT LIVE; back by itself; the repeat passes and resolves the alert."""
    daemon = Serving(tmp_path / "state", model=strict_student, config=CONFIG).start()
    sight = Sight(browser)
    try:
        page = sight.open(f"http://127.0.0.1:{daemon.ports['http']}")
        assert page.inner_text(".room") == "MR 1"
        push(daemon.ports["dicom"], series(5))
        see_the_alert(page)
        see_the_picture(page)
        page.fill(".by input", "KL")
        page.click(".ack-rescanning:enabled")
        page.wait_for_selector("text=acknowledged by KL", timeout=WAIT_MS)
        page.wait_for_function(
            "() => !document.querySelector('.meta').textContent.includes('provisional')", timeout=WAIT_MS
        )
        assert sight.errors == []
        assert sight.violations() == []

        daemon.kill()
        killed = time.monotonic()
        page.wait_for_selector("#notlive", state="visible", timeout=WAIT_MS)
        silent_s = time.monotonic() - killed
        print(f"NOT LIVE {silent_s:.1f} s after kill -9")
        assert silent_s <= NOT_LIVE_S
        assert "grayscale" in page.eval_on_selector("main", "m => getComputedStyle(m).filter")

        daemon.model, daemon.arguments = student, ("--http", f"127.0.0.1:{daemon.ports['http']}")
        daemon.start()
        page.wait_for_selector("#notlive", state="hidden", timeout=WAIT_MS)
        sight.errors.clear()  # what the browser says of a server that is away
        page.wait_for_selector("text=acknowledged by KL", timeout=WAIT_MS)

        push(daemon.ports["dicom"], series(6))
        wait_for_word(page, "PASS")
        page.wait_for_selector(".exam-item:has-text('Resolved by a repeat')", timeout=WAIT_MS)
        assert page.inner_text(".exam-item >> nth=0").startswith("Series 6")
        see_the_history(page, daemon)
        assert sight.errors == []
        assert "CANARY" not in told(page)
        assert STUDY not in told(page)
    except BaseException:
        print("\n".join(daemon.log.all[-60:]))
        raise
    finally:
        sight.close()
        daemon.stop()


def see_the_alert(page: Any) -> None:
    """The word, the advice, the numbers and the buttons."""
    wait_for_word(page, "RESCAN")
    assert page.is_visible(".light .lit.tone-rescan")
    assert "repeat" in page.inner_text(".advice").lower()
    assert "Predicted Dice" in page.inner_text(".dice")
    assert "Series 5" in page.inner_text(".meta")
    page.wait_for_selector(".ack:enabled", timeout=WAIT_MS)


def see_the_picture(page: Any) -> None:
    """The three planes of what was pushed, in its right orientation, with layers of the same size."""
    page.wait_for_selector(".stack", timeout=WAIT_MS)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.stack img:not([hidden])')].every((i) => i.naturalWidth > 0)",
        timeout=WAIT_MS,
    )
    entry = newest(page)
    for plane in ("axial", "coronal", "sagittal"):
        address = f"/pictures/{entry['result_id']}/{plane}.png"
        shown = page.request.get(page.url.rstrip("/") + address)
        assert shown.status == 200
        difference = np.abs(pixels(shown.body()) - expected_picture(entry["result"]["worst_slices"], plane))
        assert np.mean(difference) < 2.0, plane


def see_the_history(page: Any, daemon: Serving) -> None:
    """Both series stand in the physicist's view, and their numbers open."""
    page.goto(f"http://127.0.0.1:{daemon.ports['http']}/physicist")
    page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 2", timeout=WAIT_MS)
    page.click(".open-detail >> nth=1")
    page.wait_for_selector("#detail[open]")
    assert "RESCAN" in page.inner_text("#detail-title")
    assert "sha256" in page.inner_text("#detail")


def told(page: Any) -> str:
    """Everything that the page shows and was told."""
    fetched = page.evaluate(
        "() => Promise.all(['/api/state', '/api/history', '/api/trends', '/'].map((a) => fetch(a).then((x) => x.text())))"
    )
    return str(page.content()) + "".join(fetched)
