"""Which scans of an exported history count as clean, so that `rescan calibrate` can fit to them.

A scan counts unless the site says otherwise: the column `label` holds `artefact`, or the alert was acknowledged with
`rescanning` or `patient_cannot`. A scan with an artefact that nobody marked can only raise the alarm threshold: the stated
false-alarm rate still holds, and some sensitivity is lost. Choosing by our own verdict instead would lower the threshold at
each turn, so the verdict is not asked.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from daemon.alert import AckReason
from daemon.calibration import CalibrationError, HistoryItem

VERDICTS_FILE = "verdicts.csv"
CLEAN, ARTEFACT = "clean", "artefact"
MARKED_BAD = frozenset({AckReason.RESCANNING, AckReason.PATIENT_CANNOT})
_NEEDED = ("exam_ref", "stack_ref", "scanner", "rule", "final", "risk", "predicted_dice", "model_sha256")


@dataclass(frozen=True)
class Selection:
    """The clean scans of a history.

    Attributes:
        model_sha256: of the newest model in it; scans of older ones are left out.
        items: one per stack, its newest final result.
        text: one line that says what was left out and why.
    """

    model_sha256: str
    items: list[HistoryItem]
    text: str


def read_table(path: Path) -> Selection:
    """Select from verdicts.csv, or from the folder that `rescan history --to` wrote.

    Raises:
        CalibrationError: unreadable, another table, or nothing usable.
    """
    file = path / VERDICTS_FILE if path.is_dir() else path
    rows = _rows(file)
    scored = {row["stack_ref"]: row for row in rows if row["final"] == "1" and row["risk"] and row["predicted_dice"]}
    if not scored:
        raise CalibrationError(f"{file.name}: no final, scored result in it; scan first, then export again")
    model = list(scored.values())[-1]["model_sha256"]
    left_out: Counter[str] = Counter()
    items = []
    unmarked = 0
    for row in scored.values():
        why = _why_not(row, model)
        if why:
            left_out[why] += 1
            continue
        unmarked += row.get("label", "") != CLEAN and row.get("feedback", "") == ""
        items.append(_item(row, file))
    if not items:
        raise CalibrationError(f"{file.name}: every scan in it is marked as not clean; nothing can be fitted")
    reasons = ", ".join(f"{count} {why}" for why, count in left_out.most_common())
    text = f"{len(items)} scans, {unmarked} of them marked by nobody" + (f"; left out: {reasons}" if reasons else "")
    return Selection(model, items, text)


def _why_not(row: Mapping[str, str], model: str) -> str:
    """Why a scan does not count as clean; "" where it does."""
    if row["model_sha256"] != model:
        return "of an older model"
    label = row.get("label", "").strip().lower()
    if label == ARTEFACT:
        return "labelled artefact"
    if label == CLEAN:
        return ""
    return f"acknowledged as {row['feedback']}" if row.get("feedback", "") in MARKED_BAD else ""


def _item(row: Mapping[str, str], file: Path) -> HistoryItem:
    try:
        dice = row.get("dice", "").strip()
        return HistoryItem(
            scanner=row["scanner"],
            protocol=row["rule"],
            exam=row["exam_ref"],
            risk=float(row["risk"]),
            predicted_dice=float(row["predicted_dice"]),
            dice=float(dice) if dice else None,
        )
    except ValueError as error:
        raise CalibrationError(f"{file.name}: result {row.get('result_id', '?')}: {error}; mend that row") from None


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as text:
            reader = csv.DictReader(text)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{file}: cannot be read ({error}); export one with `rescan history --to`") from None
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise CalibrationError(
            f"{file.name}: no column {missing[0]}; give the {VERDICTS_FILE} of `rescan history --to`"
        )
    return rows
