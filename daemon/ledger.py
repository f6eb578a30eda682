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

from daemon.alert import (
    OPEN,
    AckReason,
    Effect,
    Input,
    State,
    Told,
    alert_data,
    alert_id_of,
    own_input,
    repeat_input,
    severity_of,
    step,
)
from daemon.config import UNKNOWN_SCANNER, AlertSettings
from daemon.events import STREAMS, body_of, event_id, topic_of
from daemon.ledger_file import connect, open_writer

CUT_ROWS = 2000
"""Events removed in one transaction, so that retention never holds up a verdict."""

MAX_BY = 64
"""Longest name of whoever acknowledges."""


class NoSuchAlert(Exception):
    """An alert identifier that the ledger does not know."""


class AlertClosed(Exception):
    """An acknowledgement of an alert that is no longer waiting for one; the message says what became of it."""


@dataclass(frozen=True)
class Last:
    """What is known of a stack's newest result."""

    id: str
    revision: int
    final: bool


@dataclass(frozen=True)
class LoggedEvent:
    """One event as it is sent.

    Attributes:
        number: order over all streams.
        stream: of the event.
        sequence: dense within the stream, from 1.
        topic: first frame.
        body: second frame, JSON.
    """

    number: int
    stream: str
    sequence: int
    topic: str
    body: str


@dataclass(frozen=True)
class Alert:
    """The alert of one stack as it stands.

    Attributes:
        protocol: what makes a later scan a repeat of this one.
        result_id: newest result of its stack.
        confirmed: whether a final verdict stands behind it.
        ended_at: unix seconds of the stack's last instance; None where unknown.
        raised_at: unix seconds.
        changed_at: unix seconds of the last change.
        shown_at: first display on a page; None until then.
        acknowledged_at: first acknowledgement; None until then.
        reason: why it was acknowledged, the newest word; None until then.
        by: who acknowledged it.
        ended_by: id of the result that ended it, or None.
        sequence: of its newest event in the stream `alert`; 0 if none was published.
    """

    alert_id: str
    stack_ref: str
    exam_ref: str
    scanner: str
    protocol: str
    result_id: str
    state: State
    confirmed: bool
    ended_at: float | None
    raised_at: float
    changed_at: float
    shown_at: float | None = None
    acknowledged_at: float | None = None
    reason: str | None = None
    by: str | None = None
    ended_by: str | None = None
    sequence: int = 0


@dataclass(frozen=True)
class AlertChange:
    """What happened to an alert, for whoever counts.

    Attributes:
        alert: as it stands now.
        effect: what the table said; `NOTHING` for a first display.
        happened: the input; None for a first display.
        seconds: what is worth measuring: from the last instance to raising, from raising to the first display or the first
            acknowledgement; None otherwise or where unknown.
        severity: of the alert now.
        artefact: dominant one of its result, or None.
    """

    alert: Alert
    effect: Effect
    happened: Input | None
    seconds: float | None
    severity: str
    artefact: str | None = None


@dataclass(frozen=True)
class Recorded:
    """What `record` did.

    Attributes:
        new: False where the ledger held this result already.
        changes: to alerts.
    """

    new: bool
    changes: tuple[AlertChange, ...] = ()


class Ledger:
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
        self.path = path
        self.alerts = alerts or AlertSettings()
        self.on_change = on_change
        self._clock = clock
        self._lock = threading.RLock()
        self._readers = threading.local()
        self._open_readers: list[sqlite3.Connection] = []
        self._writer = open_writer(path)
        self._version = 0
        self.epoch: str = self._writer.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]

    @classmethod
    def open(cls, path: Path, alerts: AlertSettings | None = None) -> Ledger:
        """As the constructor."""
        return cls(path, alerts)

    def close(self) -> None:
        """Close the file; other threads must have stopped using it."""
        with self._lock:
            for reader in self._open_readers:
                reader.close()
            self._open_readers.clear()
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
            if _is_known(db, result):
                return Recorded(new=False)
            kind = protocol or result.get("series", {}).get("protocol_ref") or result["policy"].get("rule") or ""
            _insert_result(db, result, kind, at)
            self._append(db, "score", at, result, result["scanner"])
            self._append(db, "series", at, _series_data(result), result["scanner"])
            changes = [
                *self._start_exam(db, result["scanner"], result["exam_ref"], at),
                *self._own_verdict(db, result, kind, at),
                *self._repeat_of_others(db, result, kind, at),
            ]
            db.execute("DELETE FROM strike WHERE stack_ref = ? AND ?", (result["stack_ref"], result["final"]))
        self._tell(changes)
        return Recorded(True, tuple(changes))

    def last_result(self, stack_ref: str) -> Last | None:
        """The newest result of a stack, or None."""
        row = self._read(
            "SELECT id, revision, final FROM result WHERE stack_ref = ? ORDER BY number DESC LIMIT 1", (stack_ref,)
        ).fetchone()
        return None if row is None else Last(row["id"], row["revision"], bool(row["final"]))

    def seen(self, result_id: str) -> bool:
        """Whether this result was written."""
        return self._read("SELECT 1 FROM result WHERE id = ?", (result_id,)).fetchone() is not None

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

    def exam_started(self, scanner: str, exam_ref: str, now: float | None = None) -> None:
        """An instance of this exam has come: alerts of the scanner's earlier exams expire.

        Callers that share the name `unknown` may be several scanners, so their alerts end by time alone.
        """
        at = self._clock() if now is None else now
        known = self._read("SELECT 1 FROM exam WHERE scanner = ? AND exam_ref = ?", (scanner, exam_ref)).fetchone()
        if known is not None:
            return
        with self._transaction() as db:
            changes = self._start_exam(db, scanner, exam_ref, at)
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
            alert = _alert(db, "alert_id = ?", (alert_id,))
            if alert is None or alert.state is State.SUPPRESSED:
                raise NoSuchAlert(f"No alert {alert_id!r}.")
            change = self._happen(db, alert, Input.ACKNOWLEDGE, at, reason=str(reason), by=name)
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
        due = [alert for alert in self.open_alerts() if self._expires_at(alert) <= at]
        if not due:
            return 0
        changes = []
        with self._transaction() as db:
            for each in due:
                alert = _alert(db, "alert_id = ?", (each.alert_id,))
                if alert is not None and self._expires_at(alert) <= at:
                    changes.append(self._happen(db, alert, Input.TIME_UP, at))
        self._tell(changes)
        return len(changes)

    def alert(self, alert_id: str) -> Alert | None:
        """One alert."""
        return _alert(self._reader(), "alert_id = ?", (alert_id,))

    def alert_of_stack(self, stack_ref: str) -> Alert | None:
        """The alert of a stack, if it has one that was published."""
        found = _alert(self._reader(), "stack_ref = ?", (stack_ref,))
        return None if found is None or found.state is State.SUPPRESSED else found

    def open_alerts(self, scanner: str | None = None) -> list[Alert]:
        """Alerts that are raised or acknowledged, oldest first."""
        where = f"state IN ({_marks(OPEN)}) AND (scanner = ? OR ? IS NULL) ORDER BY raised_at, alert_id"
        return _alerts(self._reader(), where, (*OPEN, scanner, scanner))

    def suppressed(self, scanner: str, exam_ref: str) -> int:
        """How many alerts of an exam the limit held back."""
        return _count_alerts(self._reader(), scanner, exam_ref, suppressed=True)

    # --- events -------------------------------------------------------------------------------------------------------

    def events_after(self, stream: str, sequence: int, limit: int) -> list[LoggedEvent]:
        """Events of one stream after a sequence, in order."""
        where = "stream = ? AND sequence > ? ORDER BY sequence LIMIT ?"
        return self._events(where, (stream, sequence, limit))

    def events_since(self, number: int, limit: int) -> list[LoggedEvent]:
        """Events of all streams after a number, in the order they were written."""
        return self._events("number > ? ORDER BY number LIMIT ?", (number, limit))

    def last_number(self) -> int:
        """Number of the newest event over all streams, 0 for none."""
        return int(self._read("SELECT COALESCE(MAX(number), 0) FROM event").fetchone()[0])

    def last_sequences(self) -> dict[str, int]:
        """Stream -> its last sequence, 0 for none."""
        found = {name: int(last) for name, last in self._read("SELECT name, last FROM stream")}
        return {name: found.get(name, 0) for name in STREAMS}

    def first_sequence(self, stream: str) -> int:
        """The first sequence of a stream that the log still holds; one past the last where it holds none."""
        row = self._read("SELECT MIN(sequence) FROM event WHERE stream = ?", (stream,)).fetchone()
        return int(row[0]) if row[0] is not None else self.last_sequences()[stream] + 1

    def open_alert_events(self) -> list[LoggedEvent]:
        """The newest event of each open alert, in order."""
        marks = _marks(OPEN)
        return self._events(
            f"stream = 'alert' AND sequence IN (SELECT sequence FROM alert WHERE state IN ({marks})) "  # noqa: S608
            "ORDER BY sequence",
            tuple(OPEN),
        )

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
            self._append(db, "health", at, data, None)
        return True

    def record_series(self, scanner: str, data: Mapping[str, Any], now: float | None = None) -> None:
        """Write a series event, such as the begin of a series; `data` names no one and holds no UID."""
        at = self._clock() if now is None else now
        with self._transaction() as db:
            self._append(db, "series", at, data, scanner)

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

    # --- history ------------------------------------------------------------------------------------------------------

    def results(
        self,
        *,
        scanner: str = "",
        rule: str = "",
        verdict: str = "",
        exam_ref: str = "",
        since: float | None = None,
        until: float | None = None,
        newest_of_stack: bool = True,
        limit: int = 500,
    ) -> list[tuple[float, dict[str, Any]]]:
        """Results by filter, newest first, each with the unix seconds it was written.

        Args:
            scanner: configured slug; every one where empty, as for the next three.
            rule: name of the rule.
            verdict: word of the verdict.
            exam_ref: reference of the exam.
            since: unix seconds, inclusive.
            until: unix seconds, exclusive.
            newest_of_stack: leave out results that a newer one of the same stack replaced.
            limit: most returned.
        """
        tests, values = ["1"], []
        for name, value in (("scanner", scanner), ("rule", rule), ("verdict", verdict), ("exam_ref", exam_ref)):
            if value:
                tests.append(f"{name} = ?")
                values.append(value)
        if newest_of_stack:
            tests.append("number = (SELECT MAX(number) FROM result AS newer WHERE newer.stack_ref = result.stack_ref)")
        low, high = (-1e18 if since is None else since), (1e18 if until is None else until)
        query = (
            f"SELECT at, body FROM result WHERE at >= ? AND at < ? AND {' AND '.join(tests)} "  # noqa: S608 (fixed names)
            "ORDER BY number DESC LIMIT ?"
        )
        return [(at, json.loads(body)) for at, body in self._read(query, (low, high, *values, limit))]

    def result(self, result_id: str) -> tuple[float, dict[str, Any]] | None:
        """One result with the unix seconds it was written."""
        row = self._read("SELECT at, body FROM result WHERE id = ?", (result_id,)).fetchone()
        return None if row is None else (row["at"], json.loads(row["body"]))

    def facets(self) -> tuple[list[str], list[str]]:
        """The scanners and the rules that the history holds, sorted."""
        scanners = [row[0] for row in self._read("SELECT DISTINCT scanner FROM result ORDER BY 1")]
        rules = [row[0] for row in self._read("SELECT DISTINCT rule FROM result WHERE rule <> '' ORDER BY 1")]
        return scanners, rules

    def all_alerts(self, since: float | None = None, until: float | None = None) -> list[Alert]:
        """Every alert by the time it was raised, the suppressed ones too."""
        low, high = (-1e18 if since is None else since), (1e18 if until is None else until)
        return _alerts(self._reader(), "raised_at >= ? AND raised_at < ? ORDER BY raised_at, alert_id", (low, high))

    def feedback(self, since: float | None = None, until: float | None = None) -> list[dict[str, Any]]:
        """Every acknowledgement in order: alert_id, at, reason, by, and scanner, rule, result_id of the alert."""
        low, high = (-1e18 if since is None else since), (1e18 if until is None else until)
        rows = self._read(
            "SELECT f.alert_id, f.at, f.reason, f.by, a.scanner, a.stack_ref, a.result_id FROM feedback f "
            "JOIN alert a USING (alert_id) WHERE f.at >= ? AND f.at < ? ORDER BY f.number",
            (low, high),
        )
        return [dict(row) for row in rows]

    def facts(self) -> dict[str, Any]:
        """What the alerts have been worth: counts by state, median seconds, and the share called wrong."""
        alerts = [a for a in self.all_alerts() if a.state is not State.SUPPRESSED]
        judged = [a for a in alerts if a.reason is not None]
        wrong = sum(a.reason == AckReason.WRONG for a in judged)
        seconds = {
            "last_instance_to_alert_s": [a.raised_at - a.ended_at for a in alerts if a.ended_at is not None],
            "alert_to_display_s": [a.shown_at - a.raised_at for a in alerts if a.shown_at is not None],
            "alert_to_acknowledgement_s": [
                a.acknowledged_at - a.raised_at for a in alerts if a.acknowledged_at is not None
            ],
        }
        return {
            "alerts": {str(s): sum(a.state is s for a in alerts) for s in State if any(a.state is s for a in alerts)},
            "acknowledged": len(judged),
            "wrong": wrong,
            **({"wrong_share": wrong / len(judged)} if judged else {}),
            **{name: sorted(values)[len(values) // 2] for name, values in seconds.items() if values},
        }

    # --- inside a transaction -----------------------------------------------------------------------------------------

    def _own_verdict(
        self, db: sqlite3.Connection, result: Mapping[str, Any], protocol: str, at: float
    ) -> list[AlertChange]:
        """What a result does to the alert of its own stack."""
        scanner, exam = result["scanner"], result["exam_ref"]
        alert = _alert(db, "stack_ref = ?", (result["stack_ref"],)) or _quiet(result, protocol, at)
        raised = _count_alerts(db, scanner, exam, suppressed=False)
        happened = own_input(result, alert.state, self.alerts, raised)
        alert = replace(alert, result_id=result["id"], ended_at=result.get("series", {}).get("ended_at"))
        change = self._happen(db, alert, happened, at, result=result)
        if change.effect is Effect.COUNT:
            self._say_suppressed(db, scanner, exam, at)
        changes = [change] if change.effect is not Effect.NOTHING else []
        return changes + (self._too_late(db, change.alert, at) if change.effect is Effect.RAISE else [])

    def _too_late(self, db: sqlite3.Connection, alert: Alert, at: float) -> list[AlertChange]:
        """An alert may be overtaken before it is raised: by a repeat that was judged first, or by the next exam."""
        mine = _result_body(db, alert.result_id)
        for body in _repeats_of(db, alert):
            happened = repeat_input(body, mine)
            if happened is not None:
                return [self._happen(db, alert, happened, at, ended_by=body["id"])]
        if _exam_is_over(db, alert.scanner, alert.exam_ref):
            return [self._happen(db, alert, Input.OTHER_EXAM, at)]
        return []

    def _repeat_of_others(
        self, db: sqlite3.Connection, result: Mapping[str, Any], protocol: str, at: float
    ) -> list[AlertChange]:
        """What a final result does to open alerts of earlier scans that it repeats."""
        ended_at = result.get("series", {}).get("ended_at")
        changes = []
        where = f"state IN ({_marks(OPEN)}) AND exam_ref = ? AND scanner = ? AND protocol = ? AND stack_ref <> ?"
        asked = (*OPEN, result["exam_ref"], result["scanner"], protocol, result["stack_ref"])
        for alert in _alerts(db, where, asked):
            if ended_at is not None and alert.ended_at is not None and ended_at <= alert.ended_at:
                continue
            happened = repeat_input(result, _result_body(db, alert.result_id))
            if happened is not None:
                changes.append(self._happen(db, alert, happened, at, ended_by=result["id"]))
        return changes

    def _start_exam(self, db: sqlite3.Connection, scanner: str, exam_ref: str, at: float) -> list[AlertChange]:
        """Note the begin of an exam; what is open of the scanner's other exams expires."""
        if not db.execute("INSERT OR IGNORE INTO exam VALUES (?, ?, ?)", (scanner, exam_ref, at)).rowcount:
            return []
        if scanner == UNKNOWN_SCANNER:
            return []
        where = f"state IN ({_marks(OPEN)}) AND scanner = ? AND exam_ref <> ?"
        return [
            self._happen(db, alert, Input.OTHER_EXAM, at) for alert in _alerts(db, where, (*OPEN, scanner, exam_ref))
        ]

    def _happen(
        self,
        db: sqlite3.Connection,
        alert: Alert,
        happened: Input,
        at: float,
        *,
        result: Mapping[str, Any] | None = None,
        reason: str | None = None,
        by: str | None = None,
        ended_by: str | None = None,
    ) -> AlertChange:
        """One step of the table, its row and its event."""
        state, effect = step(alert.state, happened)
        severity = severity_of(alert.confirmed)
        if effect in (Effect.NOTHING, Effect.REFUSE):
            return AlertChange(alert, effect, happened, None, severity)
        body = _result_body(db, alert.result_id) if result is None else result
        after = replace(alert, state=state, changed_at=at, ended_by=ended_by)
        seconds = None
        if effect is Effect.RAISE:
            after = replace(after, raised_at=at, shown_at=None, acknowledged_at=None, reason=None, by=None)
            seconds = None if alert.ended_at is None else max(at - alert.ended_at, 0.0)
        if effect is Effect.ACKNOWLEDGE:
            seconds = at - alert.raised_at if alert.acknowledged_at is None else None
            after = replace(after, acknowledged_at=alert.acknowledged_at or at, reason=reason, by=by)
        if state in OPEN:
            after = replace(after, confirmed=bool(body["final"]) and body["verdict"] == "RESCAN")
        if effect is not Effect.COUNT:
            after = self._publish(db, after, body, at)
        _save_alert(db, after)
        return AlertChange(after, effect, happened, seconds, severity_of(after.confirmed), body["dominant_artefact"])

    def _publish(self, db: sqlite3.Connection, alert: Alert, result: Mapping[str, Any], at: float) -> Alert:
        """Write the alert's event."""
        acknowledged = None
        if alert.acknowledged_at is not None:
            acknowledged = {"reason": alert.reason, "by": alert.by, "at": alert.acknowledged_at}
        told = Told(
            alert_id=alert.alert_id,
            state=alert.state,
            confirmed=alert.confirmed,
            raised_at=alert.raised_at,
            changed_at=at,
            expires_at=self._expires_at(alert) if alert.state in OPEN else None,
            acknowledged=acknowledged,
            ended_by=alert.ended_by,
            suppressed_in_exam=_count_alerts(db, alert.scanner, alert.exam_ref, suppressed=True),
        )
        return replace(alert, sequence=self._append(db, "alert", at, alert_data(result, told), alert.scanner))

    def _say_suppressed(self, db: sqlite3.Connection, scanner: str, exam_ref: str, at: float) -> None:
        """Publish the exam's newest open alert again, with the count of what was held back."""
        where = f"state IN ({_marks(OPEN)}) AND scanner = ? AND exam_ref = ? ORDER BY raised_at DESC LIMIT 1"
        for alert in _alerts(db, where, (*OPEN, scanner, exam_ref)):
            _save_alert(db, self._publish(db, alert, _result_body(db, alert.result_id), at))

    def _expires_at(self, alert: Alert) -> float:
        return max(alert.raised_at, alert.acknowledged_at or 0.0) + self.alerts.expire_s

    def _append(
        self, db: sqlite3.Connection, stream: str, at: float, data: Mapping[str, Any], scanner: str | None
    ) -> int:
        """Write one event at the end of its stream. Returns its sequence."""
        sequence = int(
            db.execute(
                "INSERT INTO stream VALUES (?, 1) ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last", (stream,)
            ).fetchone()[0]
        )
        body = body_of(stream, sequence, self.epoch, at, data, scanner)
        db.execute(
            "INSERT INTO event (stream, sequence, id, at, topic, body) VALUES (?, ?, ?, ?, ?, ?)",
            (stream, sequence, event_id(stream, sequence), at, topic_of(stream, scanner), body),
        )
        return sequence

    # --- connections --------------------------------------------------------------------------------------------------

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

    def _reader(self) -> sqlite3.Connection:
        """This thread's own connection for reading."""
        reader: sqlite3.Connection | None = getattr(self._readers, "connection", None)
        if reader is None:
            reader = connect(self.path)
            reader.execute("PRAGMA query_only = 1")
            self._readers.connection = reader
            with self._lock:
                self._open_readers.append(reader)
        return reader

    def _read(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._reader().execute(query, values)

    def _events(self, where: str, values: Sequence[Any]) -> list[LoggedEvent]:
        query = f"SELECT number, stream, sequence, topic, body FROM event WHERE {where}"  # noqa: S608 (fixed words)
        return [LoggedEvent(*row) for row in self._read(query, values)]

    def _tell(self, changes: Sequence[AlertChange]) -> None:
        if self.on_change is not None:
            for change in changes:
                self.on_change(change)


# --- rows -------------------------------------------------------------------------------------------------------------

_ALERT_COLUMNS = tuple(Alert.__dataclass_fields__)


def _alerts(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> list[Alert]:
    query = f"SELECT {', '.join(_ALERT_COLUMNS)} FROM alert WHERE {where}"  # noqa: S608 (fixed words)
    return [_to_alert(row) for row in db.execute(query, values).fetchall()]


def _alert(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> Alert | None:
    return next(iter(_alerts(db, where, values)), None)


def _to_alert(row: sqlite3.Row) -> Alert:
    values = dict(row)
    return Alert(**{**values, "state": State(values["state"]), "confirmed": bool(values["confirmed"])})


def _save_alert(db: sqlite3.Connection, alert: Alert) -> None:
    """Write one alert, read before in the same transaction."""
    names = ", ".join(_ALERT_COLUMNS)
    updates = ", ".join(f"{n} = excluded.{n}" for n in _ALERT_COLUMNS if n != "alert_id")
    query = (
        f"INSERT INTO alert ({names}) VALUES ({_marks(_ALERT_COLUMNS)}) "  # noqa: S608 (fixed words)
        f"ON CONFLICT (alert_id) DO UPDATE SET {updates}"
    )
    values = [getattr(alert, name) for name in _ALERT_COLUMNS]
    db.execute(query, [str(v) if isinstance(v, State) else v for v in values])


def _quiet(result: Mapping[str, Any], protocol: str, at: float) -> Alert:
    """The alert that a stack does not have yet."""
    return Alert(
        alert_id=alert_id_of(result["stack_ref"]),
        stack_ref=result["stack_ref"],
        exam_ref=result["exam_ref"],
        scanner=result["scanner"],
        protocol=protocol,
        result_id=result["id"],
        state=State.QUIET,
        confirmed=False,
        ended_at=None,
        raised_at=at,
        changed_at=at,
    )


def _count_alerts(db: sqlite3.Connection, scanner: str, exam_ref: str, *, suppressed: bool) -> int:
    row = db.execute(
        "SELECT COUNT(*) FROM alert WHERE exam_ref = ? AND scanner = ? AND (state = 'suppressed') = ?",
        (exam_ref, scanner, suppressed),
    ).fetchone()
    return int(row[0])


def _exam_is_over(db: sqlite3.Connection, scanner: str, exam_ref: str) -> bool:
    """Whether another exam has started on the scanner since this one."""
    if scanner == UNKNOWN_SCANNER:
        return False
    row = db.execute(
        "SELECT 1 FROM exam AS mine JOIN exam AS other USING (scanner) WHERE scanner = ? AND mine.exam_ref = ? "
        "AND other.started_at > mine.started_at",
        (scanner, exam_ref),
    ).fetchone()
    return row is not None


def _repeats_of(db: sqlite3.Connection, alert: Alert) -> list[dict[str, Any]]:
    """Final results of later scans of the same protocol and exam, the newest scan first."""
    rows = db.execute(
        "SELECT body FROM result WHERE exam_ref = ? AND scanner = ? AND protocol = ? AND stack_ref <> ? AND final = 1 "
        "AND ended_at > ? ORDER BY ended_at DESC",
        (alert.exam_ref, alert.scanner, alert.protocol, alert.stack_ref, alert.ended_at),
    ).fetchall()
    return [json.loads(row[0]) for row in rows]


def _result_body(db: sqlite3.Connection, result_id: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(db.execute("SELECT body FROM result WHERE id = ?", (result_id,)).fetchone()[0])
    return body


def _is_known(db: sqlite3.Connection, result: Mapping[str, Any]) -> bool:
    row = db.execute(
        "SELECT 1 FROM result WHERE id = ? OR (final = 1 AND ? AND stack_ref = ? AND revision = ?)",
        (result["id"], bool(result["final"]), result["stack_ref"], result["revision"]),
    ).fetchone()
    return row is not None


def _insert_result(db: sqlite3.Connection, result: Mapping[str, Any], protocol: str, at: float) -> None:
    row = {
        "id": result["id"],
        "at": at,
        "ended_at": result.get("series", {}).get("ended_at"),
        "stack_ref": result["stack_ref"],
        "exam_ref": result["exam_ref"],
        "scanner": result["scanner"],
        "protocol": protocol,
        "rule": result["policy"].get("rule") or "",
        "revision": result["revision"],
        "final": int(bool(result["final"])),
        "verdict": str(result["verdict"]),
        "body": json.dumps(result, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
    }
    names, marks = ", ".join(row), _marks(row)
    db.execute(f"INSERT INTO result ({names}) VALUES ({marks})", tuple(row.values()))  # noqa: S608 (fixed words)


def _series_data(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the stream `series` says when a stack is judged."""
    return {
        "state": "final" if result["final"] else "provisional",
        "series_ref": result["series_ref"],
        "stack_ref": result["stack_ref"],
        "exam_ref": result["exam_ref"],
        "scanner": result["scanner"],
        "result_id": result["id"],
        "revision": result["revision"],
        "verdict": result["verdict"],
        "evidence": dict(result["evidence"]),
    }


def _marks(values: Sequence[str] | frozenset[State] | Mapping[str, Any]) -> str:
    return ", ".join("?" * len(values))
