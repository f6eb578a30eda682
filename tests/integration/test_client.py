"""The reference client against a real publisher: restarts, gaps, another log, silence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import client as client_module
from daemon.client import Client, ClientError, Endpoints, Start, ask
from daemon.config import EventsSettings
from daemon.follow import Follow
from daemon.keys import KeyStore, Role, new_pair
from daemon.ledger import Ledger
from daemon.publish import Publisher
from tests.chaos import Run, free_ports
from tests.event_builders import result

TURNS = 600
TURN_S = 0.05


class Site:
    """A daemon's events that can be stopped, started again and begun anew, on ports that stay."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.ports, self.settings = folder, free_ports(), settings
        self.endpoints = Endpoints(*(f"tcp://127.0.0.1:{port}" for port in self.ports))
        self.log = "ledger.db"
        self.start()

    def start(self) -> None:
        publish, replay = (f"tcp://127.0.0.1:{port}" for port in self.ports)
        self.ledger = Ledger(self.folder / self.log)
        self.publisher = Publisher(
            EventsSettings(publish=publish, replay=replay, heartbeat_s=0.1, **self.settings),
            self.ledger,
            keys=self.folder / "keys",
        )
        self.publisher.start()

    def stop(self) -> None:
        self.publisher.stop()
        self.ledger.close()

    def record(self, *stacks: str) -> None:
        for stack in stacks:
            self.ledger.record(result(stack, exam=f"exam {stack}", scanner="unknown"))
        self.publisher.wake()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.stop()


class Reader:
    """A client that remembers what it handled."""

    def __init__(self, endpoints: Endpoints, **options: Any) -> None:
        self.handled: list[int] = []
        self.lives: list[bool] = []
        self.lost: list[tuple[str, int]] = []
        self.client = Client(
            endpoints,
            lambda event: self.handled.append(event["sequence"]),
            on_live=self.lives.append,
            on_lost=lambda *lost: self.lost.append(lost),
            **options,
        )

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(TURNS):
            if done():
                return
            self.client.turn(TURN_S)
        raise AssertionError(f"waited in vain; handled {self.handled}, live {self.lives}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


def test_the_log_is_handled_from_its_first_event_on(site: Site) -> None:
    """What was there before, then what comes; once each, in order; then it is live."""
    site.record("a", "b")
    with Reader(site.endpoints) as reader:
        reader.until(lambda: reader.handled == [1, 2])
        site.record("c")
        reader.until(lambda: reader.handled == [1, 2, 3])
        assert reader.lives == [True]
        assert reader.client._streams["alert"].state is Follow.LIVE


def test_a_client_goes_on_where_it_ended(site: Site, tmp_path: Path) -> None:
    """What came while it was away is handled; what it had handled is not."""
    site.record("a")
    with Reader(site.endpoints, position=tmp_path / "p") as first:
        first.until(lambda: first.handled == [1])
    site.record("b", "c")
    with Reader(site.endpoints, position=tmp_path / "p") as second:
        second.until(lambda: second.handled == [2, 3])


def test_what_was_not_handled_to_the_end_comes_again(site: Site, tmp_path: Path) -> None:
    """An error while handling does not move the position."""
    site.record("a", "b")
    tries: list[int] = []

    def fail_once(event: dict[str, Any]) -> None:
        tries.append(event["sequence"])
        if tries == [1, 2]:
            raise RuntimeError("the screen is off")

    client = Client(site.endpoints, fail_once, position=tmp_path / "p")
    with contextlib.closing(client):
        failures = 0
        for _ in range(TURNS):
            try:
                client.turn(TURN_S)
            except RuntimeError:
                failures += 1
            if len(tries) == 3:
                break
    assert (tries, failures) == ([1, 2, 2], 1)


def test_a_restart_of_the_daemon_loses_nothing(site: Site) -> None:
    """Events written while nobody published are handled when it is back."""
    with Reader(site.endpoints) as reader:
        site.record("a")
        reader.until(lambda: reader.handled == [1])
        site.stop()
        with contextlib.closing(Ledger(site.folder / site.log)) as ledger:
            ledger.record(result("b", exam="e", scanner="unknown"))
        site.start()
        reader.until(lambda: reader.handled == [1, 2])
        site.record("c")
        reader.until(lambda: reader.handled == [1, 2, 3])


def test_another_log_is_handled_from_its_beginning(site: Site) -> None:
    """The ledger was lost: the epoch tells, and the new log's events are not taken for old ones."""
    site.record("a", "b")
    with Reader(site.endpoints) as reader:
        reader.until(lambda: reader.handled == [1, 2])
        site.stop()
        site.log = "new.db"
        site.start()
        site.record("x")
        reader.until(lambda: reader.handled == [1, 2, 1])


def test_a_log_that_was_put_back_is_handled_again(site: Site) -> None:
    """A backup has the same epoch and an earlier end: rather twice than never."""
    site.record("a")
    site.stop()
    backup = (site.folder / site.log).read_bytes()
    site.start()
    site.record("b", "c")
    with Reader(site.endpoints) as reader:
        reader.until(lambda: reader.handled == [1, 2, 3])
        site.stop()
        for name in (f"{site.log}-wal", f"{site.log}-shm"):
            (site.folder / name).unlink(missing_ok=True)
        (site.folder / site.log).write_bytes(backup)
        site.start()
        reader.until(lambda: reader.handled == [1, 2, 3, 1])
        site.record("other")
        reader.until(lambda: reader.handled == [1, 2, 3, 1, 2])


def test_what_retention_removed_is_told(site: Site) -> None:
    """The client says how many are lost and goes on with the first that is left."""
    site.ledger.record(result("a", scanner="unknown"), now=0.0)
    site.ledger.cut(3600, 3600)
    site.record("b")
    with Reader(site.endpoints) as reader:
        reader.until(lambda: reader.handled == [2, 3])  # the first alert's end, and the second alert
        assert reader.lost == [("alert", 1)]


def test_from_now_on_means_from_the_next_event(site: Site) -> None:
    """For a screen that shows what happens."""
    site.record("a", "b")
    with Reader(site.endpoints, start=Start.NOW) as reader:
        reader.until(lambda: reader.lives == [True])
        site.record("c")
        reader.until(lambda: reader.handled == [3])


def test_from_now_on_begins_when_it_is_live(site: Site) -> None:
    """Open alerts may come before the first heartbeat; what happens after `live` is said is never left out."""
    for number in range(5):
        site.record(f"before {number}")
        with Reader(site.endpoints, start=Start.NOW) as reader:
            reader.until(lambda reader=reader: bool(reader.lives))
            site.record(f"after {number}")
            last = site.ledger.last_sequences()["alert"]
            reader.until(lambda reader=reader, last=last: last in reader.handled)


def test_silence_is_stale_within_six_seconds(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its clock: live at 4.9 s of silence, STALE at 5; live again by itself."""
    assert client_module.STALE_AFTER_S + 0.5 < 6.0
    clock = [0.0]
    with Reader(site.endpoints, clock=lambda: clock[0]) as reader:
        reader.until(lambda: reader.lives == [True])
        site.stop()
        for _ in range(4):
            reader.client.turn(TURN_S)
        clock[0] = reader.client._heard_at + 4.9
        reader.client.turn(TURN_S)
        assert reader.lives == [True]
        clock[0] += 0.2
        reader.client.turn(TURN_S)
        assert reader.lives == [True, False]
        site.start()
        reader.until(lambda: reader.lives == [True, False, True])


def test_a_daemon_that_never_was_is_stale_too() -> None:
    """Nothing at the other end."""
    clock = [0.0]
    first, second = free_ports()
    with Reader(Endpoints(f"tcp://127.0.0.1:{first}", f"tcp://127.0.0.1:{second}"), clock=lambda: clock[0]) as reader:
        reader.client.turn(0.01)
        assert reader.lives == []
        clock[0] = 5.1
        reader.client.turn(0.01)
        assert reader.lives == [False]
        with pytest.raises(ClientError, match="is the daemon running"):
            reader.client.acknowledge("x", "wrong", "me", limit_s=0.1)


def test_an_acknowledgement_is_answered(site: Site) -> None:
    """Through the client, while it follows."""
    events: list[dict[str, Any]] = []
    with contextlib.closing(Client(site.endpoints, events.append)) as client:
        site.record("a")
        for _ in range(TURNS):
            client.turn(TURN_S)
            if events:
                break
        answer = client.acknowledge(events[0]["data"]["alert_id"], "rescanning", "me")
    assert answer["state"] == "acknowledged"


def test_with_curve_the_same(tmp_path: Path) -> None:
    """Encrypted and authenticated: events, replay and acknowledgement."""
    keys = KeyStore(tmp_path / "keys")
    server = new_pair(keys.folder, "server")
    mine = new_pair(tmp_path, "mine")
    keys.authorize("mine", mine.public.decode(), Role.ACK)
    site = Site(tmp_path, curve=True)
    endpoints = Endpoints(site.endpoints.publish, site.endpoints.replay, server.public, mine)
    try:
        site.record("a")
        with Reader(endpoints) as reader:
            reader.until(lambda: reader.handled == [1])
            site.record("b")
            reader.until(lambda: reader.handled == [1, 2])
        assert ask(endpoints, {"op": "PING"})["op"] == "PING"
    finally:
        site.stop()


def test_nothing_is_lost_through_random_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL of publisher and client in turn, a slow client with short queues: all handled, in order, none lost."""
    report = Run(tmp_path, events=300, kills=2, seed=7).run()
    with capsys.disabled():
        print("", *report.lines(), sep="\n  ")
    assert report.faults() == []
    assert report.kills == {"publisher": 2, "client": 2}
    assert report.events >= 299
