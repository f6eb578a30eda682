"""Builders of results for tests of the ledger, the events and what reads them."""

from __future__ import annotations

import hashlib
from typing import Any

from daemon.result import Identity, Said, build_result
from daemon.words import ARTEFACTS, Reason, Verdict

SHA256 = hashlib.sha256(b"model").hexdigest()
START = 1_700_000_000.0


def reference(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def result(
    stack: str = "s1",
    verdict: str = "RESCAN",
    *,
    final: bool = True,
    revision: int = 1,
    exam: str = "e1",
    scanner: str = "mr1",
    dice: float | None = None,
    required: float | None = 0.85,
    ended_at: float | None = START,
    shadow: bool = False,
    rule: str = "t1",
    supersedes: str | None = None,
    **series: Any,
) -> dict[str, Any]:
    """One result object, its numbers those of its verdict."""
    value = {"PASS": 0.93, "REVIEW": 0.84, "RESCAN": 0.71}.get(verdict) if dice is None else dice
    scores = {} if value is None else {"predicted_dice": value, "predicted_dice_low": value - 0.05, "risk": 1 - value}
    refused = verdict == "CANNOT_JUDGE"
    facts = {"number": 5, "instances": 176, **({} if ended_at is None else {"ended_at": ended_at}), **series}
    identity = Identity(reference(f"series {stack}"), reference(stack), reference(exam), scanner)
    word = "final" if final else "provisional"
    return build_result(
        identity,
        Said(
            Verdict(verdict),
            (Reason("not_a_head", "Not a head."),) if refused else (Reason("dice_below_required", "The sentence."),),
            () if verdict == "PASS" else (Reason("advice_motion", "Pad the head and repeat the scan."),),
            "motion" if verdict == "RESCAN" else None,
            required,
        ),
        result_id=reference(f"{stack} {revision} {word} {verdict} {value}"),
        final=final,
        revision=revision,
        supersedes=supersedes,
        shadow=shadow,
        evidence={"completeness": "released", "instances": 176, "expected": 176, "rule": "released"},
        model={} if refused else {"name": "student", "version": "1", "sha256": SHA256},
        engine={} if refused else {"provider": "cpu", "precision": "float32", "device": "cpu"},
        policy={"rule": rule, "calibration": "global, 100 clean scans"},
        scores=scores if not refused else {},
        artefacts=None if refused else {name: {"score": 0.1, "uncertainty": 0.01} for name in ARTEFACTS},
        timing_s={"receive": 2.0, "last_instance_to_verdict": 3.0},
        extra={
            "series": facts,
            **(
                {}
                if refused
                else {"worst_slices": [{"plane": "axial", "index": 50, "place": "upper third of the head"}]}
            ),
        },
    )
