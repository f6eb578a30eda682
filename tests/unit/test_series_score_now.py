"""A person who waits at a scanner: from the page's address to the question that the assembly is asked."""

from __future__ import annotations

from daemon.page_store import Board
from tests.browser.client import PageClient
from tests.browser.memory_store import MemoryStore
from tests.unit.test_flow import Table


def test_the_address_reaches_the_store_and_knows_its_scanners() -> None:
    """A configured scanner is noted, another is not found, and a form from elsewhere is refused."""
    store = MemoryStore("mr1", "mr2")
    client = PageClient(store)
    csrf = client.get("/api/state").json()["csrf"]
    headers = {"x-rescan-csrf": csrf}
    assert client.post("/api/scanners/mr2/score-now", json={}, headers=headers).status_code == 200
    assert client.post("/api/scanners/mr9/score-now", json={}, headers=headers).status_code == 404
    assert client.post("/api/scanners/mr1/score-now", json={}, headers={}).status_code == 403
    assert store.asked == ["mr2"]


def test_a_question_is_asked_once() -> None:
    """The main loop takes it from the board; pressing twice asks once."""
    board = Board()
    board.wait_at("mr1")
    board.wait_at("mr1")
    assert board.take_waiting() == {"mr1"}
    assert board.take_waiting() == set()


def test_what_has_come_is_judged_at_once_for_the_scanner_that_asks() -> None:
    """Half a series, no silence: asked for by its scanner it is scored, provisionally; by another it is not."""
    table = Table()
    table.arrive(range(70))
    table.write(table.flow.score_now("mr9", table.now))
    assert table.flow.next_job() is None
    table.write(table.flow.score_now("unknown", table.now))
    table.score()
    (result,) = table.book.results
    assert (result["final"], result["evidence"]["completeness"], result["evidence"]["instances"]) == (
        False,
        "score_now",
        70,
    )
