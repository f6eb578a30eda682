"""The publisher: live events on XPUB, replay and acknowledgement on ROUTER, both owned by one thread.

It sends only what is in the ledger, and holds no state that a restart could lose. A subscriber that falls behind is dropped
from, never waited for; what it missed it asks for again by sequence.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from daemon import __version__
from daemon.config import ConfigError, EventsSettings, is_loopback, split_endpoint
from daemon.events import HEARTBEAT_TOPIC, STREAMS, heartbeat_body, subscription_of
from daemon.keys import KeyStore, Role
from daemon.ledger import AlertClosed, Ledger, LoggedEvent, NoSuchAlert

SEND_HIGH_WATER = 10_000
"""Messages kept for one slow subscriber before its newest are dropped."""

REPLY_HIGH_WATER = 64
"""Answers kept for one client that asks and does not read; beyond it they are dropped, and it asks again."""

MAX_REQUEST_BYTES = 65_536
MAX_FRAMES = 8
"""Most frames of a request: an envelope of more is nobody's."""

MAX_TAG = 128
"""Longest `request` that is given back."""

TURN_REQUESTS, TURN_SUBSCRIPTIONS = 20, 1000
"""Requests and subscriptions heard before news and heartbeats have their turn again."""

MAX_WANTED = 1000
"""New subscriptions remembered one by one; beyond it open alerts are sent as if to everyone."""

LINGER_MS = 2_000
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_TRIES = 60, 10, 3
"""A peer that is gone is noticed by TCP. ZMTP heartbeats would cut off a subscriber that is merely slow, and its
reconnection with a full queue ends its process in libzmq 4.3 (its issue 3937)."""

REPLAY_EVENTS = 500
REPLAY_BYTES = 1 << 20
"""Most events and bytes in one answer to REPLAY; it says `more` when there are more."""

BATCH = 1000
LONGEST_WAIT_S = 0.5
"""The log is looked at this often even without a wake-up."""

RETENTION_S = 600.0
SENT_AGAIN_S = 0.5
"""Open alerts are sent again at most this often, however many subscribe."""

ZAP_DOMAIN = b"rescan"


class Publisher:
    """Sends what the ledger holds. `start` binds; the ports are known when it returns."""

    def __init__(
        self,
        settings: EventsSettings,
        ledger: Ledger,
        ready: Callable[[], bool] = lambda: True,
        keys: Path | None = None,
    ) -> None:
        """Check the settings; nothing is bound yet.

        Args:
            settings: endpoints, heartbeat, protection and retention.
            ledger: what to send.
            ready: whether a verdict would come now; called from the publisher's thread.
            keys: folder of the keys; `keys` beside the ledger where None.

        Raises:
            ConfigError: an endpoint that the network can reach without protection, or keys that are missing.
        """
        self.settings, self.ledger, self.ready = settings, ledger, ready
        for endpoint in (settings.publish, settings.replay):
            host, _ = split_endpoint(endpoint, "events")
            if not (is_loopback(host) or settings.curve or settings.insecure_i_know):
                raise ConfigError(
                    f"events: {endpoint} is reachable from the network without protection; "
                    "set events.curve = true and make keys with `rescan keys new`"
                )
        self.keys = KeyStore(keys or ledger.path.parent / "keys")
        self._pair = self.keys.server_pair() if settings.curve else None
        self.publish_port = self.replay_port = 0
        self.subscriptions = 0
        self.replay_requests = 0
        self._sent = ledger.last_number()
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._wake.setblocking(False)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0
        self._beat_due = self._cut_due = self._again_due = 0.0
        self._wanted: set[bytes] = set()

    # --- start and stop -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind both endpoints and start the thread.

        Raises:
            ConfigError: an endpoint that cannot be bound; the message names it.
        """
        self._context = zmq.Context()
        self._auth = self._authenticator() if self._pair is not None else None
        try:
            self._pub, self.publish_port = self._bind(zmq.XPUB, self.settings.publish)
            self._router, self.replay_port = self._bind(zmq.ROUTER, self.settings.replay)
        except ConfigError:
            if self._auth is not None:
                self._auth.stop()
            self._context.destroy(linger=0)
            self.stop()
            raise
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what is left, then close. Harmless when it never started; it starts once."""
        if self._thread is not None:
            self._stopping.set()
            self.wake()
            self._thread.join()
            self._thread = None
            if self._auth is not None:
                self._auth.stop()
            self._context.term()
        self._wake.close()
        self._waker.close()

    def wake(self) -> None:
        """There is something new in the ledger. Any thread."""
        with contextlib.suppress(OSError):  # full: a wake-up is on its way; closed: nothing is sent any more
            self._waker.send(b"\0")

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def facts(self) -> dict[str, int]:
        """For the metrics: subscriptions, replay_requests, outbox_pending."""
        return {
            "subscriptions": self.subscriptions,
            "replay_requests": self.replay_requests,
            "outbox_pending": max(self.ledger.last_number() - self._sent, 0),
        }

    def _bind(self, kind: int, endpoint: str) -> tuple[zmq.Socket[bytes], int]:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, LINGER_MS)
        made.setsockopt(zmq.TCP_KEEPALIVE, 1)
        made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
        made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_EVERY_S)
        made.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_TRIES)
        made.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER if kind == zmq.XPUB else REPLY_HIGH_WATER)
        made.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        if kind == zmq.XPUB:
            made.setsockopt(zmq.XPUB_VERBOSER, 1)
        if self._pair is not None:
            made.setsockopt(zmq.CURVE_SERVER, 1)
            made.setsockopt(zmq.CURVE_PUBLICKEY, self._pair.public)
            made.setsockopt(zmq.CURVE_SECRETKEY, self._pair.secret)
            made.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        if "[" in endpoint:
            made.setsockopt(zmq.IPV6, 1)
        try:
            made.bind(endpoint.replace("localhost", "127.0.0.1"))
        except zmq.ZMQError as error:
            made.close(linger=0)
            raise ConfigError(
                f"events: {endpoint} cannot be bound ({error.strerror}); free the port or choose another"
            ) from None
        bound = made.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return made, split_endpoint(bound.rstrip(b"\0").decode(), "events")[1]

    def _authenticator(self) -> ThreadAuthenticator:
        auth = ThreadAuthenticator(self._context)
        auth.start()
        auth.configure_curve_callback(ZAP_DOMAIN.decode(), self.keys)
        return auth

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (self._pub, self._router, self._wake):
            poller.register(each, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(self._wait_ms()))
                if self._wake.fileno() in ready:
                    self._wake.recv(4096)
                if self._pub in ready:
                    self._hear_subscriptions()
                if self._router in ready:
                    self._answer_requests()
                with contextlib.suppress(
                    sqlite3.Error
                ):  # a full or failing disk: the log is read again at the next turn
                    self._send_news()
                    self._send_open_alerts()
                    self._beat()
            with contextlib.suppress(sqlite3.Error):
                self._send_news()
        finally:
            self._pub.close()
            self._router.close()

    def _wait_ms(self) -> int:
        due = self._beat_due if not self._wanted else min(self._beat_due, self._again_due)
        return int(1000 * min(max(due - time.monotonic(), 0.0), LONGEST_WAIT_S)) + 1

    def _send_news(self) -> None:
        """Send every event of the log that was not sent yet, in the order of the log."""
        while events := self.ledger.events_since(self._sent, BATCH):
            for event in events:
                self._send(event)
                self._sent = event.number

    def _send(self, event: LoggedEvent) -> None:
        self._pub.send_multipart([event.topic.encode(), event.body.encode()])

    def _beat(self) -> None:
        """The heartbeat, and what happens at its pace: alerts expire, old events go, health is written down."""
        now = time.monotonic()
        if now < self._beat_due:
            return
        self._beat_due = now + self.settings.heartbeat_s
        self._beats += 1
        ready = self.ready()
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk must not silence the heartbeat
            self.ledger.record_health({"ready": ready})
            self.ledger.tick()
            if now >= self._cut_due:
                removed = self.ledger.cut(self.settings.retention_s, self.settings.alert_retention_s)
                self._cut_due = now if removed else now + RETENTION_S
        last = self.ledger.last_sequences()  # before the news are sent, so that a heartbeat is never ahead of them
        self._send_news()
        body = heartbeat_body(self._beats, self.ledger.epoch, time.time(), last, ready)
        self._pub.send_multipart([HEARTBEAT_TOPIC.encode(), body.encode()])

    def _hear_subscriptions(self) -> None:
        """Count subscriptions; note who may want to see the open alerts."""
        with contextlib.suppress(zmq.Again):
            for _ in range(TURN_SUBSCRIPTIONS):
                message = self._pub.recv(zmq.NOBLOCK)
                if message[:1] == b"\x01":
                    self.subscriptions += 1
                    self._wanted.add(message[1:] if len(self._wanted) < MAX_WANTED else b"")
                elif message[:1] == b"\x00":
                    self.subscriptions -= 1

    def _send_open_alerts(self) -> None:
        """Send the last word on each open alert to those who have just subscribed; others know it by its id."""
        now = time.monotonic()
        if not self._wanted or now < self._again_due:
            return
        wanted, self._wanted = self._wanted, set()
        self._again_due = now + SENT_AGAIN_S
        alerts = subscription_of("alert").encode()
        if not any(prefix.startswith(alerts) or alerts.startswith(prefix) for prefix in wanted):
            return
        for event in self.ledger.open_alert_events():
            if any(event.topic.encode().startswith(prefix) for prefix in wanted):
                self._send(event)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _answer_requests(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(TURN_REQUESTS):
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                self.replay_requests += 1
                if len(frames) > MAX_FRAMES:
                    continue
                *envelope, last = frames
                reply = self._answer(last)
                self._router.send_multipart([*(f.bytes for f in envelope), reply.encode()], zmq.NOBLOCK)

    def _answer(self, frame: zmq.Frame) -> str:
        """One JSON object for one request, whatever it is."""
        try:
            request = json.loads(frame.bytes)
        except (ValueError, RecursionError):
            return _error(None, "BAD_REQUEST", "not JSON")
        if not isinstance(request, dict):
            return _error(None, "BAD_REQUEST", "not a JSON object")
        handlers = {"REPLAY": self._replay, "SNAPSHOT": self._snapshot, "PING": self._ping}
        op, tag = request.get("op"), request.get("request")
        try:
            if op == "ACK":
                return self._acknowledge(request, tag, frame)
            if isinstance(op, str) and op in handlers:
                return handlers[op](request, tag)
        except sqlite3.Error:
            return _error(tag, "UNAVAILABLE", "the ledger cannot be read or written now; ask again")
        return _error(tag, "BAD_REQUEST", "op: expected REPLAY, SNAPSHOT, ACK or PING")

    def _replay(self, request: dict[str, Any], tag: object) -> str:
        stream, start = request.get("stream"), request.get("from", 1)
        if stream not in STREAMS:
            return _error(tag, "BAD_REQUEST", f"stream: expected one of {', '.join(STREAMS)}")
        if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < 1 << 62:
            return _error(tag, "BAD_REQUEST", "from: expected a sequence, 1 or more")
        start = max(start, 1)
        last = self.ledger.last_sequences()[stream]
        events = self.ledger.events_after(stream, start - 1, REPLAY_EVENTS)
        if start <= last and (not events or events[0].sequence != start):
            first = events[0].sequence if events else self.ledger.first_sequence(stream)
            return _reply(tag, error="GONE", stream=stream, first=first, last=last, epoch=self.ledger.epoch)
        kept = _within(events, REPLAY_BYTES)
        head = _reply(
            tag,
            op="REPLAY",
            stream=stream,
            epoch=self.ledger.epoch,
            last=last,
            more=bool(kept) and kept[-1].sequence < last,
        )
        return f'{head[:-1]},"events":[{",".join(event.body for event in kept)}]}}'

    def _snapshot(self, _request: dict[str, Any], tag: object) -> str:
        last = self.ledger.last_sequences()
        events = self.ledger.open_alert_events()
        head = _reply(tag, op="SNAPSHOT", epoch=self.ledger.epoch, last=last, ready=self.ready())
        return f'{head[:-1]},"alerts":[{",".join(event.body for event in events)}]}}'

    def _ping(self, _request: dict[str, Any], tag: object) -> str:
        return _reply(
            tag,
            op="PING",
            epoch=self.ledger.epoch,
            last=self.ledger.last_sequences(),
            ready=self.ready(),
            version=__version__,
            time=time.time(),
        )

    def _acknowledge(self, request: dict[str, Any], tag: object, frame: zmq.Frame) -> str:
        if self._pair is not None and self.keys.role_of(_user(frame)) is not Role.ACK:
            return _error(tag, "FORBIDDEN", "this key may read only; authorise it with --role ack")
        alert_id, reason, by = (request.get(name, "") for name in ("alert_id", "reason", "by"))
        if not (isinstance(alert_id, str) and isinstance(reason, str) and isinstance(by, str)):
            return _error(tag, "BAD_REQUEST", "alert_id, reason and by: expected text")
        try:
            alert = self.ledger.acknowledge(alert_id, reason, by)
        except NoSuchAlert as error:
            return _error(tag, "NO_SUCH_ALERT", str(error))
        except AlertClosed as error:
            return _error(tag, "CLOSED", str(error))
        except ValueError as error:
            return _error(tag, "BAD_REQUEST", str(error))
        return _reply(tag, op="ACK", ok=True, alert_id=alert.alert_id, state=str(alert.state))


def _within(events: list[LoggedEvent], size_bytes: int) -> list[LoggedEvent]:
    """The first events, at least one, that fit."""
    kept: list[LoggedEvent] = []
    used = 0
    for event in events:
        used += len(event.body)
        if kept and used > size_bytes:
            break
        kept.append(event)
    return kept


def _reply(tag: object, **parts: object) -> str:
    """One JSON object; `request` gives back what the request carried under that name, so that answers can be told apart."""
    tagged = {"request": tag} if isinstance(tag, int) or (isinstance(tag, str) and len(tag) <= MAX_TAG) else {}
    return json.dumps({**parts, **tagged}, separators=(",", ":"))  # ASCII: half a surrogate in a request is not UTF-8


def _error(tag: object, code: str, text: str) -> str:
    return _reply(tag, error=code, text=text)


def _user(frame: zmq.Frame) -> str:
    """The public key of whoever sent this, as the authenticator found it."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
