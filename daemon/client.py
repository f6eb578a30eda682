"""The reference client: every event handled at least once and in order, through restarts of either side and full queues.

It subscribes first and asks for what it missed second. Each stream follows the table of `daemon/follow.py`; the position is written down after an event was handled, never before. Whoever handles events must expect one to come twice
after a crash, and knows it by its `id`. Copy it to other languages freely.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import zmq

from daemon.events import HEARTBEAT_TOPIC, STREAMS, subscription_of
from daemon.follow import FOLLOW, Action, Follow, Heard, hear_answer, hear_beat, hear_event
from daemon.keys import Pair
from daemon.positions import ClientError, Positions

__all__ = ["Client", "ClientError", "Counts", "Endpoints", "Positions", "Start", "ask"]

STALE_AFTER_S = 5.0
"""Silence after which the client says STALE: two heartbeats and a half; a person is told within 6 s."""

ANSWER_LIMIT_S = 2.0
"""Without an answer for so long, a request is made again."""

RECEIVE_HIGH_WATER = 0
"""No limit: what is small and rare may wait in memory. A full queue that meets a reconnection ends the whole process in
libzmq 4.3 (its issue 3937), and ZMTP heartbeats cut the connection of a reader that is merely slow; so there are none."""

REOPEN_S = 10.0
"""Silence after which, again and again, the sockets are made anew: the other end may be gone without a word."""

MAX_TURN_MESSAGES = 500
"""Messages taken between two looks at requests and positions."""


class Start(StrEnum):
    """Where a client begins that has no position yet."""

    FIRST = "first"
    """With the first event that the log holds."""
    NOW = "now"
    """With what comes from now on."""


@dataclass(frozen=True)
class Endpoints:
    """Where the daemon is, and the keys to reach it.

    Attributes:
        publish: endpoint of the live events.
        replay: endpoint of replay and acknowledgement.
        server_key: the server's public key; None without CURVE.
        pair: this client's own keys; None without CURVE.
    """

    publish: str
    replay: str
    server_key: bytes | None = None
    pair: Pair | None = None

    def __post_init__(self) -> None:
        """Both keys, or none."""
        if (self.server_key is None) != (self.pair is None):
            raise ClientError("keys: give the server's public key and this client's own pair, or neither")

    def connect(self, context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> zmq.Socket[bytes]:
        """A socket with the options that every client needs."""
        made = context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.RECONNECT_IVL, 100)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        made.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER)
        if kind != zmq.SUB:
            made.setsockopt(zmq.IMMEDIATE, 1)
        if "[" in endpoint:
            made.setsockopt(zmq.IPV6, 1)
        if self.server_key is not None and self.pair is not None:
            made.setsockopt(zmq.CURVE_SERVERKEY, self.server_key)
            made.setsockopt(zmq.CURVE_PUBLICKEY, self.pair.public)
            made.setsockopt(zmq.CURVE_SECRETKEY, self.pair.secret)
        made.connect(endpoint)
        return made


@dataclass
class _Stream:
    """A stream's state and its open request."""

    name: str
    state: Follow = Follow.LOST
    tag: int | None = None
    asked_at: float = 0.0


@dataclass
class Counts:
    """What the client has seen so far; its lag is `behind`."""

    handled: int = 0
    repeated: int = 0
    gaps: int = 0
    replays: int = 0
    lost: int = 0
    behind: dict[str, int] = field(default_factory=dict)


class Client:
    """Follows streams of one daemon. Use it from one thread: call `turn` again and again, or `run`."""

    def __init__(
        self,
        endpoints: Endpoints,
        handle: Callable[[dict[str, Any]], None],
        *,
        streams: Iterable[str] = ("alert",),
        position: Path | None = None,
        start: Start = Start.FIRST,
        on_live: Callable[[bool], None] = lambda _live: None,
        on_lost: Callable[[str, int], None] = lambda _stream, _count: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect; the daemon need not run yet.

        Args:
            endpoints: where it is.
            handle: called with each event's body; when it returns, the event counts as handled. What it raises comes out of
                `turn`, and the event is not handled.
            streams: to follow, of `STREAMS`.
            position: file of the position; None keeps it in memory.
            start: where to begin without one.
            on_live: called with False when the daemon falls silent (STALE), with True when it is heard again.
            on_lost: called with a stream and how many of its events retention had removed before they could be asked for.
            clock: monotonic seconds.

        Raises:
            ClientError: an unknown stream or an unreadable position.
        """
        self._streams = {name: _Stream(name) for name in streams}
        if not set(self._streams) <= set(STREAMS):
            raise ClientError(f"streams: got {sorted(self._streams)}; known are {', '.join(STREAMS)}")
        self.positions = Positions(position, self._streams)
        self.counts = Counts()
        self.live: bool | None = None
        self.ready: bool | None = None
        self._handle, self._on_live, self._on_lost = handle, on_live, on_lost
        self._clock, self._start = clock, start
        self._tags = itertools.count(1)
        self._heard_at, self._heard = clock(), False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._endpoints = endpoints
        self._open()

    def close(self) -> None:
        """Write the position down and disconnect."""
        self.positions.save()
        self._sub.close()
        self._dealer.close()
        self._context.term()

    def run(self, stop: threading.Event, turn_s: float = 0.5) -> None:
        """Follow until told to stop."""
        while not stop.is_set():
            self.turn(turn_s)
        self.positions.save()

    def turn(self, limit_s: float) -> None:
        """Wait for news up to a limit, take them in, write the position down, notice silence."""
        ready = dict(self._poller.poll(int(1000 * self._wait_s(limit_s))))
        try:
            if self._dealer in ready:
                self._take(self._dealer, self._take_answer)
            if self._sub in ready:
                self._take(self._sub, self._take_live)
        finally:
            self.positions.save()
        now = self._clock()
        for stream in self._streams.values():
            if stream.tag is not None and now - stream.asked_at >= ANSWER_LIMIT_S:
                self._hear(stream, Heard.NO_ANSWER)
        self._set_live(bool(ready) or now - self._heard_at < STALE_AFTER_S)
        if not ready and min(now - self._heard_at, now - self._opened_at) >= REOPEN_S:
            self._reopen()

    def acknowledge(self, alert_id: str, reason: str, by: str, limit_s: float = 5.0) -> dict[str, Any]:
        """Say what a person has decided about an alert.

        Returns:
            The daemon's answer: `ok`, or `error` with its text.

        Raises:
            ClientError: no answer in time; whether it was written down is not known, and saying it again does no harm.
        """
        return ask(
            self._endpoints, {"op": "ACK", "alert_id": alert_id, "reason": reason, "by": by}, limit_s, self._context
        )

    # --- news ---------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Connect both sockets."""
        self._opened_at = self._clock()
        self._dealer = self._endpoints.connect(self._context, zmq.DEALER, self._endpoints.replay)
        self._sub = self._endpoints.connect(self._context, zmq.SUB, self._endpoints.publish)
        for topic in (HEARTBEAT_TOPIC, *(subscription_of(name) for name in self._streams)):
            self._sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._poller = zmq.Poller()
        self._poller.register(self._sub, zmq.POLLIN)
        self._poller.register(self._dealer, zmq.POLLIN)

    def _reopen(self) -> None:
        """Make both sockets anew after a long silence; nothing that counts is in them."""
        self._sub.close()
        self._dealer.close()
        self._open()

    def _wait_s(self, limit_s: float) -> float:
        now = self._clock()
        due = [self._heard_at + STALE_AFTER_S - now] if self.live is not False else []
        due += [s.asked_at + ANSWER_LIMIT_S - now for s in self._streams.values() if s.tag is not None]
        return max(min([limit_s, *due]), 0.001)

    def _take(self, source: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_TURN_MESSAGES):
                take(source.recv_multipart(zmq.NOBLOCK))

    def _take_live(self, frames: list[bytes]) -> None:
        body = _decode(frames[-1])
        if len(frames) != 2 or body is None or body.get("epoch") in self.positions.past:
            return
        self._heard_at, self._heard = self._clock(), True
        if frames[0] == HEARTBEAT_TOPIC.encode():
            self._take_beat(body)
            return
        stream = self._streams.get(body.get("stream", ""))
        if stream is None:
            return
        if self._start is Start.NOW and self.positions.epoch is None:
            return  # the next heartbeat says where now is
        if self._is_other_epoch(body["epoch"]):
            return
        last = self.positions.last[stream.name]
        self._hear(stream, hear_event(last, body["sequence"]), [body])

    def _take_beat(self, body: dict[str, Any]) -> None:
        self.ready = body["data"]["ready"]
        if self.positions.epoch is None and self._start is Start.NOW:
            self.positions.restart(body["epoch"])
            self.positions.last |= {name: body["data"]["last"][name] for name in self._streams}
        if self._is_other_epoch(body["epoch"]):
            return
        for stream in self._streams.values():
            last = body["data"]["last"].get(stream.name, 0)
            self.counts.behind[stream.name] = max(last - self.positions.last[stream.name], 0)
            self._hear(stream, hear_beat(self.positions.last[stream.name], last))

    def _is_other_epoch(self, epoch: str) -> bool:
        """Begin anew if the log is another one."""
        if epoch == self.positions.epoch:
            return False
        self.positions.restart(epoch)
        for stream in self._streams.values():
            self._hear(stream, Heard.OTHER_EPOCH)
        return True

    def _take_answer(self, frames: list[bytes]) -> None:
        answer = _decode(frames[-1])
        tag = None if answer is None else answer.get("request")
        stream = next((s for s in self._streams.values() if s.tag is not None and s.tag == tag), None)
        if stream is None or answer is None:
            return
        self._heard_at, self._heard = self._clock(), True
        if answer.get("epoch", self.positions.epoch) != self.positions.epoch:
            stream.tag = None
            if answer["epoch"] not in self.positions.past:
                self._is_other_epoch(answer["epoch"])
            return
        heard = hear_answer(self.positions.last[stream.name], answer)
        if heard is None:
            return  # asked again when the time for the answer is over
        if heard is Heard.GONE:
            self._skip(stream, answer["first"])
        self._hear(stream, heard, answer.get("events", []))
        if stream.tag == tag:
            stream.tag = None  # after handling: an error there leaves the request open, so that it is made again

    def _skip(self, stream: _Stream, first: int) -> None:
        """Say what is lost, and go on with the first event that is left."""
        lost = first - 1 - self.positions.last[stream.name]
        if lost > 0:
            self.counts.lost += lost
            self._on_lost(stream.name, lost)
            self.positions.handled(stream.name, first - 1)

    # --- the table at work --------------------------------------------------------------------------------------------

    def _hear(self, stream: _Stream, heard: Heard, events: list[dict[str, Any]] | None = None) -> None:
        stream.state, action = FOLLOW[stream.state][heard]
        if heard is Heard.AHEAD and action is Action.ASK:
            self.counts.gaps += 1
        if action in (Action.HANDLE, Action.HANDLE_AND_ASK):
            self._handle_all(stream, events or [])
        if heard is Heard.WENT_BACK and action is Action.RESTART:
            self.positions.handled(stream.name, 0)
        if action in (Action.ASK, Action.HANDLE_AND_ASK, Action.RESTART, Action.SKIP):
            self._ask(stream)

    def _handle_all(self, stream: _Stream, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["sequence"] <= self.positions.last[stream.name]:
                self.counts.repeated += 1
                continue
            self._handle(event)
            self.counts.handled += 1
            self.positions.handled(stream.name, event["sequence"])

    def _ask(self, stream: _Stream) -> None:
        """Ask for what follows the position."""
        stream.tag, stream.asked_at = next(self._tags), self._clock()
        start = self.positions.last[stream.name] + 1
        request = {"op": "REPLAY", "stream": stream.name, "from": start, "request": stream.tag}
        self.counts.replays += 1
        with contextlib.suppress(zmq.Again):  # not connected now: no answer will come, and it is asked again
            self._dealer.send(json.dumps(request).encode(), zmq.NOBLOCK)

    def _set_live(self, live: bool) -> None:
        if live and (not self._heard or self.positions.epoch is None):
            return  # nothing was heard yet, and it is too early to call that silence; or where "now" is, is not known
        if live is not self.live:
            self.live = live
            self._on_live(live)


def ask(
    endpoints: Endpoints,
    request: Mapping[str, Any],
    limit_s: float = 5.0,
    context: zmq.Context[zmq.Socket[bytes]] | None = None,
) -> dict[str, Any]:
    """One request to the replay socket and its answer.

    Raises:
        ClientError: no answer in time.
    """
    own = context or zmq.Context()
    dealer = endpoints.connect(own, zmq.DEALER, endpoints.replay)
    try:
        dealer.setsockopt(zmq.SNDTIMEO, int(limit_s * 1000))
        dealer.send(json.dumps(dict(request)).encode())
        if dealer.poll(int(limit_s * 1000)):
            answer = _decode(dealer.recv())
            if answer is not None:
                return answer
    except zmq.Again:
        pass
    finally:
        dealer.close()
        if context is None:
            own.term()
    raise ClientError(
        f"{endpoints.replay}: no answer in {limit_s:g} s; is the daemon running, and is this key authorised?"
    )


def _decode(frame: bytes) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        body = json.loads(frame)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
