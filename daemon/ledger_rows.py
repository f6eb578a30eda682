"""The rows of the ledger: alerts, results and events as values, and the statements that read and write them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daemon.alert import State, alert_id_of


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


# --- statements -------------------------------------------------------------------------------------------------------

_ALERT_COLUMNS = tuple(Alert.__dataclass_fields__)


def alerts_where(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> list[Alert]:
    """The alerts that a condition holds for; it may end with an order."""
    query = f"SELECT {', '.join(_ALERT_COLUMNS)} FROM alert WHERE {where}"  # noqa: S608 (fixed words)
    return [_to_alert(row) for row in db.execute(query, values).fetchall()]


def alert_where(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> Alert | None:
    """The first of them, or None."""
    return next(iter(alerts_where(db, where, values)), None)


def _to_alert(row: sqlite3.Row) -> Alert:
    values = dict(row)
    return Alert(**{**values, "state": State(values["state"]), "confirmed": bool(values["confirmed"])})


def save_alert(db: sqlite3.Connection, alert: Alert) -> None:
    """Write one alert, read before in the same transaction."""
    names = ", ".join(_ALERT_COLUMNS)
    updates = ", ".join(f"{n} = excluded.{n}" for n in _ALERT_COLUMNS if n != "alert_id")
    query = (
        f"INSERT INTO alert ({names}) VALUES ({marks(_ALERT_COLUMNS)}) "  # noqa: S608 (fixed words)
        f"ON CONFLICT (alert_id) DO UPDATE SET {updates}"
    )
    values = [getattr(alert, name) for name in _ALERT_COLUMNS]
    db.execute(query, [str(v) if isinstance(v, State) else v for v in values])


def quiet_alert(result: Mapping[str, Any], protocol: str, at: float) -> Alert:
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


def count_alerts(db: sqlite3.Connection, scanner: str, exam_ref: str, *, suppressed: bool) -> int:
    """How many alerts an exam has had on a scanner: those held back, or the others."""
    row = db.execute(
        "SELECT COUNT(*) FROM alert WHERE exam_ref = ? AND scanner = ? AND (state = 'suppressed') = ?",
        (exam_ref, scanner, suppressed),
    ).fetchone()
    return int(row[0])


def exam_is_over(db: sqlite3.Connection, lane: str | None, exam_ref: str) -> bool:
    """Whether another exam has started in the lane since this one; never where the lane cannot be told."""
    row = db.execute(
        "SELECT 1 FROM exam AS mine JOIN exam AS other USING (scanner) WHERE scanner = ? AND mine.exam_ref = ? "
        "AND other.started_at > mine.started_at",
        (lane, exam_ref),
    ).fetchone()
    return row is not None


def repeats_of(db: sqlite3.Connection, alert: Alert) -> list[dict[str, Any]]:
    """Final results of later scans of the same protocol and exam, the newest scan first."""
    rows = db.execute(
        "SELECT body FROM result WHERE exam_ref = ? AND scanner = ? AND protocol = ? AND stack_ref <> ? AND final = 1 "
        "AND ended_at > ? ORDER BY ended_at DESC",
        (alert.exam_ref, alert.scanner, alert.protocol, alert.stack_ref, alert.ended_at),
    ).fetchall()
    return [json.loads(row[0]) for row in rows]


def result_body(db: sqlite3.Connection, result_id: str) -> dict[str, Any]:
    """One result object; it must be there."""
    body: dict[str, Any] = json.loads(db.execute("SELECT body FROM result WHERE id = ?", (result_id,)).fetchone()[0])
    return body


def is_known(db: sqlite3.Connection, result: Mapping[str, Any]) -> bool:
    """Whether this result, or a final one of the same stack and revision, was written."""
    row = db.execute(
        "SELECT 1 FROM result WHERE id = ? OR (final = 1 AND ? AND stack_ref = ? AND revision = ?)",
        (result["id"], bool(result["final"]), result["stack_ref"], result["revision"]),
    ).fetchone()
    return row is not None


def insert_result(db: sqlite3.Connection, result: Mapping[str, Any], protocol: str, at: float) -> None:
    """Write one result."""
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
    names = ", ".join(row)
    db.execute(f"INSERT INTO result ({names}) VALUES ({marks(row)})", tuple(row.values()))  # noqa: S608 (fixed words)


def series_data(result: Mapping[str, Any]) -> dict[str, Any]:
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


def marks(values: Sequence[str] | frozenset[State] | Mapping[str, Any]) -> str:
    """One placeholder for each value."""
    return ", ".join("?" * len(values))
