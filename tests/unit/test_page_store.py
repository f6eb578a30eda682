"""What the page is told by a real ledger: exams, alerts, acknowledgements, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import pictures
from daemon.alert import AckReason
from daemon.config import AlertMode, ScannerSettings, Settings
from daemon.ledger import Ledger
from daemon.page.store import AlertClosed, HistoryQuery, NoSuchAlert, Phase, Progress
from daemon.page_store import Board, Current, Store, pictures_folder
from tests.event_builders import START, reference, result

NOW = START + 100.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(tmp_path / "ledger.db", clock=lambda: NOW)
    yield found
    found.close()


@pytest.fixture
def world(tmp_path: Path, ledger: Ledger) -> tuple[Store, Ledger, Board]:
    scanners = (
        ScannerSettings("mr1", "MR1", "127.0.0.1", room="MR 1"),
        ScannerSettings("mr2", "MR2", "127.0.0.1", alerts=AlertMode.SHADOW),
    )
    settings = Settings(state=tmp_path, scanners=scanners)
    board = Board()
    return Store(lambda: settings, ledger, board, lambda: 0.5, lambda: ["why"], lambda: None), ledger, board


def exam(store: Store, scanner: int = 0) -> list[tuple[str, str]]:
    return [(e.result["verdict"], e.alert.state if e.alert else "") for e in list(store.scanners())[scanner].exam]


def test_configured_scanners_are_shown_before_they_send(world: tuple[Store, Ledger, Board]) -> None:
    """Room, shadow mode, nothing yet; the unknown caller only once it has sent."""
    store, ledger, _ = world
    assert [(v.slug, v.room, v.shadow, v.exam) for v in store.scanners()] == [
        ("mr1", "MR 1", False, ()),
        ("mr2", "mr2", True, ()),
    ]
    ledger.record(result("s9", "PASS", scanner="unknown"))
    assert [v.slug for v in store.scanners()] == ["mr1", "mr2", "unknown"]


def test_the_exam_holds_the_newest_result_of_each_series(world: tuple[Store, Ledger, Board]) -> None:
    """A final result takes the place of its provisional one; the newest series comes first."""
    store, ledger, _ = world
    ledger.record(result("s1", "PASS", final=False))
    ledger.record(result("s1", "PASS"))
    ledger.record(result("s2", "RESCAN", ended_at=START + 10))
    assert exam(store) == [("RESCAN", "raised"), ("PASS", "")]


def test_a_new_exam_clears_the_last_one_away(world: tuple[Store, Ledger, Board]) -> None:
    """As soon as the board names another exam, its series alone are shown."""
    store, ledger, board = world
    ledger.record(result("s1", "PASS", exam="e1"))
    board.show({"mr1": Current(reference("e2"), None)})
    assert exam(store) == []


def test_an_alert_that_waits_is_shown_whatever_exam_it_is_of(world: tuple[Store, Ledger, Board]) -> None:
    """Of a caller that no scanner claims no exam ends another's alerts; the page still shows them."""
    store, ledger, _ = world
    ledger.record(result("s1", "RESCAN", exam="e1", scanner="unknown"))
    ledger.record(result("s2", "PASS", exam="e2", scanner="unknown", ended_at=START + 10))
    assert exam(store, 2) == [("PASS", ""), ("RESCAN", "raised")]


def test_every_change_changes_the_version(world: tuple[Store, Ledger, Board]) -> None:
    """A result, an acknowledgement and progress each do; asking does not."""
    store, ledger, board = world
    seen = [store.version()]
    ledger.record(result("s1", "RESCAN"))
    seen.append(store.version())
    alert = store.scanners()[0].exam[0].alert
    assert alert is not None
    store.acknowledge(alert.alert_id, AckReason.WRONG, "KL")
    seen.append(store.version())
    board.show({"mr1": Current(reference("e1"), Progress(Phase.RECEIVING, "s", 6, 3, 176, NOW))})
    seen.append(store.version())
    store.scanners()
    assert store.version() == seen[-1]
    assert len(set(seen)) == 4


def test_an_acknowledgement_is_told_with_reason_and_name(world: tuple[Store, Ledger, Board]) -> None:
    """And refused for an alert that is unknown or has ended."""
    store, ledger, _ = world
    ledger.record(result("s1", "RESCAN"))
    alert = store.scanners()[0].exam[0].alert
    assert alert is not None
    assert "grey matter" in alert.not_concluded
    store.displayed(alert.alert_id)
    store.acknowledge(alert.alert_id, AckReason.RESCANNING, "KL")
    after = store.scanners()[0].exam[0].alert
    assert after is not None
    assert (after.state, after.reason, after.by, after.acknowledged_at) == ("acknowledged", "rescanning", "KL", NOW)
    ledger.record(result("s2", "PASS", ended_at=START + 10))
    assert exam(store) == [("PASS", ""), ("RESCAN", "resolved")]
    with pytest.raises(AlertClosed):
        store.acknowledge(alert.alert_id, AckReason.WRONG, "KL")
    for call in (store.displayed, lambda a: store.acknowledge(a, AckReason.WRONG, "KL")):
        with pytest.raises(NoSuchAlert):
            call("none")


def test_history_and_facets_come_from_the_ledger(world: tuple[Store, Ledger, Board]) -> None:
    """Filtered by scanner, rule and verdict, newest first."""
    store, ledger, _ = world
    ledger.record(result("s1", "PASS", rule="t1"))
    ledger.record(result("s2", "RESCAN", rule="t1-fast", scanner="mr2", shadow=True))

    def found(**query: Any) -> list[str]:
        return [e.result["verdict"] for e in store.history(HistoryQuery(**query))]

    assert found() == ["RESCAN", "PASS"]
    assert found(scanner="mr1") == ["PASS"]
    assert found(protocol="t1-fast") == ["RESCAN"]
    assert found(verdict="PASS", limit=1) == ["PASS"]
    assert store.facets().scanners == ("mr1", "mr2")


def test_pictures_are_found_by_the_name_that_the_result_gives(
    world: tuple[Store, Ledger, Board], tmp_path: Path
) -> None:
    """Manifest with the entry, PNG by name; nothing for a result without pictures."""
    store, ledger, _ = world
    folder = pictures_folder(Settings(state=tmp_path))
    pictures.write(pictures.Pictures({"axial.png": b"png"}, {"planes": []}), folder, "abc")
    body = {**result("s1", "PASS"), "pictures": "abc"}
    ledger.record(body)
    ledger.record(result("s2", "PASS"))
    with_pictures = store.entry(body["id"])
    assert with_pictures is not None
    assert with_pictures.pictures == {"planes": []}
    assert store.picture(body["id"], "axial.png") == b"png"
    assert store.picture(body["id"], "../ledger.db") is None
    assert store.picture(result("s2", "PASS")["id"], "axial.png") is None
    assert store.entry("none") is None
