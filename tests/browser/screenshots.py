"""Pictures of the page, to be looked at: `python -m tests.browser.screenshots FOLDER`.

The scans are made up (the demo's anatomy, or a phantom where nilearn is not installed), the results written by hand: this
shows the page, not the student.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.page.store import Phase, Progress
from daemon.pictures import Pictures, draw
from daemon.prepare import prepare
from daemon.score import WorstSlice
from daemon.words import Volume
from tests.browser.browsing import CONSOLE, PHONE, WIDE, Sight, launched, served
from tests.browser.memory_store import MemoryStore, make_result
from tests.browser.phantom import head_maps, head_volume

DESK = {"width": 1440, "height": 900}
DAY_S = 86400.0
PLACES = (("axial", 62, "upper third of the head"), ("coronal", 72, "front third of the head"), ("sagittal", 52, ""))


def still_and_moving() -> tuple[Volume, Volume]:
    """One head, scanned twice: lying still, and nodding."""
    try:
        from daemon.demo.anatomy import AnatomyMissing, Stream, draw_head, head_seed
        from daemon.demo.artefacts import with_motion
        from daemon.demo.paint import paint

        seed = head_seed(Stream.DEMO, 0)
        still = paint(draw_head(seed), seed).volume
    except (ImportError, AnatomyMissing) as error:
        print(f"a phantom instead of the demo's head: {error}", file=sys.stderr)
        return head_volume(), head_volume()
    return still, with_motion(still)


def pictures_of(volume: Volume, artefact: str) -> Pictures:
    """Pictures with made-up uncertainty; an artefact that is none gives a calm picture."""
    prepared = prepare(volume)
    worst = [WorstSlice(plane, index, 0.0, 0.1, place) for plane, index, place in PLACES]
    return draw(volume, prepared, head_maps(prepared, artefact, (56, 76, 64)), worst)


def fill(store: MemoryStore, good: Pictures, bad: Pictures) -> None:
    """Two months of history, then one exam."""
    rng = random.Random(1)
    slugs = list(store.views)
    for day in range(60):
        verdict = rng.choices(["PASS", "REVIEW", "RESCAN", "CANNOT_JUDGE"], [82, 8, 7, 3])[0]
        result = make_result(verdict, rng.choice(slugs))
        scores = result["scores"]
        for name in scores:
            scores[name] *= 1 + rng.gauss(0, 0.012)
        at = time.time() - DAY_S * (60 - day)
        store.add(result, rng.randint(2, 12), "resolved" if verdict == "RESCAN" else "", good, at)
    for slug in slugs:
        store.put(slug, exam=())
    store.add(make_result("PASS"), 3, "", good, time.time() - 900)
    store.add(make_result("REVIEW"), 4, "", bad, time.time() - 480)


class Album:
    """Takes the pictures, one tab each."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self._browser, self._folder = browser, folder

    def take(
        self,
        name: str,
        address: str,
        viewport: dict[str, int] | None = None,
        act: Callable[[Any], object] | None = None,
        *,
        full: bool = False,
    ) -> None:
        sight = Sight(self._browser, viewport or CONSOLE, reduced_motion="reduce")
        page = sight.open(address)
        page.wait_for_selector(".verdict:visible, .idle:visible, .open-detail:visible")
        if act is not None:
            act(page)
        page.wait_for_function("() => [...document.images].every((i) => i.complete)")
        page.screenshot(path=self._folder / f"{name}.png", full_page=full)
        print(self._folder / f"{name}.png")
        sight.close()


def armed(page: Any) -> None:
    """Wait until a new alert's buttons may be pressed."""
    page.wait_for_selector(".ack:enabled")


def acknowledge(page: Any) -> None:
    """Press the first button and wait until it is written down."""
    page.click(".ack-rescanning:enabled")
    page.wait_for_selector(".acknowledged:visible")


def take_all(album: Album, good: Pictures, bad: Pictures) -> None:
    """Every state of both views."""
    store = MemoryStore("mr1")
    with served(store) as address:
        album.take("1-waiting", address)
        store.receive("mr1", Progress(Phase.RECEIVING, "s", 2, 31, 176, time.time()))
        album.take("1-receiving-phone", address, PHONE)
        store.receive("mr1", None)
        fill(store, good, bad)
        store.receive("mr1", Progress(Phase.RECEIVING, "s", 5, 96, 176, time.time()))
        album.take("2-review-receiving", address)
        store.add(make_result("PASS"), 5, "", good)
        album.take("3-pass", address)
        store.add(make_result("CANNOT_JUDGE"), 6)
        album.take("4-cannot-judge", address)
        store.add(make_result("RESCAN", final=False), 7, "raised", bad)
        album.take("5-rescan", address, act=armed)
        album.take("5-rescan-wide", address, WIDE, armed)
        album.take("5-rescan-phone", address, PHONE, armed, full=True)
        album.take("6-acknowledged", address, act=acknowledge)
        album.take("7-physicist", f"{address}/physicist", DESK)
        album.take("8-result", f"{address}/physicist", DESK, lambda page: page.click(".open-detail >> nth=0"))
        store.age_s = 9.0
        sight = Sight(album._browser)
        sight.page.goto(address)
        sight.page.wait_for_selector("#notlive", state="visible")
        sight.page.screenshot(path=album._folder / "9-not-live.png")
        sight.close()
    several = MemoryStore("mr1", "mr2", "mr3")
    with served(several) as address:
        fill(several, good, bad)
        several.add(make_result("PASS", "mr3"), 2, "", good)
        several.add(make_result("RESCAN", "mr2"), 7, "raised", bad)
        several.receive("mr1", Progress(Phase.JUDGING, "s", 5, 176, 176, time.time()))
        album.take("10-three-scanners", address, act=armed)


def main() -> None:
    """Take every picture."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.browser.screenshots FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    still, moving = still_and_moving()
    good, bad = pictures_of(still, "none"), pictures_of(moving, "motion")
    with launched() as browser:
        take_all(Album(browser, folder), good, bad)


if __name__ == "__main__":
    main()
