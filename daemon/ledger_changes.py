"""What a result, a person or time does to alerts, inside one transaction: each step of the table with its row and its event."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from daemon.alert import OPEN, Effect, Input, Told, alert_data, own_input, repeat_input, severity_of, step
from daemon.config import UNKNOWN_SCANNER, AlertSettings
from daemon.events import body_of, event_id, topic_of
from daemon.ledger_rows import (
    Alert,
    alert_where,
    alerts_where,
    count_alerts,
    exam_is_over,
    marks,
    quiet_alert,
    repeats_of,
    result_body,
    save_alert,
)


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


class Changes:
    """What happens to alerts within one transaction."""

    def __init__(self, db: sqlite3.Connection, settings: AlertSettings, epoch: str) -> None:
        """Write through `db`, which is inside BEGIN IMMEDIATE.

        Args:
            db: the ledger's one writing connection.
            settings: limits of alerts.
            epoch: of the log.
        """
        self._db, self._settings, self._epoch = db, settings, epoch

    # --- a result -----------------------------------------------------------------------------------------------------

    def own_verdict(self, result: Mapping[str, Any], protocol: str, at: float) -> list[AlertChange]:
        """What a result does to the alert of its own stack."""
        scanner, exam = result["scanner"], result["exam_ref"]
        alert = alert_where(self._db, "stack_ref = ?", (result["stack_ref"],)) or quiet_alert(result, protocol, at)
        raised = count_alerts(self._db, scanner, exam, suppressed=False)
        happened = own_input(result, alert.state, self._settings, raised)
        alert = replace(alert, result_id=result["id"], ended_at=result.get("series", {}).get("ended_at"))
        change = self.happen(alert, happened, at, result=result)
        if change.effect is Effect.COUNT:
            self._say_suppressed(scanner, exam, at)
        changes = [change] if change.effect is not Effect.NOTHING else []
        return changes + (self._too_late(change.alert, result, at) if change.effect is Effect.RAISE else [])

    def _too_late(self, alert: Alert, mine: Mapping[str, Any], at: float) -> list[AlertChange]:
        """An alert may be overtaken before it is raised: by a repeat that was judged first, or by the next exam."""
        for body in repeats_of(self._db, alert):
            happened = repeat_input(body, mine)
            if happened is not None:
                return [self.happen(alert, happened, at, ended_by=body["id"])]
        if exam_is_over(self._db, lane_of(alert.scanner, device_of(mine)), alert.exam_ref):
            return [self.happen(alert, Input.OTHER_EXAM, at)]
        return []

    def repeat_of_others(self, result: Mapping[str, Any], protocol: str, at: float) -> list[AlertChange]:
        """What a final result does to open alerts of earlier scans that it repeats."""
        ended_at = result.get("series", {}).get("ended_at")
        changes = []
        where = f"state IN ({marks(OPEN)}) AND exam_ref = ? AND scanner = ? AND protocol = ? AND stack_ref <> ?"
        asked = (*OPEN, result["exam_ref"], result["scanner"], protocol, result["stack_ref"])
        for alert in alerts_where(self._db, where, asked):
            if ended_at is not None and alert.ended_at is not None and ended_at <= alert.ended_at:
                continue
            happened = repeat_input(result, result_body(self._db, alert.result_id))
            if happened is not None:
                changes.append(self.happen(alert, happened, at, ended_by=result["id"]))
        return changes

    # --- an exam ------------------------------------------------------------------------------------------------------

    def start_exam(self, scanner: str, device: str | None, exam_ref: str, at: float) -> list[AlertChange]:
        """Note the begin of an exam; what is open of the other exams on this scanner expires.

        Args:
            scanner: configured slug, else `unknown`.
            device: keyed hash of the machine that the header names; it tells apart those who share the name `unknown`.
            exam_ref: of the exam.
            at: unix seconds.
        """
        lane = lane_of(scanner, device)
        begun = self._db.execute("INSERT OR IGNORE INTO exam VALUES (?, ?, ?)", (lane or scanner, exam_ref, at))
        if not begun.rowcount or lane is None:
            return []
        where = f"state IN ({marks(OPEN)}) AND scanner = ? AND exam_ref <> ?"
        earlier = alerts_where(self._db, where, (*OPEN, scanner, exam_ref))
        return [self.happen(alert, Input.OTHER_EXAM, at) for alert in earlier if self._lane(alert) == lane]

    def _lane(self, alert: Alert) -> str | None:
        """Where an alert's scan was made."""
        return lane_of(alert.scanner, device_of(result_body(self._db, alert.result_id)))

    # --- one step -----------------------------------------------------------------------------------------------------

    def happen(
        self,
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
        body = result_body(self._db, alert.result_id) if result is None else result
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
            after = self._publish(after, body, at)
        save_alert(self._db, after)
        return AlertChange(after, effect, happened, seconds, severity_of(after.confirmed), body["dominant_artefact"])

    def _publish(self, alert: Alert, result: Mapping[str, Any], at: float) -> Alert:
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
            expires_at=expires_at(alert, self._settings) if alert.state in OPEN else None,
            acknowledged=acknowledged,
            ended_by=alert.ended_by,
            suppressed_in_exam=count_alerts(self._db, alert.scanner, alert.exam_ref, suppressed=True),
        )
        return replace(alert, sequence=self.append("alert", at, alert_data(result, told), alert.scanner))

    def _say_suppressed(self, scanner: str, exam_ref: str, at: float) -> None:
        """Publish the exam's newest open alert again, with the count of what was held back."""
        where = f"state IN ({marks(OPEN)}) AND scanner = ? AND exam_ref = ? ORDER BY raised_at DESC LIMIT 1"
        for alert in alerts_where(self._db, where, (*OPEN, scanner, exam_ref)):
            save_alert(self._db, self._publish(alert, result_body(self._db, alert.result_id), at))

    def append(self, stream: str, at: float, data: Mapping[str, Any], scanner: str | None) -> int:
        """Write one event at the end of its stream. Returns its sequence."""
        row = self._db.execute(
            "INSERT INTO stream VALUES (?, 1) ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last", (stream,)
        ).fetchone()
        sequence = int(row[0])
        body = body_of(stream, sequence, self._epoch, at, data, scanner)
        self._db.execute(
            "INSERT INTO event (stream, sequence, id, at, topic, body) VALUES (?, ?, ?, ?, ?, ?)",
            (stream, sequence, event_id(stream, sequence), at, topic_of(stream, scanner), body),
        )
        return sequence


def expires_at(alert: Alert, settings: AlertSettings) -> float:
    """When an open alert ends by itself, unix seconds."""
    return max(alert.raised_at, alert.acknowledged_at or 0.0) + settings.expire_s


def device_of(result: Mapping[str, Any]) -> str | None:
    """The machine that made a scan, where the scanner has no configured name."""
    device: str | None = result.get("series", {}).get("device_ref")
    return device


def lane_of(scanner: str, device: str | None) -> str | None:
    """Where exams follow one another: a configured scanner, or one machine among those that share the name `unknown`.

    None where that cannot be told: then no exam ends another's alerts. The slash keeps a machine apart from every slug.
    """
    if scanner != UNKNOWN_SCANNER:
        return scanner
    return None if device is None else f"{UNKNOWN_SCANNER}/{device}"
