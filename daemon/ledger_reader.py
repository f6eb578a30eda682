"""Reading the ledger: results, alerts and events, from any thread, each through a connection of its own."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.alert import OPEN, AckReason, State
from daemon.events import STREAMS
from daemon.ledger_file import connect, refuse_strange
from daemon.ledger_rows import Alert, LoggedEvent, alert_where, alerts_where, count_alerts, marks

PAGE_ROWS = 500
"""Results read at a time."""

FOREVER = 1e18
"""Unix seconds beyond every time."""


@dataclass(frozen=True)
class Last:
    """What is known of a stack's newest result."""

    id: str
    revision: int
    final: bool


class LedgerReader:
    """The ledger of one state folder, to be looked at. Methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Remember the file; a running daemon may write to it meanwhile.

        Args:
            path: of the SQLite file, on a local disk.

        Raises:
            LedgerError: not a ledger, or written by a newer version.
        """
        refuse_strange(path)
        self.path = path
        self._readers = threading.local()
        self._open_readers: list[sqlite3.Connection] = []
        self._reading = threading.Lock()

    def close(self) -> None:
        """Close the file; other threads must have stopped using it."""
        with self._reading:
            for reader in self._open_readers:
                reader.close()
            self._open_readers.clear()

    # --- results and alerts now ---------------------------------------------------------------------------------------

    def last_result(self, stack_ref: str) -> Last | None:
        """The newest result of a stack, or None."""
        row = self._read(
            "SELECT id, revision, final FROM result WHERE stack_ref = ? ORDER BY number DESC LIMIT 1", (stack_ref,)
        ).fetchone()
        return None if row is None else Last(row["id"], row["revision"], bool(row["final"]))

    def seen(self, result_id: str) -> bool:
        """Whether this result was written."""
        return self._read("SELECT 1 FROM result WHERE id = ?", (result_id,)).fetchone() is not None

    def alert(self, alert_id: str) -> Alert | None:
        """One alert."""
        return alert_where(self._reader(), "alert_id = ?", (alert_id,))

    def alert_of_stack(self, stack_ref: str) -> Alert | None:
        """The alert of a stack, if it has one that was published."""
        found = alert_where(self._reader(), "stack_ref = ?", (stack_ref,))
        return None if found is None or found.state is State.SUPPRESSED else found

    def open_alerts(self, scanner: str | None = None) -> list[Alert]:
        """Alerts that are raised or acknowledged, oldest first."""
        where = f"state IN ({marks(OPEN)}) AND (scanner = ? OR ? IS NULL) ORDER BY raised_at, alert_id"
        return alerts_where(self._reader(), where, (*OPEN, scanner, scanner))

    def suppressed(self, scanner: str, exam_ref: str) -> int:
        """How many alerts of an exam the limit held back."""
        return count_alerts(self._reader(), scanner, exam_ref, suppressed=True)

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
        return self._events(
            f"stream = 'alert' AND sequence IN (SELECT sequence FROM alert WHERE state IN ({marks(OPEN)})) "  # noqa: S608
            "ORDER BY sequence",
            tuple(OPEN),
        )

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
        where, values = _conditions(
            {"scanner": scanner, "rule": rule, "verdict": verdict, "exam_ref": exam_ref}, since, until
        )
        if newest_of_stack:
            where += " AND number = (SELECT MAX(number) FROM result AS newer WHERE newer.stack_ref = result.stack_ref)"
        query = f"SELECT at, body FROM result WHERE {where} ORDER BY number DESC LIMIT ?"  # noqa: S608 (fixed names)
        return [(at, json.loads(body)) for at, body in self._read(query, (*values, limit))]

    def every_result(
        self,
        scanner: str = "",
        rule: str = "",
        verdict: str = "",
        since: float | None = None,
        until: float | None = None,
    ) -> Iterator[tuple[float, dict[str, Any]]]:
        """Results by filter, oldest first, replaced ones too, read some at a time: a history may be longer than the memory."""
        where, values = _conditions({"scanner": scanner, "rule": rule, "verdict": verdict}, since, until)
        query = f"SELECT number, at, body FROM result WHERE {where} AND number > ? ORDER BY number LIMIT ?"  # noqa: S608
        last = 0
        while rows := self._read(query, (*values, last, PAGE_ROWS)).fetchall():
            for _, at, body in rows:
                yield at, json.loads(body)
            last = rows[-1]["number"]

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
        low, high = (-FOREVER if since is None else since), (FOREVER if until is None else until)
        return alerts_where(
            self._reader(), "raised_at >= ? AND raised_at < ? ORDER BY raised_at, alert_id", (low, high)
        )

    def feedback(self, since: float | None = None, until: float | None = None) -> list[dict[str, Any]]:
        """Every acknowledgement in order: alert_id, at, reason, by, and scanner, rule, result_id of the alert."""
        low, high = (-FOREVER if since is None else since), (FOREVER if until is None else until)
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

    # --- connections --------------------------------------------------------------------------------------------------

    def _reader(self) -> sqlite3.Connection:
        """This thread's own connection for reading."""
        reader: sqlite3.Connection | None = getattr(self._readers, "connection", None)
        if reader is None:
            reader = connect(self.path)
            reader.execute("PRAGMA query_only = 1")
            self._readers.connection = reader
            with self._reading:
                self._open_readers.append(reader)
        return reader

    def _read(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._reader().execute(query, values)

    def _events(self, where: str, values: Sequence[Any]) -> list[LoggedEvent]:
        query = f"SELECT number, stream, sequence, topic, body FROM event WHERE {where}"  # noqa: S608 (fixed words)
        return [LoggedEvent(*row) for row in self._read(query, values)]


def _conditions(equal: Mapping[str, str], since: float | None, until: float | None) -> tuple[str, list[Any]]:
    """A condition on results and its values; an empty text lets everything through."""
    asked = {name: value for name, value in equal.items() if value}
    low, high = (-FOREVER if since is None else since), (FOREVER if until is None else until)
    return " AND ".join(["at >= ?", "at < ?", *(f"{name} = ?" for name in asked)]), [low, high, *asked.values()]
