"""`rescan history`: verdicts, alerts and feedback of a site as CSV, and results as JSON lines.

References only: nothing in it tells who was scanned. The columns `label` and `dice` of the verdicts are left for the site to
fill before `rescan calibrate` reads the file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime as dt
import io
import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.alert import State
from daemon.config import ConfigError, default_state_folder
from daemon.events import timestamp
from daemon.ledger_file import unusable
from daemon.ledger_reader import LedgerReader
from daemon.ledger_rows import Alert
from daemon.score import SCORES
from daemon.words import ARTEFACTS, Verdict

LEDGER_FILE = "ledger.db"

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
        **{f"model_{name}": _harmless(model.get(name)) for name in ("name", "version", "sha256")},
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


@dataclass(frozen=True)
class Wanted:
    """Which rows are exported; an empty filter lets everything through.

    Attributes:
        scanner: configured slug.
        rule: name of the selection rule; alerts and feedback have none and are not narrowed by it, nor by the verdict.
        verdict: word of the verdict.
        since: unix seconds, inclusive.
        until: unix seconds, exclusive.
    """

    scanner: str = ""
    rule: str = ""
    verdict: str = ""
    since: float | None = None
    until: float | None = None


def rows_of(ledger: LedgerReader, table: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """The rows of one table, oldest first, read as they are asked for."""
    if table == "verdicts":
        alerts = {alert.stack_ref: alert for alert in ledger.all_alerts()}
        found = ledger.every_result(wanted.scanner, wanted.rule, wanted.verdict, wanted.since, wanted.until)
        return (verdict_row(at, result, alerts.get(result["stack_ref"])) for at, result in found)
    if table == "alerts":
        raised = ledger.all_alerts(wanted.since, wanted.until)
        return (alert_row(alert) for alert in raised if wanted.scanner in ("", alert.scanner))
    said = ledger.feedback(wanted.since, wanted.until)
    return (feedback_row(each) for each in said if wanted.scanner in ("", each["scanner"]))


def csv_lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """CSV with a header, line by line; None is empty."""
    line = io.StringIO()
    writer = csv.DictWriter(line, columns, restval="", extrasaction="ignore", lineterminator="\n")

    def written() -> str:
        text = line.getvalue()
        line.seek(0)
        line.truncate()
        return text

    writer.writeheader()
    yield written()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
        yield written()


def export(ledger: LedgerReader, table: str, wanted: Wanted) -> Iterator[str]:
    """One table as the lines of a CSV file; the page and the command give the same ones."""
    return csv_lines(TABLES[table], rows_of(ledger, table, wanted))


def _time(at: float | None) -> str | None:
    return None if at is None else timestamp(at)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(max(end - start, 0.0), 3)


def _harmless(text: str | None) -> str | None:
    """What a person or a file says freely, so that no spreadsheet takes it for a formula."""
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
    parser.add_argument("--rule", default="", metavar="NAME", help="verdicts of this selection rule alone")
    parser.add_argument(
        "--verdict", default="", choices=["", *Verdict], metavar="WORD", help="verdicts of this word alone"
    )
    parser.set_defaults(func=_history)


def _history(args: argparse.Namespace) -> int:
    if (args.table is not None) + (args.to is not None) + args.json != 1:
        raise ConfigError("history: give one of a table (verdicts, alerts, feedback), --to DIR, or --json")
    since, until = _date(args.since, "--since"), _date(args.until, "--until")
    wanted = Wanted(args.scanner, args.rule, args.verdict, since, until)
    path = args.state / LEDGER_FILE
    if not path.exists():
        raise ConfigError(f"{path}: not there; name the state folder of a daemon with --state")
    with contextlib.closing(LedgerReader(path)) as ledger:
        try:
            _write(ledger, wanted, args)
        except sqlite3.DatabaseError as error:
            raise unusable(path, error) from None
    return 0


def _write(ledger: LedgerReader, wanted: Wanted, args: argparse.Namespace) -> None:
    """JSON lines, one table, or a folder of tables."""
    if args.json:
        found = ledger.every_result(wanted.scanner, wanted.rule, wanted.verdict, wanted.since, wanted.until)
        for _at, result in found:
            if result["final"]:
                print(json.dumps(result, ensure_ascii=False))
    elif args.table is not None:
        sys.stdout.writelines(export(ledger, args.table, wanted))
    else:
        args.to.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            lines = list(export(ledger, table, wanted))
            (args.to / f"{table}.csv").write_text("".join(lines), encoding="utf-8", newline="")
            print(f"{args.to / table}.csv: {len(lines) - 1} rows", file=sys.stderr)


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
