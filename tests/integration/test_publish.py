"""Live events, replay and acknowledgement over real sockets, spoken with plain pyzmq as anyone might."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from daemon.config import ConfigError, EventsSettings
from daemon.events import STREAMS
from daemon.keys import KeyStore, Role, new_pair, read_pair
from daemon.ledger import Ledger
from daemon.publish import REPLAY_EVENTS, Publisher
from tests.event_builders import result

ANY = "tcp://127.0.0.1:0"
LIMIT_MS = 30_000


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with contextlib.closing(Ledger(tmp_path / "ledger.db")) as made:
        yield made


@pytest.fixture
def publisher(ledger: Ledger) -> Iterator[Publisher]:
    made = Publisher(EventsSettings(publish=ANY, replay=ANY, heartbeat_s=0.1), ledger)
    made.start()
    yield made
    made.stop()


class Sockets:
    """Opens sockets and closes them all."""

    def __init__(self) -> None:
        self._context: Sockets = zmq.Context()
        self._opened: list[zmq.Socket[Any]] = []

    def socket(self, kind: int) -> zmq.Socket[Any]:
        self._opened.append(self._context.socket(kind))
        return self._opened[-1]

    def close(self) -> None:
        for each in self._opened:
            each.close(linger=0)
        self._context.term()


@pytest.fixture
def context() -> Iterator[Sockets]:
    with contextlib.closing(Sockets()) as made:
        yield made


Asker = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(publisher: Publisher, context: Sockets) -> Asker:
    return asker(publisher, context)


def asker(publisher: Publisher, context: Sockets, *, pair: Any = None, server: bytes = b"") -> Asker:
    dealer = context.socket(zmq.DEALER)
    protect(dealer, pair, server)
    dealer.connect(f"tcp://127.0.0.1:{publisher.replay_port}")

    def say(raw: bytes | None = None, **request: Any) -> dict[str, Any]:
        dealer.send(json.dumps(request).encode() if raw is None else raw)
        assert dealer.poll(LIMIT_MS), "no answer"
        answer = json.loads(dealer.recv())
        assert isinstance(answer, dict)
        return answer

    return say


def protect(each: zmq.Socket[Any], pair: Any, server: bytes) -> None:
    if pair is not None:
        each.curve_serverkey, each.curve_publickey, each.curve_secretkey = server, pair.public, pair.secret


def subscriber(
    publisher: Publisher, context: Sockets, topic: bytes = b"", pair: Any = None, server: bytes = b""
) -> zmq.Socket[Any]:
    """A SUB socket that is known to receive."""
    sub = context.socket(zmq.SUB)
    protect(sub, pair, server)
    sub.subscribe(topic)
    sub.subscribe(b"v1/heartbeat/")
    sub.connect(f"tcp://127.0.0.1:{publisher.publish_port}")
    assert sub.poll(LIMIT_MS), "no heartbeat"
    return sub


def until(sub: zmq.Socket[Any], topic: bytes) -> dict[str, Any]:
    """The next event of a topic."""
    for _ in range(10_000):
        assert sub.poll(LIMIT_MS), f"nothing on {topic!r}"
        frames = sub.recv_multipart()
        assert len(frames) == 2
        if frames[0].startswith(topic):
            found: dict[str, Any] = json.loads(frames[1])
            return found
    raise AssertionError(f"nothing on {topic!r}")


def test_a_result_arrives_as_two_frames(ledger: Ledger, publisher: Publisher, context: Sockets) -> None:
    """Topic and CloudEvents body; what was sent is what the log holds."""
    sub = subscriber(publisher, context, b"v1/score/mr1/")
    ledger.record(result())
    publisher.wake()
    event = until(sub, b"v1/score/")
    assert event == json.loads(ledger.events_after("score", 0, 1)[0].body)
    assert (event["stream"], event["sequence"], event["epoch"]) == ("score", 1, ledger.epoch)


def test_without_a_wake_up_it_arrives_too(ledger: Ledger, publisher: Publisher, context: Sockets) -> None:
    """The log is looked at; a lost wake-up costs half a second, not an event."""
    sub = subscriber(publisher, context, b"v1/alert/")
    ledger.record(result())
    assert until(sub, b"v1/alert/mr1/")["data"]["state"] == "raised"


def test_the_heartbeat_tells_the_last_sequences(ledger: Ledger, publisher: Publisher, context: Sockets) -> None:
    """Of every stream, and whether a verdict would come; never ahead of what was sent."""
    sub = subscriber(publisher, context)
    ledger.record(result())
    publisher.wake()
    sent = 0
    while True:
        frames = sub.recv_multipart()
        body = json.loads(frames[1])
        sent = max(sent, body.get("sequence", 0) if body.get("stream") == "score" else 0)
        if frames[0] == b"v1/heartbeat/":
            assert set(body["data"]["last"]) == set(STREAMS)
            assert body["data"]["last"]["score"] <= sent
            if sent:
                break
    assert body["data"]["ready"] is True
    assert "sequence" not in body


def test_open_alerts_are_sent_to_whoever_subscribes(ledger: Ledger, publisher: Publisher, context: Sockets) -> None:
    """The last word on each, with its own sequence, so that a client knows it; of this scanner alone."""
    ledger.record(result("a", scanner="mr1"))
    ledger.record(result("b", scanner="mr10"))
    publisher.wake()
    first = subscriber(publisher, context, b"v1/alert/mr1/")
    event = until(first, b"v1/alert/")
    assert (event["subject"], event["sequence"]) == ("mr1", 1)


def test_replay_gives_the_original_bodies(ledger: Ledger, ask: Asker) -> None:
    """From a sequence on, in order; an empty list at the end of the log."""
    for n in range(3):
        ledger.record(result(f"s{n}", exam=f"e{n}"))
    answer = ask(op="REPLAY", stream="score", **{"from": 2})
    assert [event["sequence"] for event in answer["events"]] == [2, 3]
    assert answer["events"][0] == json.loads(ledger.events_after("score", 1, 1)[0].body)
    assert (answer["last"], answer["more"], answer["epoch"]) == (3, False, ledger.epoch)
    assert ask(op="REPLAY", stream="score", **{"from": 4})["events"] == []
    assert ask(op="REPLAY", stream="score", **{"from": 99})["last"] == 3


def test_a_long_replay_comes_in_pages(ledger: Ledger, ask: Asker) -> None:
    """Each says whether there is more."""
    count = REPLAY_EVENTS + 3
    with ledger._transaction() as db:
        for n in range(count):
            ledger._changes(db).append("series", time.time(), {"n": n}, "mr1")
    first = ask(op="REPLAY", stream="series", **{"from": 1})
    assert first["more"]
    second = ask(op="REPLAY", stream="series", **{"from": len(first["events"]) + 1})
    assert not second["more"]
    assert [e["data"]["n"] for e in (*first["events"], *second["events"])] == list(range(count))


def test_what_was_cut_is_gone(ledger: Ledger, ask: Asker) -> None:
    """The answer names the first sequence that is left."""
    ledger.record(result("a"), now=0.0)
    ledger.record(result("b", exam="e2"))
    ledger.cut(3600, 3600)
    answer = ask(op="REPLAY", stream="score", **{"from": 1})
    assert (answer["error"], answer["first"], answer["last"]) == ("GONE", 2, 2)
    assert len(ask(op="REPLAY", stream="score", **{"from": 2})["events"]) == 1


def test_the_snapshot_is_the_open_alerts_and_where_the_log_stands(ledger: Ledger, ask: Asker) -> None:
    """Enough to begin with."""
    ledger.record(result("a"))
    ledger.record(result("b", "PASS", rule="t2"))
    answer = ask(op="SNAPSHOT")
    assert [event["data"]["state"] for event in answer["alerts"]] == ["raised"]
    assert answer["last"]["score"] == 2
    assert answer["ready"] is True


def test_an_acknowledgement_is_answered_and_published(
    ledger: Ledger, publisher: Publisher, context: Sockets, ask: Asker
) -> None:
    """Everybody hears of it; a second time after the end is refused with a word."""
    sub = subscriber(publisher, context, b"v1/alert/")
    ledger.record(result(final=False))
    publisher.wake()
    name = until(sub, b"v1/alert/")["data"]["alert_id"]
    assert ask(op="ACK", alert_id=name, reason="rescanning", by="A")["state"] == "acknowledged"
    while (event := until(sub, b"v1/alert/"))["sequence"] < 2:
        pass
    assert event["data"]["acknowledged"]["reason"] == "rescanning"
    ledger.record(result(verdict="PASS"))
    assert ask(op="ACK", alert_id=name, reason="wrong", by="A")["error"] == "CLOSED"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "BAD_REQUEST"),
        (b"\xff\xfe", "BAD_REQUEST"),
        (b"[1]", "BAD_REQUEST"),
        (b"[" * 60_000, "BAD_REQUEST"),
        (b'{"op": "DROP"}', "BAD_REQUEST"),
        (b'{"op": ["REPLAY"]}', "BAD_REQUEST"),
        (b'{"op": "REPLAY", "stream": "passwords", "from": 1}', "BAD_REQUEST"),
        (b'{"op": "REPLAY", "stream": ["alert"], "from": 1}', "BAD_REQUEST"),
        (b'{"op": "REPLAY", "stream": "alert", "from": -1}', "BAD_REQUEST"),
        (b'{"op": "REPLAY", "stream": "alert", "from": "1"}', "BAD_REQUEST"),
        (b'{"op": "REPLAY", "stream": "alert", "from": 1e400}', "BAD_REQUEST"),
        (b'{"op": "REPLAY", "stream": "alert", "from": 99999999999999999999999}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "x", "reason": "wrong", "by": "x"}', "NO_SUCH_ALERT"),
        (b'{"op": "ACK"}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "x", "reason": ["wrong"], "by": "x"}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "x", "reason": "wrong", "by": null}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "\\ud800", "reason": "wrong", "by": "x"}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "x", "reason": "\\ud800", "by": "x"}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "x", "reason": "wrong", "by": "\\ud800"}', "NO_SUCH_ALERT"),
        (b'{"op": "ACK", "alert_id": "\' OR 1=1 --", "reason": "wrong", "by": "x"}', "NO_SUCH_ALERT"),
        (b'{"op": "ACK", "alert_id": 5, "reason": "wrong", "by": "x"}', "BAD_REQUEST"),
        (b'{"op": "ACK", "alert_id": "x", "reason": "no", "by": "x"}', "BAD_REQUEST"),
    ],
)
def test_nonsense_is_answered_with_a_word(ask: Asker, raw: bytes, error: str) -> None:
    """Every request has its answer, one JSON object, and the publisher lives on."""
    assert ask(raw)["error"] == error
    assert ask(op="PING")["op"] == "PING"


def test_what_a_request_is_marked_with_comes_back(ask: Asker) -> None:
    """So that answers can be told apart."""
    assert ask(op="PING", request="abc")["request"] == "abc"
    assert ask(op="NONSENSE", request=7)["request"] == 7
    assert "request" not in ask(op="PING", request={"a": 1})
    assert "request" not in ask(op="PING", request="x" * 1000)
    assert ask(b'{"op": "PING", "request": "\\ud800"}')["request"] == "\ud800"


def test_a_message_that_is_too_large_ends_the_connection_and_nothing_else(
    publisher: Publisher, context: Sockets, ask: Asker
) -> None:
    """Beyond 64 KiB the peer is cut off; many small frames are not answered; others are."""
    for frames in ([b"x" * 1_000_000], [b""] * 5000):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{publisher.replay_port}")
        dealer.send_multipart(frames)
        assert ask(op="PING")["op"] == "PING"
        assert dealer.poll(100) == 0


def test_who_floods_the_replay_socket_and_reads_nothing_silences_nobody(
    publisher: Publisher, ledger: Ledger, context: Sockets, ask: Asker
) -> None:
    """Heartbeats and others' answers come in between; what is kept for the one who does not read is limited."""
    for number in range(40):
        ledger.record(result(f"s{number}"))
    flood = context.socket(zmq.DEALER)
    flood.setsockopt(zmq.RCVHWM, 1)
    flood.connect(f"tcp://127.0.0.1:{publisher.replay_port}")
    sub = subscriber(publisher, context, b"v1/heartbeat/")
    for _ in range(500):
        flood.send(b'{"op": "REPLAY", "stream": "score", "from": 1}')
    assert until(sub, b"v1/heartbeat/")
    assert ask(op="PING")["op"] == "PING"
    assert publisher.alive()


def test_a_thousand_topics_of_one_subscriber_are_not_remembered_one_by_one(
    publisher: Publisher, ledger: Ledger, context: Sockets
) -> None:
    """Its subscriptions are heard, and the open alert reaches it all the same."""
    ledger.record(result("a"))
    sub = subscriber(publisher, context)
    for number in range(3000):
        sub.subscribe(f"v1/alert/nowhere{number}/")
    sub.subscribe("v1/alert/mr1/")
    assert until(sub, b"v1/alert/mr1/")["data"]["state"] == "raised"


def test_subscriptions_and_requests_are_counted(publisher: Publisher, context: Sockets, ask: Asker) -> None:
    """For the metrics; a subscriber that leaves is counted off."""
    sub = subscriber(publisher, context, b"v1/score/")
    ask(op="PING")
    assert publisher.facts() == {"subscriptions": 2, "replay_requests": 1, "outbox_pending": 0}
    other = subscriber(publisher, context)
    sub.close(linger=0)
    while publisher.facts()["subscriptions"] != 2:
        assert until(other, b"v1/heartbeat/")


def test_a_port_in_use_is_one_line(publisher: Publisher, ledger: Ledger) -> None:
    """The message names the endpoint."""
    taken = EventsSettings(publish=f"tcp://127.0.0.1:{publisher.publish_port}", replay=ANY)
    with pytest.raises(ConfigError, match=f"{publisher.publish_port}.*another"):
        Publisher(taken, ledger).start()


# --- CURVE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["publish", "replay"])
def test_off_loopback_it_refuses_to_start_unprotected(ledger: Ledger, which: str) -> None:
    """Either endpoint; the message says what to do."""
    settings = EventsSettings(**{"publish": ANY, "replay": ANY, which: "tcp://0.0.0.0:0"})
    with pytest.raises(ConfigError, match="rescan keys new"):
        Publisher(settings, ledger)


def test_curve_without_keys_is_one_line(ledger: Ledger) -> None:
    """The remedy is a command."""
    with pytest.raises(ConfigError, match="rescan keys new"):
        Publisher(EventsSettings(publish=ANY, replay=ANY, curve=True), ledger)


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    store = KeyStore(tmp_path / "keys")
    new_pair(store.folder, "server")
    return store


@pytest.fixture
def protected(ledger: Ledger, keys: KeyStore) -> Iterator[Publisher]:
    """Off loopback, as at a site."""
    settings = EventsSettings(publish="tcp://0.0.0.0:0", replay="tcp://0.0.0.0:0", heartbeat_s=0.1, curve=True)
    made = Publisher(settings, ledger, keys=keys.folder)
    made.start()
    yield made
    made.stop()


def test_an_authorised_key_hears_and_acknowledges(
    ledger: Ledger, protected: Publisher, keys: KeyStore, context: Sockets, tmp_path: Path
) -> None:
    """With the role `ack` all of it, with `read` all but acknowledging."""
    server = keys.server_pair().public
    reader, boss = (new_pair(tmp_path, name) for name in ("reader", "boss"))
    keys.authorize("reader", reader.public.decode(), Role.READ)
    keys.authorize("boss", boss.public.decode(), Role.ACK)
    sub = subscriber(protected, context, b"v1/alert/", reader, server)
    ledger.record(result())
    protected.wake()
    name = until(sub, b"v1/alert/")["data"]["alert_id"]
    reads = asker(protected, context, pair=reader, server=server)
    assert len(reads(op="REPLAY", stream="alert", **{"from": 1})["events"]) == 1
    assert reads(op="ACK", alert_id=name, reason="wrong", by="x")["error"] == "FORBIDDEN"
    assert asker(protected, context, pair=boss, server=server)(op="ACK", alert_id=name, reason="wrong", by="x")["ok"]


@pytest.mark.parametrize("who", ["plain", "unknown key", "wrong server key"])
def test_others_hear_nothing(protected: Publisher, keys: KeyStore, context: Sockets, tmp_path: Path, who: str) -> None:
    """Neither live events nor an answer; known by the handshake that fails, not by silence."""
    pair, server = new_pair(tmp_path, "stranger"), keys.server_pair().public
    if who == "wrong server key":
        keys.authorize("stranger", pair.public.decode(), Role.ACK)
        server = new_pair(tmp_path, "another").public
    for kind, port in ((zmq.SUB, protected.publish_port), (zmq.DEALER, protected.replay_port)):
        each = context.socket(kind)
        if who != "plain":
            protect(each, pair, server)
        monitor = each.get_monitor_socket()
        each.connect(f"tcp://127.0.0.1:{port}")
        events: set[int] = set()
        refused = {
            zmq.EVENT_HANDSHAKE_FAILED_AUTH,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
        }
        while not events & (refused | {zmq.EVENT_DISCONNECTED}):
            assert monitor.poll(LIMIT_MS)
            events.add(int.from_bytes(monitor.recv_multipart()[0][:2], "little"))
        assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in events
        each.disable_monitor()
        monitor.close(linger=0)


def test_a_key_is_authorised_without_a_restart(
    protected: Publisher, keys: KeyStore, context: Sockets, tmp_path: Path
) -> None:
    """The folder is read anew when it changes."""
    late = new_pair(tmp_path, "late")
    keys.authorize("late", late.public.decode(), Role.READ)
    say = asker(protected, context, pair=late, server=keys.server_pair().public)
    assert say(op="PING")["op"] == "PING"
    assert read_pair(tmp_path / "late.key_secret") == late
