"""Events through kills: a publisher and clients that are killed at random, a client that is slow, and what each handled.

`python -m tests.chaos --events 10000` runs it at full length and prints the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from daemon import publish as publish_module
from daemon.client import Client, Endpoints
from daemon.config import EventsSettings
from daemon.ledger import Ledger
from daemon.publish import Publisher
from tests.event_builders import result

ROOT = Path(__file__).parent.parent
STREAMS = ("score", "alert", "series")
PER_RESULT = 4
"""Events of one result here: score, series, alert raised, and the alert before it expired."""

SMALL_QUEUE = 20
SMALL_BUFFER_BYTES = 4096
LIMIT_S = 1800.0


# --- the processes ----------------------------------------------------------------------------------------------------


def small_queues() -> None:
    """Queues so short, and buffers so small, that whoever does not read loses live events."""
    publish_module.SEND_HIGH_WATER = SMALL_QUEUE
    bind, connect = zmq.Socket.bind, zmq.Socket.connect

    def small_bind(self: Any, address: str) -> Any:
        self.setsockopt(zmq.SNDBUF, SMALL_BUFFER_BYTES)
        return bind(self, address)

    def small_connect(self: Any, address: str) -> Any:
        self.setsockopt(zmq.RCVBUF, SMALL_BUFFER_BYTES)
        return connect(self, address)

    zmq.Socket.bind, zmq.Socket.connect = small_bind, small_connect  # type: ignore[method-assign]


def publisher(folder: Path, ports: tuple[int, int], results: int) -> None:
    """Write results, as many as are missing, and publish them until killed."""
    small_queues()
    settings = EventsSettings(
        publish=f"tcp://127.0.0.1:{ports[0]}", replay=f"tcp://127.0.0.1:{ports[1]}", heartbeat_s=0.2
    )
    with contextlib.closing(Ledger(folder / "ledger.db")) as ledger:
        running = Publisher(settings, ledger)
        running.start()
        for number in range(ledger.last_sequences()["score"], results):
            ledger.record(result(f"s{number}", exam=f"e{number}"))
            running.wake()
        (folder / "written").touch()
        signal.pause()


def follower(folder: Path, name: str, ports: tuple[int, int], pause_s: float) -> None:
    """Handle events by appending a line to a file, until killed; write counts down when asked to end."""
    small_queues()
    lines = os.open(folder / f"{name}.handled", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    endpoints = Endpoints(f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}")

    def handle(event: dict[str, Any]) -> None:
        os.write(lines, f"{event['stream']} {event['sequence']}\n".encode())
        if pause_s:
            time.sleep(pause_s)

    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: ended.append(number))
    made = Client(endpoints, handle, streams=STREAMS, position=folder / f"{name}.position")
    while not ended:
        made.turn(0.2)
    (folder / f"{name}.counts").write_text(json.dumps(vars(made.counts)))
    made.close()


# --- what they handled ------------------------------------------------------------------------------------------------


@dataclass
class Handled:
    """What one client did.

    Attributes:
        first: per stream, the sequences in the order they were first handled.
        repeated: how often one was handled again.
        counts: of the client, where it lived to the end.
    """

    first: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in STREAMS})
    repeated: int = 0
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def events(self) -> int:
        return sum(map(len, self.first.values()))


def handled(folder: Path, name: str) -> Handled:
    """Read a client's file."""
    made, seen = Handled(), set()
    file = folder / f"{name}.handled"
    for line in file.read_text().splitlines() if file.exists() else []:
        if line in seen:
            made.repeated += 1
            continue
        seen.add(line)
        stream, sequence = line.split()
        made.first[stream].append(int(sequence))
    counts = folder / f"{name}.counts"
    made.counts = json.loads(counts.read_text()) if counts.exists() else {}
    return made


@dataclass(frozen=True)
class Report:
    """What a run was and what came of it."""

    events: int
    last: dict[str, int]
    kills: dict[str, int]
    pauses: int
    crashes: list[str]
    clients: dict[str, Handled]
    seconds: float

    def faults(self) -> list[str]:
        """Every way in which the promise was broken; empty when it was kept."""
        found = [f"ended by itself: {crash}" for crash in self.crashes]
        for name, made in self.clients.items():
            for stream, last in self.last.items():
                if made.first[stream] != list(range(1, last + 1)):
                    found.append(f"{name}: {stream}: {len(made.first[stream])} of {last}, or not in order")
        return found

    def lines(self) -> list[str]:
        """The numbers."""
        text = [
            f"{self.events} events in {self.seconds:.1f} s: {self.last}",
            f"killed with SIGKILL: {', '.join(f'{who} {count} times' for who, count in self.kills.items())}",
            f"slow client stopped for a while: {self.pauses} times",
        ]
        for name, made in self.clients.items():
            seen = {k: v for k, v in made.counts.items() if k in ("gaps", "replays", "lost")}
            text.append(
                f"{name}: {made.events} handled, {made.repeated} handled again after a kill {seen or ''}".rstrip()
            )
        return [*text, *(f"BROKEN: {fault}" for fault in self.faults())]


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """One run in a folder of its own."""

    def __init__(self, folder: Path, events: int, kills: int, seed: int) -> None:
        """Draw when to kill whom: at random counts of handled events, so that every run makes progress."""
        self.folder, self.events = folder, events
        self.results = events // PER_RESULT + 1  # the last alert does not expire
        self.ports = free_ports()
        draw = random.Random(seed)
        victims = ["publisher", "client", "slow"] * kills
        self.plan = sorted((draw.randrange(1, int(events * 0.9)), victim) for victim in victims)
        self.killed = {"publisher": 0, "client": 0}
        self.pauses = 0
        self.paused_until: int | None = None
        self.crashes: list[str] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self) -> Report:
        """Start, kill, wait until everything was handled."""
        started = time.monotonic()
        try:
            for name in ("publisher", "client", "slow"):
                self.start(name)
            while not self.finished() and time.monotonic() - started < LIMIT_S:
                self.kill_what_is_due()
                self.wake_the_slow_one()
                self.start_what_crashed()
                time.sleep(0.02)
            self.processes["slow"].send_signal(signal.SIGTERM)
            self.processes["slow"].wait(120)
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        with contextlib.closing(Ledger(self.folder / "ledger.db")) as ledger:
            last = {name: ledger.last_sequences()[name] for name in STREAMS}
        clients = {name: handled(self.folder, name) for name in ("client", "slow")}
        return Report(
            sum(last.values()), last, self.killed, self.pauses, self.crashes, clients, time.monotonic() - started
        )

    def start(self, name: str) -> None:
        arguments = {
            "publisher": ["publisher", str(self.results)],
            "client": ["follower", "client", "0"],
            "slow": ["follower", "slow", "0.001"],
        }[name]
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos", "--role", str(self.folder), *map(str, self.ports), *arguments],
            cwd=ROOT,
        )

    def kill_what_is_due(self) -> None:
        while self.plan and self.handled_lines("client") >= self.plan[0][0]:
            at, victim = self.plan.pop(0)
            if victim == "slow":
                self.pause_the_slow_one(at)
                continue
            self.processes[victim].kill()
            self.processes[victim].wait()
            self.killed[victim] += 1
            self.start(victim)

    def pause_the_slow_one(self, at: int) -> None:
        """Stop it while the other handles some more: its queue fills, and live events are dropped for it."""
        self.processes["slow"].send_signal(signal.SIGSTOP)
        self.pauses += 1
        self.paused_until = at + max(self.events // 20, PER_RESULT * SMALL_QUEUE)

    def wake_the_slow_one(self) -> None:
        if self.paused_until is None:
            return
        if not self.plan or self.handled_lines("client") >= min(self.paused_until, self.events * 0.95):
            self.processes["slow"].send_signal(signal.SIGCONT)
            self.paused_until = None

    def start_what_crashed(self) -> None:
        """A process that ended without being killed is a fault; the run goes on."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                self.crashes.append(f"{name}, status {process.returncode}")
                self.start(name)

    def finished(self) -> bool:
        """Everything is written, and the positions of both clients say that everything was handled."""
        if self.plan or self.paused_until is not None or not (self.folder / "written").exists():
            return False
        wanted = {"score": self.results, "series": self.results, "alert": 2 * self.results - 1}
        return all(self.position(name) == wanted for name in ("client", "slow"))

    def position(self, name: str) -> dict[str, int]:
        file = self.folder / f"{name}.position"
        return dict(json.loads(file.read_text())["last"]) if file.exists() else {}

    def handled_lines(self, name: str) -> int:
        return sum(self.position(name).values())


def free_ports() -> tuple[int, int]:
    """Two ports that stay the same through restarts of the publisher."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@contextlib.contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main() -> int:
    """Run, or be one of the processes."""
    if sys.argv[1:2] == ["--role"]:
        folder, first, second, role, *rest = sys.argv[2:]
        ports = (int(first), int(second))
        if role == "publisher":
            publisher(Path(folder), ports, int(rest[0]))
        else:
            follower(Path(folder), rest[0], ports, float(rest[1]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=25, help="of each, publisher and client")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with folder_of(None) as folder:
        report = Run(folder, args.events, args.kills, args.seed).run()
    print("\n".join(report.lines()))
    return 1 if report.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
