"""The ledger: results, alerts and the event log in one SQLite file, each change in one transaction.

Whatever anyone is told is read from here, so a crash at any moment loses nothing that was said and says nothing that is
lost. One connection writes, under a lock; every thread reads through its own. The file is WAL with `synchronous=FULL`: a
committed transaction survives a power cut. Results are kept by their references; no UID and no name reaches this file.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from daemon.alert import AckReason, Effect, Input, State, severity_of
from daemon.config import AlertSettings
from daemon.ledger_changes import AlertChange, Changes, device_of, expires_at, lane_of
from daemon.ledger_file import open_writer
from daemon.ledger_reader import Last, LedgerReader
from daemon.ledger_rows import Alert, LoggedEvent, alert_where, insert_result, is_known, series_data

__all__ = [
    "Alert",
    "AlertChange",
    "AlertClosed",
    "Last",
    "Ledger",
    "LoggedEvent",
    "NoSuchAlert",
    "Recorded",
]

CUT_ROWS = 2000
"""Events removed in one transaction, so that retention never holds up a verdict."""

MAX_BY = 64
"""Longest name of whoever acknowledges."""


class NoSuchAlert(Exception):
    """An alert identifier that the ledger does not know."""


class AlertClosed(Exception):
    """An acknowledgement of an alert that is no longer waiting for one; the message says what became of it."""


@dataclass(frozen=True)
class Recorded:
    """What `record` did.

    Attributes:
        new: False where the ledger held this result already.
        changes: to alerts.
    """

    new: bool
    changes: tuple[AlertChange, ...] = ()


class Ledger(LedgerReader):
    """The ledger of one state folder. Methods may be called from any thread."""

    def __init__(
        self,
        path: Path,
        alerts: AlertSettings | None = None,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[AlertChange], None] | None = None,
    ) -> None:
        """Open the file, or make it; bring older tables up to date.

        Args:
            path: of the SQLite file, on a local disk.
            alerts: limits of alerts; the defaults where None.
            clock: unix seconds.
            on_change: told of each change to an alert after it is durable, in the thread that made it.

        Raises:
            LedgerError: not a ledger, damaged, or written by a newer version; the file is left as it was.
        """
        super().__init__(path)
        self._writer = open_writer(path)
        self.alerts = alerts or AlertSettings()
        self.on_change = on_change
        self._clock = clock
        self._lock = threading.RLock()
        self._version = 0
        self.epoch: str = self._writer.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]

    @classmethod
    def open(cls, path: Path, alerts: AlertSettings | None = None) -> Ledger:
        """As the constructor."""
        return cls(path, alerts)

    def close(self) -> None:
        """Close the file; other threads must have stopped using it."""
        super().close()
        with self._lock:
            self._writer.close()

    def version(self) -> int:
        """A number that grows with every change made by this process."""
        return self._version

    # --- results ------------------------------------------------------------------------------------------------------

    def record(self, result: Mapping[str, Any], protocol: str | None = None, now: float | None = None) -> Recorded:
        """Write a result, what it does to alerts, and the events that say so: one transaction.

        Args:
            result: the result object.
            protocol: what makes a later scan a repeat of this one, such as a keyed hash of the protocol's name;
                `series.protocol_ref` of the result, then the policy's rule, where None.
            now: unix seconds; the clock's where None.

        Returns:
            What was done; nothing where this result, or a final one of the same stack and revision, is there already.

        Raises:
            sqlite3.Error: the disk is full or broken; nothing was written.
        """
        at = self._clock() if now is None else now
        with self._transaction() as db:
            if is_known(db, result):
                return Recorded(new=False)
            kind = protocol or result.get("series", {}).get("protocol_ref") or result["policy"].get("rule") or ""
            insert_result(db, result, kind, at)
            write = self._changes(db)
            write.append("score", at, result, result["scanner"])
            write.append("series", at, series_data(result), result["scanner"])
            changes = [
                *write.start_exam(result["scanner"], device_of(result), result["exam_ref"], at),
                *write.own_verdict(result, kind, at),
                *write.repeat_of_others(result, kind, at),
            ]
            db.execute("DELETE FROM strike WHERE stack_ref = ? AND ?", (result["stack_ref"], result["final"]))
        self._tell(changes)
        return Recorded(True, tuple(changes))

    def strike(self, stack_ref: str) -> int:
        """Count a death of the scorer while it held this stack; a final result clears the count.

        Returns:
            How many there are now.
        """
        with self._transaction() as db:
            row = db.execute(
                "INSERT INTO strike VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count",
                (stack_ref,),
            ).fetchone()
        return int(row[0])

    def exam_started(self, scanner: str, exam_ref: str, now: float | None = None, device: str | None = None) -> None:
        """An instance of this exam has come: alerts of the scanner's earlier exams expire.

        Args:
            scanner: configured slug, else `unknown`.
            exam_ref: of the exam.
            now: unix seconds; the clock's where None.
            device: keyed hash of the machine that the header names. Callers that share the name `unknown` may be several
                scanners: an exam ends alerts of the same machine alone, and where none is named nothing but time does.
        """
        at = self._clock() if now is None else now
        lane = lane_of(scanner, device) or scanner
        if self._read("SELECT 1 FROM exam WHERE scanner = ? AND exam_ref = ?", (lane, exam_ref)).fetchone():
            return
        with self._transaction() as db:
            changes = self._changes(db).start_exam(scanner, device, exam_ref, at)
        self._tell(changes)

    # --- alerts -------------------------------------------------------------------------------------------------------

    def acknowledge(self, alert_id: str, reason: str, by: str, now: float | None = None) -> Alert:
        """Write down that a person has decided.

        Args:
            alert_id: of the alert.
            reason: one of `AckReason`.
            by: who; printable, shortened to 64 characters.
            now: unix seconds; the clock's where None.

        Returns:
            The alert as it stands then.

        Raises:
            NoSuchAlert: it is not in the ledger.
            AlertClosed: it has ended.
            ValueError: the reason is not on the list.
        """
        at = self._clock() if now is None else now
        if reason not in set(AckReason):
            raise ValueError(f"reason: got {reason!r}; use one of {', '.join(AckReason)}")
        name = "".join(c for c in by if c.isprintable()).strip()[:MAX_BY]
        with self._transaction() as db:
            alert = alert_where(db, "alert_id = ?", (alert_id,))
            if alert is None or alert.state is State.SUPPRESSED:
                raise NoSuchAlert(f"No alert {alert_id!r}.")
            change = self._changes(db).happen(alert, Input.ACKNOWLEDGE, at, reason=str(reason), by=name)
            if change.effect is Effect.REFUSE:
                raise AlertClosed(f"The alert is {alert.state} already; there is nothing to acknowledge.")
            db.execute(
                "INSERT INTO feedback (alert_id, at, reason, by) VALUES (?, ?, ?, ?)", (alert_id, at, reason, name)
            )
        self._tell([change])
        return change.alert

    def displayed(self, alert_id: str, now: float | None = None) -> None:
        """Write down the first time a page showed an alert; later calls change nothing.

        Raises:
            NoSuchAlert: it is not in the ledger.
        """
        at = self._clock() if now is None else now
        alert = self.alert(alert_id)
        if alert is None:
            raise NoSuchAlert(f"No alert {alert_id!r}.")
        if alert.shown_at is not None:
            return
        with self._transaction() as db:
            found = db.execute(
                "UPDATE alert SET shown_at = ? WHERE alert_id = ? AND shown_at IS NULL", (at, alert_id)
            ).rowcount
        if found:
            shown = replace(alert, shown_at=at)
            waited = max(at - alert.raised_at, 0.0)
            self._tell([AlertChange(shown, Effect.NOTHING, None, waited, severity_of(shown.confirmed))])

    def tick(self, now: float | None = None) -> int:
        """Let time pass: alerts that nobody said anything about expire.

        Returns:
            How many did.
        """
        at = self._clock() if now is None else now
        due = [alert for alert in self.open_alerts() if expires_at(alert, self.alerts) <= at]
        if not due:
            return 0
        changes = []
        with self._transaction() as db:
            for each in due:
                alert = alert_where(db, "alert_id = ?", (each.alert_id,))
                if alert is not None and expires_at(alert, self.alerts) <= at:
                    changes.append(self._changes(db).happen(alert, Input.TIME_UP, at))
        self._tell(changes)
        return len(changes)

    def record_health(self, data: Mapping[str, Any], now: float | None = None) -> bool:
        """Write a health event if it says something new.

        Returns:
            Whether it did.
        """
        at = self._clock() if now is None else now
        text = json.dumps(data, sort_keys=True)
        with self._transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'health'").fetchone()
            if row is not None and row[0] == text:
                return False
            db.execute("INSERT OR REPLACE INTO meta VALUES ('health', ?)", (text,))
            self._changes(db).append("health", at, data, None)
        return True

    def record_series(self, scanner: str, data: Mapping[str, Any], now: float | None = None) -> None:
        """Write a series event, such as the begin of a series; `data` names no one and holds no UID."""
        at = self._clock() if now is None else now
        with self._transaction() as db:
            self._changes(db).append("series", at, data, scanner)

    def cut(self, older_than_s: float, alerts_older_than_s: float, now: float | None = None) -> int:
        """Remove old events, some at a time; sequences go on.

        Returns:
            How many were removed; call again while it is above 0.
        """
        at = self._clock() if now is None else now
        with self._transaction() as db:
            return db.execute(
                "DELETE FROM event WHERE number IN (SELECT number FROM event WHERE "
                "(stream = 'alert' AND at < ?) OR (stream <> 'alert' AND at < ?) LIMIT ?)",
                (at - alerts_older_than_s, at - older_than_s, CUT_ROWS),
            ).rowcount

    # --- transactions --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The write connection inside BEGIN IMMEDIATE ... COMMIT; rolled back on any error."""
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
                self._version += 1
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                raise

    def _changes(self, db: sqlite3.Connection) -> Changes:
        return Changes(db, self.alerts, self.epoch)

    def _tell(self, changes: Sequence[AlertChange]) -> None:
        if self.on_change is not None:
            for change in changes:
                self.on_change(change)
