"""A small frozen evaluation: one built-in head, clean and with each artefact. `python -m tests.frozen` writes what must not move."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from daemon.card import read_model
from daemon.config import SHIPPED_MODEL
from training.anatomy import builtin_subjects, draw_head, synthesise
from training.evaluation.analysis import make_row
from training.evaluation.observe import observe, open_runner
from training.evaluation.plan import CLEAN_STEP, Anatomy, Job, level_steps, make, read_severities
from training.evaluation.scans import listed

EXPECTED = Path(__file__).with_name("frozen_evaluation.json")
SEED = 20265
LEVEL = 3


def frozen_head() -> Anatomy:
    """The first built-in head at 2 mm, drawn from a fixed seed."""
    subject = builtin_subjects()[0]
    draw = replace(draw_head(np.random.default_rng(SEED), 0.0), spacing_mm=(2.0, 2.0, 2.0), masked_air=False)
    head = synthesise(subject, draw)
    return Anatomy("frozen", subject.name, head.clean, head.grey, head.white)


def measure_frozen(model: Path) -> dict[str, Any]:
    """Dice, scores and verdict of each scan of the frozen set."""
    severities = read_severities()
    steps = [s for s in level_steps(severities, (SEED, 1), 0) if s.level == LEVEL]
    card, runner = read_model(model).card, open_runner(model, "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make(root, Job("simulated", "frozen", frozen_head, (CLEAN_STEP, *steps)))
        seen = observe(runner, root, root / "seen", "simulated")
        rows = [make_row(f, seen.get(f.name), card, {}, {}, severities) for f in listed(root, "simulated")]
    scans = {
        row.facts.artefact: {
            "dice": round(row.dice, 4),
            "artefact_uncertainty": row.measures["artefact_uncertainty"],
            "artefact_uncertainty_gm": row.measures["artefact_uncertainty_gm"],
            "task_uncertainty": row.measures["task_uncertainty"],
            "verdict": row.verdict,
        }
        for row in rows
        if row.observation is not None
    }
    return {"graph_sha256": card.graph_sha256, "scans": scans}


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(measure_frozen(SHIPPED_MODEL), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(EXPECTED.read_text(encoding="utf-8"))
