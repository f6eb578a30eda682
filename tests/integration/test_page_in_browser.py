"""The page in a real Chromium, over a real socket; only the store behind it is in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.alert import AckReason
from daemon.page.guard import Access
from daemon.page.store import Phase, Progress
from tests.browser.browsing import CONSOLE, PHONE, WIDE, Sight, launched, served
from tests.browser.memory_store import MemoryStore, make_result
from tests.browser.phantom import head_pictures

NOT_LIVE_S = 6.0
"""What the page promises: after so long without a sign of life it says so."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pictures() -> Any:
    return head_pictures()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("mr1")


@pytest.fixture
def address(store: MemoryStore) -> Iterator[str]:
    with served(store) as found:
        yield found


@pytest.fixture
def sight(browser: Any, address: str) -> Iterator[Sight]:
    """A tab that must not have complained at the end."""
    tab = Sight(browser)
    yield tab
    errors = tab.errors
    tab.close()
    assert errors == []


def word(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('.word')?.textContent === text", arg=text)


def test_an_alert_appears_with_reason_place_advice_cost_and_pictures(
    sight: Sight, store: MemoryStore, address: str, pictures: Any
) -> None:
    """A verdict that comes while the page is open is shown at once, whole, and its first display is told."""
    page = sight.open(address)
    assert page.is_visible("text=Waiting for a series")
    store.receive("mr1", Progress(Phase.RECEIVING, "s", 7, 88, 176, time.time()))
    page.wait_for_selector("text=Receiving series 7 · 88 of 176")
    assert page.eval_on_selector(".bar-progress", "bar => bar.value") == 0.5
    store.add(make_result("RESCAN", final=False), 7, alert="raised", pictures=pictures)
    word(page, "RESCAN")
    assert page.inner_text(".headline") == "Motion, upper third of the head"
    assert "pad the head" in page.inner_text(".advice")
    assert "Repeating it takes 5\u00a0min\u00a012\u00a0s." in page.inner_text(".advice")
    assert "provisional" in page.inner_text(".meta")
    assert "0.74 (0.68 to 0.78)" in page.inner_text(".dice")
    assert "0.88" in page.inner_text(".dice")
    assert "Only grey matter is judged" in page.inner_text(".small")
    assert page.is_visible(".light .lit.tone-rescan")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.planes img:not([hidden])')].every((i) => i.naturalWidth > 0)"
    )
    assert page.title() == "RESCAN · MR 1"
    assert store.shown == ["alert-1"]


def test_layers_lie_on_the_picture_and_follow_chips_slider_and_planes(
    sight: Sight, store: MemoryStore, address: str, pictures: Any
) -> None:
    """The dominant artefact is shown first; a chip, the slider, the outline and a plane change it without a reload."""
    store.add(make_result("RESCAN"), 7, alert="raised", pictures=pictures)
    page = sight.open(address)
    source = "() => document.querySelector('.main-plane .layer').getAttribute('src')"
    assert page.evaluate(source).endswith("/axial-motion.png")
    box = "s => JSON.stringify(document.querySelector(s).getBoundingClientRect())"
    assert page.evaluate(box, ".main-plane img") == page.evaluate(box, ".main-plane .layer")
    page.click(".chip:has-text('Noise')")
    assert page.evaluate(source).endswith("/axial-noise.png")
    assert page.evaluate("document.activeElement.textContent").startswith("Noise")
    page.fill(".opacity input", "20")
    assert page.eval_on_selector_all(".layer", "all => all.map((i) => i.style.opacity)") == ["0.2"] * 3
    page.click(".chip:has-text('Outline')")
    assert page.is_visible(".main-plane .outline")
    page.click("[data-plane=coronal]")
    assert page.evaluate(source).endswith("/coronal-noise.png")
    page.eval_on_selector_all("img", "all => Promise.all(all.map((i) => i.decode()))")


def test_an_alert_is_acknowledged_by_keyboard_and_may_be_changed(
    sight: Sight, store: MemoryStore, address: str
) -> None:
    """Tab, initials, Tab, Enter; the buttons go and the page says who said what; Change brings them back."""
    store.add(make_result("RESCAN"), 7, alert="raised")
    page = sight.open(address)
    page.wait_for_selector(".ack:enabled")
    page.focus(".by input")
    page.keyboard.type("KL")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Good enough · acknowledged by KL")
    assert [(a, str(r), by) for a, r, by in store.acknowledged] == [("alert-1", "acceptable", "KL")]
    assert not page.is_visible(".ack-grid")
    page.click("text=Change")
    page.click(".ack-rescanning")
    page.wait_for_selector("text=Repeating it · acknowledged by KL")
    page.wait_for_selector("#toast:has-text('Recorded')")


def test_an_alert_that_ended_meanwhile_says_so(sight: Sight, store: MemoryStore, address: str) -> None:
    """The daemon refuses, and the person is told why; nothing looks recorded."""
    store.add(make_result("RESCAN"), 7, alert="raised")
    page = sight.open(address)
    page.wait_for_selector(".ack:enabled")
    store.past = []
    page.click(".ack-wrong")
    page.wait_for_selector("#toast:has-text('Not recorded. No alert alert-1')")
    assert sight.errors
    sight.errors.clear()  # the browser itself logs the 404


def test_a_repeat_that_passes_takes_the_place_of_the_alert(sight: Sight, store: MemoryStore, address: str) -> None:
    """The newest result is large, the earlier one stands in the exam as resolved and can be looked at again."""
    store.add(make_result("RESCAN"), 7, alert="raised")
    page = sight.open(address)
    word(page, "RESCAN")
    store.add(make_result("PASS"), 8)
    page.wait_for_selector(".exam-item:has-text('Series 8')")
    word(page, "RESCAN")
    store.change_alert("alert-1", state="resolved")
    word(page, "PASS")
    page.wait_for_selector(".exam-item:has-text('Resolved by a repeat')")
    page.click(".exam-item:has-text('Series 7')")
    word(page, "RESCAN")
    page.click("text=Back to now")
    word(page, "PASS")


def test_a_stopped_heart_is_seen_within_six_seconds_and_its_return_too(
    sight: Sight, store: MemoryStore, address: str
) -> None:
    """The web server answers, the main loop does not: NOT LIVE, grey, no buttons; and back by itself."""
    store.add(make_result("RESCAN"), 7, alert="raised")
    page = sight.open(address)
    page.wait_for_selector(".ack:enabled")
    began = time.monotonic()
    store.age_s = 3.0  # two missed heartbeats, and no more from now on
    stop = time.monotonic()
    while not page.is_visible("#notlive"):
        store.age_s = 3.0 + time.monotonic() - stop
        assert time.monotonic() - began < NOT_LIVE_S
        page.wait_for_timeout(50)
    assert page.inner_text(".notlive-word") == "NOT LIVE"
    assert page.title().startswith("NOT LIVE")
    assert "grayscale" in page.eval_on_selector("main", "m => getComputedStyle(m).filter")
    page.wait_for_selector(".ack:disabled")
    store.age_s = 0.1
    page.wait_for_selector("#notlive", state="hidden", timeout=3000)
    page.wait_for_selector(".ack:enabled")


def test_a_reason_for_no_verdicts_is_shown(sight: Sight, store: MemoryStore, address: str) -> None:
    """Live, but not ready: the page says why no verdict would come."""
    page = sight.open(address)
    store.reasons = ["the model is being loaded and checked"]
    page.wait_for_selector("#notready:has-text('the model is being loaded')")
    store.reasons = []
    page.wait_for_selector("#notready", state="hidden")


def test_among_scanners_a_new_alert_comes_forward_but_never_under_a_hand(browser: Any) -> None:
    """A new alert is shown; while it waits for a decision a second one does not push it away."""
    store = MemoryStore("mr1", "mr2", "mr3")
    store.add(make_result("PASS", "mr1"), 2)
    with served(store) as address:
        sight = Sight(browser)
        page = sight.open(address)
        word(page, "PASS")
        store.add(make_result("RESCAN", "mr2"), 5, alert="raised")
        page.wait_for_selector(".room:has-text('MR 2')")
        assert page.eval_on_selector(".ack", "b => b.disabled"), "a button under a falling finger is not armed at once"
        store.add(make_result("RESCAN", "mr3"), 6, alert="raised")
        page.wait_for_selector(".tile[data-slug=mr3][data-open=yes]")
        assert page.inner_text(".room") == "MR 2"
        page.click(".tile[data-slug=mr3]")
        page.wait_for_selector(".room:has-text('MR 3')")
        assert sight.errors == []
        sight.close()


def test_shadow_results_are_not_raised_to_people(sight: Sight, store: MemoryStore, address: str) -> None:
    """A RESCAN in shadow mode shows no verdict, reason, picture or button."""
    store.put("mr1", shadow=True)
    store.add(make_result("RESCAN", shadow=True), 7)
    page = sight.open(address)
    word(page, "RECORDED")
    text = page.inner_text("main")
    assert "RESCAN" not in text
    assert "Motion" not in text
    assert not page.is_visible(".ack-grid")


def test_text_from_outside_stays_text(sight: Sight, store: MemoryStore, address: str) -> None:
    """Markup in a sentence is shown as it is and does nothing."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    result = make_result("CANNOT_JUDGE", reasons=[{"code": "x", "text": evil}], advice=[{"code": "x", "text": evil}])
    store.put("mr1", room=evil)
    store.add(result, 7)
    page = sight.open(address)
    assert page.inner_text(".headline") == evil
    assert page.inner_text(".room") == evil
    page.goto(f"{address}/physicist")
    page.click(".open-detail")
    page.wait_for_selector(f"#detail li:has-text({evil!r})")


@pytest.mark.parametrize("viewport", [CONSOLE, PHONE, WIDE], ids=["console", "phone", "wide"])
def test_it_fits_the_screen_and_the_fingers(
    browser: Any, store: MemoryStore, address: str, pictures: Any, viewport: dict[str, int]
) -> None:
    """No sideways scrolling; controls of at least 44 pixels; at the console everything that matters without scrolling."""
    store.add(make_result("RESCAN"), 7, alert="raised", pictures=pictures)
    sight = Sight(browser, viewport)
    page = sight.open(address)
    page.wait_for_selector(".ack")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    sizes = page.eval_on_selector_all(
        ".ack, .chip, .stack, .exam-item", "all => all.map((b) => [b.offsetWidth, b.offsetHeight])"
    )
    assert min(min(size) for size in sizes) >= 44
    if viewport["width"] >= 1024:
        letters = page.eval_on_selector(".word", "w => parseFloat(getComputedStyle(w).fontSize)")
        assert letters >= 64, "a capital of 45 px is 15 mm on a 17-inch console: one 200th of three metres"
        for selector in (".word", ".headline", ".advice", ".ack-wrong", ".opacity", ".dice"):
            assert page.eval_on_selector(selector, "e => e.getBoundingClientRect().bottom") <= viewport["height"]
    assert sight.errors == []
    sight.close()


@pytest.mark.parametrize("viewport", [CONSOLE, PHONE], ids=["console", "phone"])
def test_no_serious_barrier(
    browser: Any, store: MemoryStore, address: str, pictures: Any, viewport: dict[str, int]
) -> None:
    """axe-core finds nothing serious: waiting, alert, acknowledged, not live, history, one result."""
    sight = Sight(browser, viewport, reduced_motion="reduce")
    page = sight.open(address)
    found = {"waiting": sight.violations()}
    for verdict, number in (("PASS", 5), ("REVIEW", 6), ("CANNOT_JUDGE", 7), ("RESCAN", 8)):
        store.add(make_result(verdict), number, alert="raised" if verdict == "RESCAN" else "", pictures=pictures)
        word(page, verdict.replace("_", " "))
        page.wait_for_selector(".ack:enabled") if verdict == "RESCAN" else None
        found[verdict] = sight.violations()
    page.click(".ack-rescanning")
    page.wait_for_selector("#toast", state="visible")
    found["acknowledged"] = sight.violations()
    page.goto(f"{address}/physicist")
    page.wait_for_selector(".open-detail")
    found["physicist"] = sight.violations()
    page.click(".open-detail")
    page.wait_for_selector("#detail[open]")
    found["detail"] = sight.violations()
    sight.close()
    assert {where: what for where, what in found.items() if what} == {}


def test_the_physicist_filters_compares_and_opens(
    sight: Sight, store: MemoryStore, address: str, pictures: Any
) -> None:
    """Filters narrow table and charts, limits are drawn, a result opens with every number and its pictures."""
    for n in range(12):
        result = make_result("RESCAN" if n == 7 else "PASS")
        result["scores"]["predicted_dice"] += 0.001 * (-1) ** n
        store.add(result, n, at=time.time() - 86400 * (12 - n), pictures=pictures)
    page = sight.open(f"{address}/physicist")
    page.wait_for_selector(".trend .limit", state="attached")
    assert page.locator("tbody tr").count() == 12
    assert page.locator(".point .outside").count() == 1
    page.select_option("[name=verdict]", "RESCAN")
    page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 1")
    page.focus(".open-detail")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    text = page.inner_text("#detail")
    for part in (
        "gm volume ml",
        "612",
        "σ² 0.039",
        "t1-head",
        "openvino",
        "dice_below_required",
        "last instance to verdict",
    ):
        assert part in text
    page.wait_for_function(
        "() => [...document.querySelectorAll('#detail .stack img:not([hidden])')].every((i) => i.naturalWidth)"
    )
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    page.click("text=Clear")
    page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 12")


@pytest.mark.parametrize("how", ["keyboard", "touch"])
def test_a_person_who_cannot_wait_asks_for_the_verdict_now(
    browser: Any, store: MemoryStore, address: str, how: str
) -> None:
    """While a series comes: one button, large enough for a finger; it asks once, and is gone with the series."""
    sight = Sight(browser, PHONE if how == "touch" else CONSOLE, has_touch=how == "touch")
    page = sight.open(address)
    assert not page.is_visible(".score-now")
    store.receive("mr1", Progress(Phase.RECEIVING, "s", 7, 88, 176, time.time()))
    page.wait_for_selector(".score-now:enabled")
    box = page.eval_on_selector(".score-now", "b => b.getBoundingClientRect()")
    assert min(box["width"], box["height"]) >= 44
    if how == "touch":
        page.tap(".score-now")
    else:
        for _ in range(8):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.className") == "score-now":
                break
        page.keyboard.press("Enter")
    page.wait_for_selector(".score-now:has-text('Asked')")
    page.wait_for_selector("#toast:has-text('Asked for the verdict')")
    assert store.asked == ["mr1"]
    store.receive("mr1", Progress(Phase.RECEIVING, "s", 7, 90, 176, time.time()))
    page.wait_for_selector("text=90 of 176")
    assert page.is_disabled(".score-now"), "asked once for this series"
    store.receive("mr1", Progress(Phase.JUDGING, "s", 7, 90, 176, time.time()))
    page.wait_for_selector(".score-now", state="hidden")
    store.receive("mr1", Progress(Phase.RECEIVING, "t", 8, 1, 176, time.time()))
    page.wait_for_selector(".score-now:enabled")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert sight.errors == []
    sight.close()


def test_nothing_that_is_told_becomes_markup(sight: Sight, store: MemoryStore, address: str) -> None:
    """Whatever a header, a configuration or a person writes is shown as it is, in both views; no script runs."""
    bad = "<img src=x onerror=window.broken=1><script>window.broken=1</script>{{notice}}"
    told = {"code": bad, "text": bad}
    result = make_result("RESCAN", reasons=[told], advice=[told], dominant_artefact=None, series_ref=bad)
    result |= {"model": {"name": bad, "version": bad, "sha256": bad}, "policy": {"rule": bad, "calibration": bad}}
    result |= {"evidence": {bad: bad}, "worst_slices": [{"plane": "axial", "place": bad}]}
    entry = store.add(result, 7, alert="raised", not_concluded=bad)
    store.put("mr1", room=bad)
    store.acknowledge(entry.alert.alert_id, AckReason.WRONG, bad)
    store.reasons = [bad]
    page = sight.open(address)
    page.wait_for_selector("#notready:not([hidden])")
    assert bad in page.inner_text(".room")
    assert bad in page.inner_text(".advice")
    page.goto(f"{address}/physicist")
    page.click(".open-detail")
    page.wait_for_selector("#detail[open]")
    assert bad in page.inner_text("#detail")
    assert page.evaluate("window.broken") is None
    assert page.locator("img[src=x]").count() == 0


def test_the_history_is_exported_as_it_is_filtered(sight: Sight, store: MemoryStore, address: str) -> None:
    """The links carry the filters; the browser saves a file."""
    for n, verdict in enumerate(["PASS", "RESCAN", "PASS"]):
        store.add(make_result(verdict), n, at=time.time() - n)
    page = sight.open(f"{address}/physicist")
    page.wait_for_selector(".open-detail")
    page.select_option("[name=verdict]", "PASS")
    page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 2")
    page.focus("#export a[data-table=verdicts]")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "rescan-verdicts.csv"
    assert Path(download.value.path()).read_text().splitlines() == [
        "result_id,verdict",
        "result-3,PASS",
        "result-1,PASS",
    ]


def test_a_token_opens_the_page_once(browser: Any, store: MemoryStore) -> None:
    """Log in, see, acknowledge; the cookie is out of reach of scripts."""
    store.add(make_result("RESCAN"), 7, alert="raised")
    with served(store, Access(token="correct horse battery", encrypted=False)) as address:
        sight = Sight(browser)
        page = sight.page
        page.goto(address)
        assert "/login" in page.url
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=That is not the token.")
        barriers = sight.violations()
        page.fill("#token", "correct horse battery")
        page.keyboard.press("Enter")
        page.wait_for_selector("#live[data-state=live]")
        assert page.evaluate("document.cookie") == ""
        page.click(".ack-rescanning")
        page.wait_for_selector("#toast:has-text('Recorded')")
        sight.close()
    assert barriers == []
