"""A `PageStore` in memory, for tests of the page alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from daemon import NOTICE
from daemon.alert import AckReason
from daemon.page.store import (
    AlertClosed,
    AlertFacts,
    Entry,
    HistoryFacets,
    HistoryQuery,
    NoSuchAlert,
    NoSuchScanner,
    Progress,
    ScannerView,
    Table,
)
from daemon.pictures import Pictures

TEXTS = {
    "PASS": ("good_enough", "The grey-matter segmentation of this scan is predicted to reach a Dice of 0.93."),
    "REVIEW": ("worse_than_clean", "It is more uncertain than 99 % of clean scans."),
    "RESCAN": (
        "dice_below_required",
        "The grey-matter segmentation of this scan is predicted to reach a Dice of 0.74.",
    ),
    "CANNOT_JUDGE": ("not_a_head", "The image does not look like a whole head to the model."),
}
ADVICE = {
    "RESCAN": "Talk to the patient, pad the head, and repeat the scan; use the fast protocol if there is one.",
    "REVIEW": "Look at the images before the patient leaves: the scan is at the border.",
    "CANNOT_JUDGE": "Judge this scan by eye.",
}
DICE = {"PASS": 0.93, "REVIEW": 0.86, "RESCAN": 0.74}


def make_result(verdict: str, scanner: str = "mr1", **changes: Any) -> dict[str, Any]:
    """A result object as the daemon publishes it."""
    code, text = TEXTS[verdict]
    reasons = [{"code": code, "text": text}]
    dominant = "motion" if verdict in {"RESCAN", "REVIEW"} else None
    if dominant:
        reasons.append(
            {"code": "artefact_motion", "text": "It looks most like patient motion, 34 % of grey matter affected."}
        )
    reasons.append({"code": "grey_matter_only", "text": "Only grey matter is judged: artefacts elsewhere are not."})
    scores = {
        "artefact_uncertainty": 0.0321,
        "artefact_uncertainty_gm": 0.061,
        "task_uncertainty": 0.041,
        "snr": 9.8,
        "cnr": 1.4,
    }
    if verdict in DICE:
        dice = DICE[verdict]
        scores |= {
            "predicted_dice": dice,
            "predicted_dice_low": dice - 0.06,
            "predicted_dice_high": min(1.0, dice + 0.04),
        }
        scores |= {"gm_volume_ml": 612.0, "gm_volume_error_ml": 21.0}
    weights = {"noise": 0.08, "spike": 0.02, "blur": 0.11, "wrap": 0.05, "motion": 0.78 if dominant else 0.06}
    result: dict[str, Any] = {
        "id": "r-1",
        "verdict": verdict,
        "final": True,
        "revision": 1,
        "supersedes": None,
        "series_ref": "5e1",
        "stack_ref": "57a",
        "exam_ref": "e0",
        "scanner": scanner,
        "shadow": False,
        "reasons": reasons,
        "advice": [{"code": "advice", "text": ADVICE[verdict]}] if verdict in ADVICE else [],
        "dominant_artefact": dominant,
        "required_dice": 0.88,
        "scores": scores,
        "artefacts": {name: {"score": s, "uncertainty": s / 20} for name, s in weights.items()},
        "evidence": {"completeness": "quiet", "instances": 176, "expected": 176, "rule": "t1-head"},
        "model": {"name": "student", "version": "1.0", "sha256": "0" * 64},
        "engine": {"provider": "openvino", "precision": "fp32", "device": "CPU"},
        "policy": {"rule": "t1-head", "calibration": "global, 200 clean scans"},
        "timing_s": {"receive": 7.9, "prepare": 0.6, "infer": 1.8, "score": 0.2, "last_instance_to_verdict": 3.4},
        "series": {"number": 5, "ended_at": 0.0, "duration_s": 312.0},
        "notice": NOTICE,
    }
    return {**result, **changes}


class MemoryStore:
    """Scanners, results and alerts in lists; every change is one method call."""

    def __init__(self, *scanners: str) -> None:
        self.views = {slug: ScannerView(slug, slug.upper().replace("MR", "MR "), False, None, ()) for slug in scanners}
        self.past: list[Entry] = []
        self.files: dict[str, Pictures] = {}
        self.changes = 0
        self.age_s = 0.0
        self.reasons: list[str] = []
        self.acknowledged: list[tuple[str, AckReason, str]] = []
        self.shown: list[str] = []
        self.asked: list[str] = []

    # --- what a test does ---------------------------------------------------------------------------------------------

    def add(
        self,
        result: dict[str, Any],
        number: int,
        alert: str = "",
        pictures: Pictures | None = None,
        at: float | None = None,
        not_concluded: str = "",
    ) -> Entry:
        """One more result; `alert` is its alert's state, if it has one."""
        at = time.time() if at is None else at
        result_id = f"result-{len(self.past) + 1}"
        result = {**result, "id": result_id, "stack_ref": f"stack-{result['scanner']}-{number}"}
        facts = AlertFacts(f"alert-{len(self.past) + 1}", alert, at, not_concluded=not_concluded) if alert else None
        entry = Entry(
            result_id, at, at - 5, "exam-1", number, "t1-head", result, facts, pictures.manifest if pictures else None
        )
        if pictures:
            self.files[result_id] = pictures
        self.past.insert(0, entry)
        view = self.views[result["scanner"]]
        self.put(view.slug, progress=None, exam=(entry, *view.exam)[:10])
        return entry

    def put(self, slug: str, **changes: Any) -> None:
        """Change what is known of one scanner."""
        self.views[slug] = dataclasses.replace(self.views[slug], **changes)
        self.changes += 1

    def receive(self, slug: str, progress: Progress | None) -> None:
        self.put(slug, progress=progress)

    def change_alert(self, alert_id: str, **changes: Any) -> None:
        def changed(entry: Entry) -> Entry:
            if entry.alert is None or entry.alert.alert_id != alert_id:
                return entry
            return dataclasses.replace(entry, alert=dataclasses.replace(entry.alert, **changes))

        self.past = [changed(entry) for entry in self.past]
        for view in list(self.views.values()):
            self.put(view.slug, exam=tuple(changed(entry) for entry in view.exam))

    # --- what the page asks -------------------------------------------------------------------------------------------

    def version(self) -> str:
        return str(self.changes)

    def heartbeat_age_s(self) -> float:
        return self.age_s

    def not_ready(self) -> Sequence[str]:
        return self.reasons

    def scanners(self) -> Sequence[ScannerView]:
        return list(self.views.values())

    def history(self, query: HistoryQuery) -> Sequence[Entry]:
        def fits(entry: Entry) -> bool:
            return (
                query.scanner in {"", entry.result["scanner"]}
                and query.protocol in {"", entry.protocol}
                and query.verdict in {"", entry.result["verdict"]}
                and (query.since is None or entry.at >= query.since)
                and (query.until is None or entry.at < query.until)
            )

        return sorted((e for e in self.past if fits(e)), key=lambda e: -e.at)[: query.limit]

    def facets(self) -> HistoryFacets:
        scanners = sorted({str(entry.result["scanner"]) for entry in self.past})
        return HistoryFacets(tuple(scanners), tuple(sorted({entry.protocol for entry in self.past})))

    def export(self, table: Table, query: HistoryQuery) -> Iterator[str]:
        yield "result_id,verdict\n"
        for entry in reversed(self.history(query) if table is Table.VERDICTS else []):
            yield f"{entry.result_id},{entry.result['verdict']}\n"

    def entry(self, result_id: str) -> Entry | None:
        return next((entry for entry in self.past if entry.result_id == result_id), None)

    def acknowledge(self, alert_id: str, reason: AckReason, by: str) -> None:
        alert = next((e.alert for e in self.past if e.alert and e.alert.alert_id == alert_id), None)
        if alert is None:
            raise NoSuchAlert(f"No alert {alert_id}.")
        if alert.state not in {"raised", "acknowledged"}:
            raise AlertClosed(f"This alert is {alert.state}.")
        self.acknowledged.append((alert_id, reason, by))
        self.change_alert(alert_id, state="acknowledged", reason=str(reason), by=by, acknowledged_at=time.time())

    def score_now(self, scanner: str) -> None:
        if scanner not in {view.slug for view in self.scanners()}:
            raise NoSuchScanner(f"No scanner {scanner}.")
        self.asked.append(scanner)

    def displayed(self, alert_id: str) -> None:
        self.shown.append(alert_id)

    def picture(self, result_id: str, name: str) -> bytes | None:
        pictures = self.files.get(result_id)
        return pictures.files.get(name) if pictures else None
