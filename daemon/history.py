"""`rescan history`: verdicts, alerts and feedback of a site as CSV, and results as JSON lines.

References only: nothing in it tells who was scanned. The columns `label` and `dice` of the verdicts are left for the site to
fill before `rescan calibrate` reads the file.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from daemon.alert import State
from daemon.config import ConfigError, default_state_folder
from daemon.events import timestamp
from daemon.ledger import Alert, Ledger
from daemon.score import SCORES
from daemon.words import ARTEFACTS

LEDGER_FILE = "ledger.db"
EVERYTHING = 10**9

VERDICT_COLUMNS = (
    "time",
    "result_id",
    "scanner",
    "series_number",
    "series_ref",
    "stack_ref",
    "exam_ref",
    "rule",
    "verdict",
    "final",
    "revision",
    "shadow",
    "dominant_artefact",
    "reasons",
    "advice",
    "required_dice",
    *SCORES,
    *(f"{name}_score" for name in ARTEFACTS),
    *(f"{name}_uncertainty" for name in ARTEFACTS),
    "completeness",
    "instances",
    "expected",
    "last_instance_to_verdict_s",
    "model_name",
    "model_version",
    "model_sha256",
    "engine",
    "precision",
    "calibration",
    "alert_state",
    "feedback",
    "label",
    "dice",
)
"""Columns of verdicts.csv; what is unknown is empty. `label` (clean or artefact) and `dice` are the site's to fill."""

ALERT_COLUMNS = (
    "alert_id",
    "scanner",
    "state",
    "confirmed",
    "result_id",
    "stack_ref",
    "exam_ref",
    "last_instance_at",
    "raised_at",
    "shown_at",
    "acknowledged_at",
    "changed_at",
    "reason",
    "by",
    "ended_by",
    "last_instance_to_alert_s",
    "alert_to_display_s",
    "alert_to_acknowledgement_s",
)
"""Columns of alerts.csv; a suppressed alert was held back by the limit per exam."""

FEEDBACK_COLUMNS = ("time", "alert_id", "scanner", "result_id", "stack_ref", "reason", "by")
"""Columns of feedback.csv: every acknowledgement, later ones of the same alert too."""

TABLES = {"verdicts": VERDICT_COLUMNS, "alerts": ALERT_COLUMNS, "feedback": FEEDBACK_COLUMNS}


def verdict_row(at: float, result: Mapping[str, Any], alert: Alert | None) -> dict[str, Any]:
    """One result as a row of verdicts.csv."""
    model, engine, policy, evidence = (result.get(name, {}) for name in ("model", "engine", "policy", "evidence"))
    return {
        "time": timestamp(at),
        "result_id": result["id"],
        **{
            name: result.get(name) for name in ("scanner", "series_ref", "stack_ref", "exam_ref", "verdict", "revision")
        },
        "series_number": result.get("series", {}).get("number"),
        "rule": policy.get("rule"),
        "final": int(result["final"]),
        "shadow": int(result["shadow"]),
        "dominant_artefact": result["dominant_artefact"],
        "reasons": ";".join(reason["code"] for reason in result["reasons"]),
        "advice": ";".join(advice["code"] for advice in result["advice"]),
        "required_dice": result.get("required_dice"),
        **{name: result["scores"].get(name) for name in SCORES},
        **{f"{name}_score": result["artefacts"].get(name, {}).get("score") for name in ARTEFACTS},
        **{f"{name}_uncertainty": result["artefacts"].get(name, {}).get("uncertainty") for name in ARTEFACTS},
        **{name: evidence.get(name) for name in ("completeness", "instances", "expected")},
        "last_instance_to_verdict_s": result["timing_s"].get("last_instance_to_verdict"),
        **{f"model_{name}": model.get(name) for name in ("name", "version", "sha256")},
        "engine": engine.get("provider"),
        "precision": engine.get("precision"),
        "calibration": policy.get("calibration"),
        "alert_state": None if alert is None else str(alert.state),
        "feedback": None if alert is None else alert.reason,
    }


def alert_row(alert: Alert) -> dict[str, Any]:
    """One alert as a row of alerts.csv."""
    raised = alert.raised_at if alert.state is not State.SUPPRESSED else None
    return {
        **{
            name: getattr(alert, name)
            for name in ("alert_id", "scanner", "result_id", "stack_ref", "exam_ref", "reason")
        },
        "state": str(alert.state),
        "confirmed": int(alert.confirmed),
        "by": _harmless(alert.by),
        "ended_by": alert.ended_by,
        "last_instance_at": _time(alert.ended_at),
        "raised_at": _time(raised),
        "shown_at": _time(alert.shown_at),
        "acknowledged_at": _time(alert.acknowledged_at),
        "changed_at": _time(alert.changed_at),
        "last_instance_to_alert_s": _between(alert.ended_at, raised),
        "alert_to_display_s": _between(raised, alert.shown_at),
        "alert_to_acknowledgement_s": _between(raised, alert.acknowledged_at),
    }


def feedback_row(said: Mapping[str, Any]) -> dict[str, Any]:
    """One acknowledgement as a row of feedback.csv."""
    return {**said, "time": timestamp(said["at"]), "by": _harmless(said["by"])}


def rows_of(
    ledger: Ledger, table: str, since: float | None, until: float | None, scanner: str
) -> Iterable[dict[str, Any]]:
    """The rows of one table, oldest first."""
    if table == "verdicts":
        alerts = {alert.stack_ref: alert for alert in ledger.all_alerts()}
        found = ledger.results(scanner=scanner, since=since, until=until, newest_of_stack=False, limit=EVERYTHING)
        return (verdict_row(at, result, alerts.get(result["stack_ref"])) for at, result in reversed(found))
    if table == "alerts":
        return (alert_row(a) for a in ledger.all_alerts(since, until) if scanner in ("", a.scanner))
    return (feedback_row(f) for f in ledger.feedback(since, until) if scanner in ("", f["scanner"]))


def write_table(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write CSV with a header; None is empty. Returns the number of rows."""
    writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    count = 0
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
        count += 1
    return count


def _time(at: float | None) -> str | None:
    return None if at is None else timestamp(at)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(max(end - start, 0.0), 3)


def _harmless(text: str | None) -> str | None:
    """What a person typed, so that no spreadsheet takes it for a formula."""
    return f"'{text}" if text and text[0] in "=+-@\t\r" else text


# --- the command ------------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan history`."""
    parser = subparsers.add_parser("history", help="export verdicts, alerts and feedback")
    parser.add_argument(
        "table", nargs="?", choices=list(TABLES), help="one table to standard output; needed without --to"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="write verdicts.csv, alerts.csv and feedback.csv there")
    parser.add_argument("--json", action="store_true", help="final results as JSON lines on standard output")
    parser.add_argument("--state", type=Path, default=default_state_folder(), help="state folder, default %(default)s")
    parser.add_argument("--since", metavar="DATE", help="from this day or time on, such as 2026-01-31 (UTC)")
    parser.add_argument("--until", metavar="DATE", help="up to this day or time, exclusive")
    parser.add_argument("--scanner", default="", metavar="SLUG", help="of this scanner alone")
    parser.set_defaults(func=_history)


def _history(args: argparse.Namespace) -> int:
    if (args.table is not None) + (args.to is not None) + args.json != 1:
        raise ConfigError("history: give one of a table (verdicts, alerts, feedback), --to DIR, or --json")
    since, until = _date(args.since, "--since"), _date(args.until, "--until")
    path = args.state / LEDGER_FILE
    if not path.exists():
        raise ConfigError(f"{path}: not there; name the state folder of a daemon with --state")
    ledger = Ledger.open(path)
    try:
        if args.json:
            return _print_results(ledger, since, until, args.scanner)
        if args.table is not None:
            write_table(sys.stdout, TABLES[args.table], rows_of(ledger, args.table, since, until, args.scanner))
            return 0
        args.to.mkdir(parents=True, exist_ok=True)
        for table, columns in TABLES.items():
            with (args.to / f"{table}.csv").open("w", encoding="utf-8", newline="") as file:
                count = write_table(file, columns, rows_of(ledger, table, since, until, args.scanner))
            print(f"{args.to / table}.csv: {count} rows", file=sys.stderr)
        return 0
    finally:
        ledger.close()


def _print_results(ledger: Ledger, since: float | None, until: float | None, scanner: str) -> int:
    found = ledger.results(scanner=scanner, since=since, until=until, newest_of_stack=False, limit=EVERYTHING)
    for _at, result in reversed(found):
        if result["final"]:
            print(json.dumps(result, ensure_ascii=False))
    return 0


def _date(text: str | None, name: str) -> float | None:
    """Unix seconds of a day or time; without a zone it is UTC."""
    if text is None:
        return None
    try:
        parsed = dt.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{name}: got {text!r}; write a day such as 2026-01-31 or a time such as 2026-01-31T14:00"
        ) from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=dt.UTC)).timestamp()
