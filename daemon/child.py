"""The processes beside the main one: receiver, reader and scorer.

A child is `python -m daemon.child NAME FD`: one socket to the main process, over which it first gets the settings. It dies
with the main process (PR_SET_PDEATHSIG), leaves SIGINT and SIGTERM to it, and stops when told or when the socket closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from daemon.config import TOKEN_VARIABLE, Settings
from daemon.log import Log, quiet_libraries

ENTRIES = {
    "receiver": "daemon.receive:run_receiver",
    "reader": "daemon.reader:run_reader",
    "scorer": "daemon.scorer:run_scorer",
}
"""Name of a process -> what it runs, `(settings, control) -> None`."""

STOP = {"kind": "stop"}
_PR_SET_PDEATHSIG = 1
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 15.0
_HEALTHY_S = 30.0


class Child:
    """One child process, started again after it died, each time after a longer wait."""

    def __init__(self, name: str, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember what to start; `start` starts it.

        Args:
            name: a key of `ENTRIES`.
            settings: sent to the child first.
            clock: monotonic seconds.
        """
        self.name = name
        self.settings = settings
        self.control: Connection | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self._letters: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._clock = clock
        self.wait_s = _FIRST_WAIT_S
        """Seconds between its last death and its next start."""
        self._started = 0.0
        self.due: float | None = None
        """When to start again; None while it runs or was stopped."""

    def start(self) -> None:
        """Start it. Call from the main thread alone: the child dies with the thread that made it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon.child", self.name, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                env=_environment(),
            )
        self.control = Connection(ours.detach())
        self._started, self.due = self._clock(), None
        self._letters = queue.SimpleQueue()
        threading.Thread(target=_post, args=(self._letters, self.control), name=f"to-{self.name}", daemon=True).start()
        self.send(self.settings)

    def send(self, message: object) -> None:
        """Give it a message. Returns at once: a child that does not read never holds up the main process."""
        self._letters.put(message)

    def receive(self) -> list[dict[str, Any]]:
        """What it has said, without waiting.

        Raises:
            EOFError: it is gone and has nothing more to say.
        """
        said: list[dict[str, Any]] = []
        try:
            while self.control is not None and self.control.poll():
                said.append(self.control.recv())
        except (EOFError, OSError):
            if not said:
                raise EOFError(self.name) from None
        return said

    def lost(self) -> int | None:
        """It died: clean up and set the time of its next start.

        Returns:
            Its exit status; negative for a signal.
        """
        status = self.end(limit_s=0.5)
        now = self._clock()
        self.wait_s = _FIRST_WAIT_S if now - self._started > _HEALTHY_S else min(2 * self.wait_s, _LONGEST_WAIT_S)
        self.due = now + self.wait_s
        self.restarts += 1
        return status

    def end(self, limit_s: float) -> int | None:
        """Let it finish for so long, then kill it. Returns its exit status, None if it never ran."""
        if self.process is None:
            return None
        self.send(STOP)
        try:
            status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.send(None)
        if self.control is not None:
            self.control.close()
        self.control = self.process = None
        return status


def _post(letters: queue.SimpleQueue[object], control: Connection) -> None:
    """Carry letters to a child until there are no more or it is gone."""
    with contextlib.suppress(OSError, ValueError):
        while (letter := letters.get()) is not None:
            control.send(letter)


def _environment() -> dict[str, str]:
    """The child's environment: where to find this package; the page's secret stays with the main process."""
    given = dict(os.environ)
    given.pop(TOKEN_VARIABLE, None)
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [_home(), given.get("PYTHONPATH", "")]))
    return given


def _home() -> str:
    """The folder that holds this package, so that a child finds it from any working folder."""
    return str(Path(__file__).resolve().parents[1])


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies.

    Raises:
        SystemExit: the parent has already died.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def main(arguments: list[str]) -> None:
    """Be the child that the arguments name."""
    name, fd, parent = arguments[0], int(arguments[1]), int(arguments[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(parent)
    control = Connection(fd)
    try:
        settings: Settings = control.recv()
    except EOFError:
        return
    quiet_libraries(Log(settings.log.format), name)
    module, _, function = ENTRIES[name].partition(":")
    getattr(importlib.import_module(module), function)(settings, control)


if __name__ == "__main__":
    main(sys.argv[1:])
