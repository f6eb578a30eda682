"""The audit: who acknowledged what, which settings, model and calibration were in force, and what was deleted by hand.

STATE/audit.jsonl is only ever appended to: one JSON object a line, on stable storage before the next thing happens. Each line
carries the SHA-256 of the line before it, so a line that is changed, removed or put in between breaks the chain, which
`rescan audit` shows. That tells of tampering; it does not keep root from writing the whole file anew: keep copies elsewhere.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from daemon.config import ConfigError, Settings, describe, value_at
from daemon.config_command import plain
from daemon.flags import add_settings_flags, settings_from

FILE_NAME = "audit.jsonl"

BEGIN = "0" * 64
"""What stands for the line before the first one."""

_BLOCK = 65536


class Kind(StrEnum):
    """What can stand in the audit."""

    STARTED = "started"
    SETTINGS = "settings"
    RELOAD_REFUSED = "reload_refused"
    MODEL = "model"
    CALIBRATION = "calibration"
    ACKNOWLEDGED = "acknowledged"
    PURGED = "purged"


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        number: dense, from 1.
        at: UTC, ISO 8601.
        kind: what happened.
        data: its facts; no patient data and no secrets.
        previous: SHA-256 of the line before, in hexadecimal.
    """

    number: int
    at: str
    kind: Kind
    data: Mapping[str, Any]
    previous: str


class AuditBroken(ValueError):
    """The chain does not hold; the message names the first line that does not follow from the one before it."""


class Audit:
    """Appends to one file. Calls may come from any thread and process; what the disk did not take is kept and written later."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Append to `path`, made at the first entry; `clock` gives unix seconds."""
        self.path, self._clock = path, clock
        self._waiting: deque[tuple[str, Kind, Mapping[str, Any]]] = deque()

    @property
    def pending(self) -> int:
        """Entries that are not on the disk yet."""
        return len(self._waiting)

    def write(self, kind: Kind, **data: Any) -> None:
        """Add an entry and, with it, what waits.

        Raises:
            OSError: the disk is full or broken; the entry waits for the next call of `write` or `flush`.
        """
        self._waiting.append((_stamp(self._clock()), kind, data))
        self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: the disk is full or broken.
        """
        if not self._waiting:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            while self._waiting:
                _append(descriptor, *self._waiting[0])
                self._waiting.popleft()
        finally:
            os.close(descriptor)

    def last(self, kind: Kind) -> Entry | None:
        """The newest entry of a kind, or None."""
        found = None
        for entry in entries(self.path):
            found = entry if entry.kind is kind else found
        return found

    def settings(self, settings: Settings) -> None:
        """Write the settings in force if they differ from those written last, with what changed.

        Raises:
            OSError: the disk is full or broken; it waits.
        """
        now = {d.path: plain(value_at(settings, d.path)) for d in describe() if "[]" not in d.path}
        last = self.last(Kind.SETTINGS)
        before = {} if last is None else last.data["settings"]
        changed = {p: [before.get(p), now.get(p)] for p in {**before, **now} if before.get(p) != now.get(p)}
        if changed:
            self.write(Kind.SETTINGS, changed={} if last is None else changed, settings=now)

    def differing(self, kind: Kind, **data: Any) -> None:
        """Write facts if they differ from those of this kind written last.

        Raises:
            OSError: the disk is full or broken; it waits.
        """
        last = self.last(kind)
        if last is None or dict(last.data) != data:
            self.write(kind, **data)

    def catch_up(self, feedback: Iterable[Mapping[str, Any]]) -> None:
        """Write the acknowledgements that the ledger holds and the audit lacks, as after a crash between the two.

        Args:
            feedback: rows with alert_id, at (unix seconds), scanner, reason, by.

        Raises:
            OSError: the disk is full or broken; they wait.
        """
        known = {(e.data["alert_id"], e.data["said_at"]) for e in entries(self.path) if e.kind is Kind.ACKNOWLEDGED}
        for row in feedback:
            if (row["alert_id"], _stamp(row["at"])) not in known:
                self.acknowledged(row["alert_id"], row["scanner"], row["reason"], row["by"], row["at"])

    def acknowledged(self, alert_id: str, scanner: str, reason: str | None, by: str | None, at: float) -> None:
        """Write an acknowledgement; `at` is in unix seconds.

        Raises:
            OSError: the disk is full or broken; it waits.
        """
        facts = {"alert_id": alert_id, "scanner": scanner, "reason": reason, "by": by, "said_at": _stamp(at)}
        self.write(Kind.ACKNOWLEDGED, **facts)


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file in hexadecimal; None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _append(descriptor: int, at: str, kind: Kind, data: Mapping[str, Any]) -> None:
    """One line at the end, which is where a torn line of an earlier crash is cut off first."""
    line, size_bytes = _last_line(descriptor)
    if size_bytes != os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, size_bytes)
    number, previous = (json.loads(line)["number"], _sha256(line)) if line else (0, BEGIN)
    fresh = {"number": number + 1, "at": at, "kind": kind, "data": data, "previous": previous}
    text = json.dumps(fresh, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    written = os.write(descriptor, text)
    if written != len(text):  # a nearly full disk takes a part
        os.ftruncate(descriptor, size_bytes)
        raise OSError(28, "No space left on device")
    os.fsync(descriptor)


def _last_line(descriptor: int) -> tuple[bytes, int]:
    """The last whole line without its end, and where it ends."""
    end = os.fstat(descriptor).st_size
    tail, start = b"", end
    while start > 0 and tail.count(b"\n") < 2:
        start = max(0, start - _BLOCK)
        tail = os.pread(descriptor, end - start, start)
    whole = tail[: tail.rfind(b"\n") + 1]
    return whole[:-1].rpartition(b"\n")[2], end - len(tail) + len(whole)


def entries(path: Path) -> Iterator[Entry]:
    """Every entry in order, without looking at the chain; a torn last line is left out."""
    for line in _lines(path):
        yield _entry(line)


def verify(path: Path) -> int:
    """Follow the chain. Returns how many entries it has.

    Raises:
        AuditBroken: a line was changed, removed or put in between; the message names it.
    """
    count, previous = 0, BEGIN
    for line in _lines(path):
        count += 1
        try:
            entry = _entry(line)
        except (ValueError, KeyError, TypeError):
            raise AuditBroken(f"line {count} is no entry; compare the file with a copy") from None
        if entry.number != count or entry.previous != previous:
            raise AuditBroken(f"line {count} does not follow from the one before; compare the file with a copy")
        previous = _sha256(line)
    return count


def _lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return data.split(b"\n")[:-1]


def _entry(line: bytes) -> Entry:
    found = json.loads(line)
    return Entry(found["number"], found["at"], Kind(found["kind"]), found["data"], found["previous"])


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _stamp(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"


# --- the command ------------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan audit`."""
    parser = subparsers.add_parser(
        "audit",
        help="show who acknowledged what, and which settings and model were in force",
        description="Print the audit, oldest first, and check that no line was changed, removed or put in between.",
        epilog="examples:\n  rescan audit --state /var/lib/rescan\n  rescan audit --state /var/lib/rescan --json",
    )
    add_settings_flags(parser)
    parser.add_argument("--json", action="store_true", help="the lines as they stand in the file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print, and check; 1 where the chain is broken."""
    path = settings_from(args).settings.state / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: there is no audit; name the daemon's state folder with --state")
    try:
        count = verify(path)
    except AuditBroken as error:
        print(f"rescan audit: {path}: {error}", file=sys.stderr)
        return 1
    for line in _lines(path):
        print(line.decode() if args.json else _row(_entry(line)))
    print(f"rescan audit: {count} entries; the chain holds", file=sys.stderr)
    return 0


def _row(entry: Entry) -> str:
    """One entry for a reader: of the settings only what changed."""
    data = entry.data["changed"] if entry.kind is Kind.SETTINGS else entry.data
    return f"{entry.at}  {entry.kind:14}  {json.dumps(data, ensure_ascii=False)}"
