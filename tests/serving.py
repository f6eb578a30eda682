"""A `rescan serve` of its own for a test, and a subscriber written with plain pyzmq. Waits are on events, with limits."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 60.0
"""Longest wait on a machine that has nothing else to do; a busy one gets more."""


def patience(limit_s: float) -> float:
    """A limit stretched by how many others want the processors."""
    return limit_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


QUICK = """
[completeness]
quiet_provisional_s = 2.0
quiet_final_s = 3.0
[events]
heartbeat_s = 0.2
"""
"""Settings that keep tests short."""


class Lines:
    """The lines of a stream, as they come."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.changed = threading.Condition()
        self.ended = False
        self.stream: Any = None

    def read(self, stream: Any) -> None:
        for line in stream:
            with self.changed:
                self.all.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.ended = self.ended or stream is self.stream
            self.changed.notify_all()

    def wait(
        self, matches: Callable[[dict[str, str]], bool], limit_s: float = LIMIT_S, start: int = 0
    ) -> dict[str, str]:
        """The first line from `start` on whose fields match."""
        deadline = time.monotonic() + patience(limit_s)
        with self.changed:
            while True:
                for line in self.all[start:]:
                    if matches(fields(line)):
                        return fields(line)
                start = len(self.all)
                left = deadline - time.monotonic()
                if left <= 0 or self.ended:
                    raise TimeoutError("no such log line; the last were\n" + "\n".join(self.all[-30:]))
                self.changed.wait(min(left, 1.0))

    def until(self, holds: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Wait until something holds; looked at after each new line."""
        deadline = time.monotonic() + patience(limit_s)
        with self.changed:
            while not holds():
                left = deadline - time.monotonic()
                if left <= 0 or self.ended:
                    raise TimeoutError("it never held; the last lines were\n" + "\n".join(self.all[-30:]))
                self.changed.wait(min(left, 1.0))


def fields(line: str) -> dict[str, str]:
    """The fields of a log line; {} where it is none."""
    try:
        return dict(part.split("=", 1) for part in shlex.split(line) if "=" in part)
    except ValueError:
        return {}


class Serving:
    """One daemon on free ports, with its log."""

    def __init__(
        self, state: Path, *, model: Path | None = None, config: str = QUICK, arguments: tuple[str, ...] = ()
    ) -> None:
        self.state, self.model, self.arguments = state, model, arguments
        self.config = state.parent / f"{state.name}.toml"
        self.config.write_text(config, encoding="utf-8")
        self.process: subprocess.Popen[str] | None = None
        self.log = Lines()
        self.ports: dict[str, int] = {}
        self.prefix: tuple[str, ...] = ()

    def __enter__(self) -> Serving:
        return self if self.process is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, ready: bool = True) -> Serving:
        """Start it and wait until its ports are known, and, unless told otherwise, until it is ready."""
        model = () if self.model is None else ("--model", str(self.model))
        command = [
            *self.prefix,
            sys.executable,
            "-m",
            "daemon",
            "serve",
            "--config",
            str(self.config),
            "--state",
            str(self.state),
        ]
        ports = (
            "--dicom",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--events",
            "tcp://127.0.0.1:0",
            "--replay",
            "tcp://127.0.0.1:0",
        )
        first, self.log.ended = len(self.log.all), False
        self.process = subprocess.Popen(
            [*command, *ports, *model, *self.arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.log.stream = self.process.stderr
        self._reading = threading.Thread(target=self.log.read, args=(self.process.stderr,), daemon=True)
        self._reading.start()
        try:
            self.log.wait(lambda f: f.get("event") == "started", start=first)
            self.ports = json.loads((self.state / "ports.json").read_text(encoding="utf-8"))
            if ready:
                self.log.wait(lambda f: f.get("event") == "ready", start=first)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        return self._ended()

    def kill(self) -> int:
        """SIGKILL to the main process."""
        assert self.process is not None
        self.process.kill()
        return self._ended()

    def _ended(self) -> int:
        assert self.process is not None
        try:
            status = self.process.wait(patience(20))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self._reading.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None
        return status

    def children(self) -> dict[str, int]:
        """Name of each child -> its process id."""
        assert self.process is not None
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "daemon.child" in words:
                    found[words[words.index("daemon.child") + 1]] = int(pid)
        return found

    def get(self, path: str, limit_s: float = 5.0) -> tuple[int, str]:
        """Status and body of an HTTP path that answers with text."""
        status, body = self.get_bytes(path, limit_s)
        return status, body.decode()

    def get_bytes(self, path: str, limit_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body of an HTTP path: a picture, or anything else."""
        url = f"http://127.0.0.1:{self.ports['http']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=patience(limit_s)) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def picture(self, result_id: str, name: str, limit_s: float = LIMIT_S) -> bytes:
        """One picture of a result, once it is drawn: the verdict is told first."""
        deadline, pause = time.monotonic() + patience(limit_s), threading.Event()
        while (answer := self.get_bytes(f"/pictures/{result_id}/{name}"))[0] != 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no picture {name}: the last answer was {answer[0]}")
            pause.wait(0.1)
        return answer[1]

    def metrics(self) -> dict[str, float]:
        """Name{labels} -> value."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def results(self, start: int = 0) -> list[dict[str, str]]:
        """The log lines of results."""
        return [f for f in map(fields, self.log.all[start:]) if f.get("event") == "series"]

    def wait_result(self, *, final: bool = True, limit_s: float = LIMIT_S, start: int = 0) -> dict[str, str]:
        """The first result logged from line `start` on."""
        word = "true" if final else "false"
        return self.log.wait(lambda f: f.get("event") == "series" and f.get("final") == word, limit_s, start)


class Listener:
    """A subscriber with plain pyzmq: every message as (topic, body), in order."""

    def __init__(self, port: int, topic: str = "") -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.raw: list[bytes] = []
        self._changed = threading.Condition()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)
        self._socket.close(0)
        self._context.term()

    def _listen(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(100):
                continue
            topic, body = self._socket.recv_multipart()
            with self._changed:
                self.raw += [topic, body]
                self.messages.append((topic.decode(), json.loads(body)))
                self._changed.notify_all()

    def wait(self, matches: Callable[[str, dict[str, Any]], bool], limit_s: float = LIMIT_S) -> dict[str, Any]:
        """The first body that matches, past or future."""
        deadline, seen = time.monotonic() + patience(limit_s), 0
        with self._changed:
            while True:
                for topic, body in self.messages[seen:]:
                    if matches(topic, body):
                        return body
                seen = len(self.messages)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"no such event among {[t for t, _ in self.messages if 'heartbeat' not in t]}")
                self._changed.wait(min(left, 1.0))

    def connected(self) -> Listener:
        """Wait for the first heartbeat: from then on nothing is missed."""
        self.wait(lambda topic, _: topic.startswith("v1/heartbeat/"))
        return self

    def scores(self, final: bool | None = None) -> list[dict[str, Any]]:
        """The results received so far."""
        found = [b["data"] for t, b in self.messages if t.startswith("v1/score/")]
        return [d for d in found if final is None or d["final"] is final]


def storescu(folder: Path, port: int, *options: str, calling: str = "STORESCU") -> subprocess.CompletedProcess[str]:
    """Push a folder with DCMTK's sender."""
    return subprocess.run(
        ["storescu", "-aet", calling, "-aec", "RESCAN", "+sd", *options, "127.0.0.1", str(port), str(folder)],
        capture_output=True,
        text=True,
        timeout=patience(300),
        env={**os.environ, "TCP_NODELAY": "1"},
    )
