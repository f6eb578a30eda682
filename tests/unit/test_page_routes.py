"""The page's addresses over a store in memory."""

from __future__ import annotations

import json

import pytest

from daemon import NOTICE
from daemon.alert import AckReason
from tests.browser.client import PageClient
from tests.browser.memory_store import MemoryStore, make_result
from tests.browser.phantom import head_pictures


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("mr1", "mr2")


@pytest.fixture
def client(store: MemoryStore) -> PageClient:
    return PageClient(store)


def say(client: PageClient, path: str, body: object) -> tuple[int, str]:
    csrf = client.get("/api/state").json()["csrf"]
    answer = client.post(path, json=body, headers={"x-rescan-csrf": csrf})
    return answer.status_code, answer.text


def test_both_views_carry_the_notice(client: PageClient) -> None:
    """The sentence that this is no medical device stands on every document."""
    for path in ("/", "/physicist"):
        assert NOTICE in client.get(path).text.replace("&#x27;", "'")


def test_the_state_tells_every_scanner(client: PageClient, store: MemoryStore) -> None:
    """Each scanner with its exam, newest first, and its open alert."""
    store.add(make_result("PASS"), 3)
    store.add(make_result("RESCAN"), 4, alert="raised")
    state = client.get("/api/state").json()
    assert [s["slug"] for s in state["scanners"]] == ["mr1", "mr2"]
    exam = state["scanners"][0]["exam"]
    assert [(e["series_number"], e["result"]["verdict"]) for e in exam] == [(4, "RESCAN"), (3, "PASS")]
    assert exam[0]["alert"]["state"] == "raised"


def test_the_state_follows_the_store(client: PageClient, store: MemoryStore) -> None:
    """What is kept between requests is thrown away when the version changes."""
    assert client.get("/api/state").json()["scanners"][0]["exam"] == []
    store.add(make_result("PASS"), 3)
    assert len(client.get("/api/state").json()["scanners"][0]["exam"]) == 1


@pytest.mark.parametrize("reason", list(AckReason))
def test_an_acknowledgement_is_recorded(client: PageClient, store: MemoryStore, reason: AckReason) -> None:
    """Reason and name reach the store."""
    store.add(make_result("RESCAN"), 4, alert="raised")
    assert say(client, "/api/alerts/alert-1/acknowledge", {"reason": reason, "by": " AB\n"})[0] == 200
    assert store.acknowledged == [("alert-1", reason, "AB")]


@pytest.mark.parametrize("body", [{}, {"reason": "bored"}, [], None, {"reason": None}, {"reason": {}}, 5, "x"])
def test_an_acknowledgement_without_a_known_reason_is_refused(
    client: PageClient, store: MemoryStore, body: object
) -> None:
    """Anything but one of the four reasons is a 400 that names them."""
    store.add(make_result("RESCAN"), 4, alert="raised")
    status, text = say(client, "/api/alerts/alert-1/acknowledge", body)
    assert status == 400
    assert "patient_cannot" in text
    assert store.acknowledged == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 4000, b'{"a":' * 800, b'{"reason": NaN}', b"1" * 4000, b'{"reason": "\\ud800"}'],
    ids=["empty", "cut", "not text", "deep list", "deep object", "not a number", "long number", "half a surrogate"],
)
def test_an_acknowledgement_that_is_no_json_is_refused(client: PageClient, store: MemoryStore, body: bytes) -> None:
    """Whatever it is, the answer is a 400 with a word, and nothing is recorded."""
    store.add(make_result("RESCAN"), 4, alert="raised")
    csrf = client.get("/api/state").json()["csrf"]
    answer = client.post("/api/alerts/alert-1/acknowledge", content=body, headers={"x-rescan-csrf": csrf})
    assert answer.status_code == 400
    assert "patient_cannot" in answer.text
    assert store.acknowledged == []


def test_a_verdict_can_be_asked_for_now(client: PageClient, store: MemoryStore) -> None:
    """Of a scanner that there is."""
    assert say(client, "/api/scanners/mr1/score-now", {})[0] == 200
    assert store.asked == ["mr1"]
    for name in ("mr9", "..", "a%2fb", "%00", "x" * 500):
        assert say(client, f"/api/scanners/{name}/score-now", {})[0] == 404


def test_tables_are_exported_with_the_filters_of_the_view(client: PageClient, store: MemoryStore) -> None:
    """As a file to keep, never shown by the browser; another name is 404."""
    for n, verdict in enumerate(["PASS", "RESCAN", "PASS"]):
        store.add(make_result(verdict), n, at=float(n))
    answer = client.get("/export/verdicts.csv?verdict=PASS")
    assert answer.text == "result_id,verdict\nresult-1,PASS\nresult-3,PASS\n"
    assert answer.headers["content-disposition"] == 'attachment; filename="rescan-verdicts.csv"'
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["cache-control"] == "no-store"
    assert client.get("/export/ledger.csv").status_code == 404
    assert client.get("/export/..%2fverdicts.csv").status_code == 404


def test_an_alert_that_is_closed_or_unknown_cannot_be_acknowledged(client: PageClient, store: MemoryStore) -> None:
    """409 and 404, with the reason for the person."""
    store.add(make_result("RESCAN"), 4, alert="resolved")
    status, text = say(client, "/api/alerts/alert-1/acknowledge", {"reason": "wrong"})
    assert (status, "resolved" in text) == (409, True)
    assert say(client, "/api/alerts/nothing/acknowledge", {"reason": "wrong"})[0] == 404


def test_a_body_that_is_too_long_is_refused(client: PageClient) -> None:
    """Nobody fills the memory through the acknowledgement."""
    assert say(client, "/api/alerts/a/acknowledge", {"reason": "wrong", "by": "x" * 10_000})[0] == 400


def test_who_showed_an_alert_first_is_told(client: PageClient, store: MemoryStore) -> None:
    """The page says that it shows an alert."""
    store.add(make_result("RESCAN"), 4, alert="raised")
    assert say(client, "/api/alerts/alert-1/displayed", {})[0] == 200
    assert store.shown == ["alert-1"]


def test_history_is_filtered(client: PageClient, store: MemoryStore) -> None:
    """By scanner, protocol, verdict and time; nonsense filters nothing."""
    for n, (scanner, verdict) in enumerate([("mr1", "PASS"), ("mr1", "RESCAN"), ("mr2", "PASS")]):
        store.add(make_result(verdict, scanner), n, at=float(n))

    def found(query: str) -> list[int]:
        return [e["series_number"] for e in client.get(f"/api/history?{query}").json()["entries"]]

    assert found("") == [2, 1, 0]
    assert found("scanner=mr1") == [1, 0]
    assert found("verdict=PASS") == [2, 0]
    assert found("since=1&until=2") == [1]
    assert found("limit=1") == [2]
    assert found("limit=nan&since=inf&until=x") == [2, 1, 0]
    assert client.get("/api/history").json()["scanners"] == ["mr1", "mr2"]


def test_trends_are_told_and_an_unknown_metric_refused(client: PageClient, store: MemoryStore) -> None:
    """One chart per scanner and protocol."""
    store.add(make_result("PASS"), 3)
    assert client.get("/api/trends?metric=snr").json()["trends"][0]["points"][0]["value"] == 9.8
    assert client.get("/api/trends?metric=colour").status_code == 400


def test_one_result_is_told_whole(client: PageClient, store: MemoryStore) -> None:
    """Every number of the result object, and 404 for another."""
    entry = store.add(make_result("PASS"), 3)
    assert client.get(f"/api/results/{entry.result_id}").json()["result"] == json.loads(json.dumps(entry.result))
    assert client.get("/api/results/none").status_code == 404


def test_pictures_are_sent_and_never_kept_by_the_browser(client: PageClient, store: MemoryStore) -> None:
    """A picture is PNG, not stored; a name that is no picture is not looked for."""
    entry = store.add(make_result("RESCAN"), 4, pictures=head_pictures())
    answer = client.get(f"/pictures/{entry.result_id}/axial-motion.png")
    assert answer.content.startswith(b"\x89PNG")
    assert answer.headers["cache-control"] == "no-store"
    for path in (
        "none/axial.png",
        f"{entry.result_id}/pictures.json",
        f"{entry.result_id}/..%2f..%2fledger.db",
        f"{entry.result_id}/..%2faxial.png",
        f"{entry.result_id}/axial.png%00",
        f"{entry.result_id}/%2e%2e/%2e%2e/site.key",
        "..%2f/axial.png",
        "%2e%2e/axial.png",
        ".%2f../axial.png",
    ):
        assert client.get(f"/pictures/{path}").status_code == 404


def test_files_are_asked_for_again_and_sent_once(client: PageClient) -> None:
    """A new daemon's page is never mixed with an old one's files; an unchanged file is a 304."""
    answer = client.get("/static/page.css")
    assert answer.headers["cache-control"] == "no-cache"
    assert client.get("/static/page.css", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert client.get("/static/index.html").status_code == 404
    assert client.get("/static/..%2froutes.py").status_code == 404
