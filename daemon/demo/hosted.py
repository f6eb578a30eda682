"""A daemon of its own for the demo: `rescan serve` on loopback ports that the system picks, with a state folder of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from daemon.events import HEARTBEAT_TOPIC, subscription_of

QUIET_FINAL_S = 6.0
"""Silence after which a verdict is final, in the demo alone; a daemon at a scanner waits longer (`rescan config`)."""

LISTEN_LIMIT_S = 120.0
READY_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0
LOOK_S = 0.1

LOG_FILE = "daemon.log"


class DemoError(Exception):
    """The demo cannot go on; one line with the remedy."""


@dataclass(frozen=True)
class Ports:
    """Where the daemon listens, all on 127.0.0.1."""

    dicom: int
    events: int
    replay: int
    http: int


class Hosted:
    """One `rescan serve`, from start to stop.

    Attributes:
        state: its state folder; made before.
        ports: where it listens; known after `start`.
        pid: of its main process.
    """

    def __init__(self, state: Path, flags: Sequence[str] = ()) -> None:
        self.state = state
        self._flags = flags
        self.ports = Ports(0, 0, 0, 0)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the main process; 0 before the start."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            DemoError: it ended, or does not listen in time; with the last line of its log.
        """
        config = self.state / "demo.toml"
        config.write_text(f"[completeness]\nquiet_final_s = {QUIET_FINAL_S}\n", encoding="utf-8")
        loopback = "127.0.0.1:0"
        command = [sys.executable, "-m", "daemon", "serve", "--config", str(config), "--state", str(self.state)]
        command += ["--dicom", loopback, "--http", loopback]
        command += ["--events", f"tcp://{loopback}", "--replay", f"tcp://{loopback}", *self._flags]
        with (self.state / LOG_FILE).open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops the daemon in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait(LISTEN_LIMIT_S, "listen", self._read_ports)

    def wait_ready(self) -> None:
        """Wait until the model is loaded, warmed and checked.

        Raises:
            DemoError: it ended, or is not ready in time; with its own reason.
        """
        self._wait(READY_LIMIT_S, "become ready", lambda: self._probe("/readyz") is None)

    def stop(self) -> None:
        """Ask it to end, and end it where it does not."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def metric_lines(self) -> int:
        """How many samples `/metrics` holds."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.http}/metrics", timeout=5) as answer:
            return sum(1 for line in answer if not line.startswith(b"#"))

    def _wait(self, limit_s: float, what: str, done: Any) -> None:
        deadline = time.monotonic() + limit_s
        while not done():
            if self._process is None or self._process.poll() is not None:
                raise DemoError(f"the daemon ended: {self._last_words()}")
            if time.monotonic() > deadline:
                reason = self._probe("/readyz") or self._last_words()
                raise DemoError(f"the daemon did not {what} within {limit_s:g} s: {reason}; `rescan doctor` tells more")
            time.sleep(LOOK_S)

    def _read_ports(self) -> bool:
        try:
            found = json.loads((self.state / "ports.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        self.ports = Ports(**{name: int(found[name]) for name in ("dicom", "events", "replay", "http")})
        return True

    def _probe(self, path: str) -> str | None:
        """None where the probe says yes, else what it says."""
        if not self.ports.http:
            return "it does not listen"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.http}{path}", timeout=5):
                return None
        except urllib.error.HTTPError as error:
            return error.read(400).decode(errors="replace").strip()
        except OSError as error:
            return str(error)

    def _last_words(self) -> str:
        try:
            lines = (self.state / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "no log"
        return next((line.strip() for line in reversed(lines) if line.strip()), "no log")


class Verdicts:
    """The daemon's verdicts, as any subscriber hears them."""

    def __init__(self, port: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(subscription_of("score"))
        self._socket.subscribe(HEARTBEAT_TOPIC)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._told: set[str] = set()
        self._done: set[str] = set()

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close(linger=0)
        self._context.term()

    def wait_connected(self, limit_s: float = 60.0) -> None:
        """Wait for the first message of any kind: from then on nothing is missed.

        Raises:
            DemoError: nothing was heard.
        """
        if not self._socket.poll(round(limit_s * 1000)):
            raise DemoError(f"no heartbeat of the daemon was heard within {limit_s:g} s; see its log")

    def forget(self, series_ref: str) -> None:
        """Hear no more of a series."""
        self._done.add(series_ref)

    def next(self, limit_s: float) -> dict[str, Any]:
        """The next result that was not seen before.

        Raises:
            DemoError: none came in time.
        """
        deadline = time.monotonic() + limit_s
        while (left := deadline - time.monotonic()) > 0 and self._socket.poll(math.ceil(left * 1000)):
            topic, body = self._socket.recv_multipart()
            if topic.decode() == HEARTBEAT_TOPIC:
                continue
            result: dict[str, Any] = json.loads(body)["data"]
            if result["id"] not in self._told and result["series_ref"] not in self._done:
                self._told.add(result["id"])
                return result
        raise DemoError(f"no verdict within {limit_s:g} s; the log of the daemon tells why")
