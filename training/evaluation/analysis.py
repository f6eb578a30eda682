"""The experiments: observations in, plain numbers out, in the form of `metrics.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.card import CARD_VERSION, Calibration, Card
from daemon.judge import judge, test_a, test_b
from daemon.prepare import BUCKETS, SPACING_MM, Box, Prepared
from daemon.score import TINY, Scores, score_reduced
from daemon.words import ARTEFACTS, Verdict
from training.evaluation.observe import Observation, reduced_of, severity
from training.evaluation.scans import CLEAN, Facts
from training.evaluation.statistics import (
    RESAMPLES,
    Interval,
    aurc,
    bootstrap,
    reliability,
    share,
    spearman,
    spearman_interval,
)

GOALS: dict[str, float] = {
    "rho_pooled": -0.90,
    "rho_upper": -0.85,
    "rho_artefact": -0.75,
    "rho_independent": -0.85,
    "rho_real": -0.85,
    "real_dice": 0.80,
    "top1": 0.90,
    "task_change": 0.20,
    "monotone": 0.95,
    "false_alarms": 0.05,
    "sensitivity": 0.95,
    "dice_mae": 0.03,
    "required_dice": 0.70,
}
"""What was to be reached, written down before the first evaluation."""

MAIN = "artefact_uncertainty"
MEASURES: dict[str, tuple[str, int]] = {
    "artefact_uncertainty": ("Artefact uncertainty, Eq. 9, the box around the head", 1),
    "artefact_uncertainty_gm": ("Artefact uncertainty around grey matter", 1),
    "risk": ("Calibrated risk (what the verdict uses)", 1),
    "task_uncertainty": ("Task variance", 1),
    "entropy": ("Mean entropy, the box around the head", 1),
    "entropy_gm": ("Mean entropy around grey matter", 1),
    "scaled_entropy": ("Mean entropy of the scaled logits (paper)", 1),
    "ensemble_dice": ("Pairwise Dice of the ensemble", -1),
    "snr": ("SNR, Eq. 10", -1),
    "cnr": ("CNR, Eq. 11", -1),
}
"""Key -> name in tables, and the sign that makes larger worse."""

PRODUCT = ("artefact_uncertainty", "artefact_uncertainty_gm", "risk")
_STUB = Prepared(
    np.zeros((1, 1, 1), np.float32),
    np.ones((1, 1, 1), bool),
    np.ones((1, 1, 1), bool),
    np.eye(4),
    Box((0.0, 0.0, 0.0), (1, 1, 1)),
    1.0,
)


@dataclass(frozen=True)
class Row:
    """One scan with everything that is known about it.

    Attributes:
        facts: what it is.
        observation: None where preparation refused it.
        scores: as served; None where refused.
        verdict: as served.
        dominant: artefact named by the verdict.
        severity: `clean`, `mild`, `moderate`, `visible` or `unknown`.
        measures: keys of `MEASURES` that are known.
    """

    facts: Facts
    observation: Observation | None
    scores: Scores | None
    verdict: str
    dominant: str | None
    severity: str
    measures: dict[str, float]

    @property
    def dice(self) -> float:
        """Grey-matter Dice; only rows with a reference are asked.

        Raises:
            ValueError: there is none.
        """
        if self.observation is None or self.observation.sample.dice is None:
            raise ValueError(f"{self.facts.name}: no Dice; the scan was refused or has no reference")
        return self.observation.sample.dice


def bare_card(calibration: Calibration | None, name: str) -> Card:
    """A card for a checkpoint that was not exported: only the calibration in it matters to scores and verdicts."""
    return Card(
        card_version=CARD_VERSION,
        name=name,
        version="0",
        artefacts=ARTEFACTS,
        input_name="image",
        outputs={},
        spacing_mm=SPACING_MM,
        orientation="RAS",
        preparation="",
        buckets=BUCKETS,
        temperature=1.0,
        graph_sha256="",
        opset=0,
        operators={},
        weights=0,
        activation_bytes_per_voxel=0.0,
        gigaflops={},
        precisions={},
        intended_use="",
        limits=(),
        licence="",
        training={},
        evaluation={},
        calibration=calibration,
    )


def make_row(
    facts: Facts,
    observation: Observation | None,
    card: Card,
    losses: dict[str, float],
    ensemble: dict[str, float],
    severities: dict[str, Any],
) -> Row:
    """Score and judge one observed scan as the daemon does."""
    own = observation.sample if observation is not None else None
    if facts.name not in losses and own is not None and own.dice is not None and own.clean_dice is not None:
        losses = {
            **losses,
            facts.name: own.loss,
        }  # the reference was not run: the network's own loss names the severity
    name = severity(facts, losses, severities)
    if observation is None:
        return Row(facts, None, None, Verdict.CANNOT_JUDGE.value, None, name, {})
    scores = replace(score_reduced(reduced_of(observation), _STUB, card), gates=observation.sample.gates)
    judged = judge(scores, card)
    raw = observation.sample.raw
    measures = {k: raw[k] for k in MEASURES if k in raw} | {"scaled_entropy": observation.scaled_entropy}
    for key, reference in (("snr", observation.reference_snr), ("cnr", observation.reference_cnr)):
        value = reference if reference is not None else scores.values.get(key)
        if value is not None:
            measures[key] = value
    if scores.risk is not None:
        measures["risk"] = scores.risk
    if facts.name in ensemble:
        measures["ensemble_dice"] = ensemble[facts.name]
    return Row(facts, observation, scores, judged.verdict.value, judged.dominant_artefact, name, measures)


def with_dice(rows: Sequence[Row]) -> list[Row]:
    """The rows that were segmented and have a reference."""
    return [r for r in rows if r.observation is not None and r.observation.sample.dice is not None]


def interval(x: Interval) -> dict[str, Any]:
    """The form of `metrics.json`."""
    return {"rho": x.value, "ci_low": x.low, "ci_high": x.high, "n": x.n, "n_anatomies": x.n_anatomies}


def experiment(rows: Sequence[Row], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Rank correlations and risk-coverage of one set (paper's Tables 1 and 2).

    Returns:
        `rho`, `ci_low`, `ci_high`, `n`, `n_anatomies`, `per_artefact`, `aurc` of Eq. 9, and under `measures` the same for
        every measure; `refused` counts scans that preparation refused, which have no Dice.
    """
    known = with_dice(rows)
    if len(known) < 3:
        return {"n": len(known), "refused": len(rows) - len(known)}
    measures = {}
    for key in MEASURES:
        have = [r for r in known if key in r.measures]
        if len(have) >= 3:
            measures[key] = _one_measure(have, key, resamples)
    # A head whose reference is the student's own clean segmentation says nothing about clean Dice: it would be 1.
    clean = [r.dice for r in known if r.facts.artefact == CLEAN and r.facts.gm_ml > 0]
    return {
        **{k: v for k, v in measures[MAIN].items() if k != "name"},
        "measures": measures,
        "dice_clean": float(np.mean(clean)) if clean else None,
        "dice_clean_sd": float(np.std(clean)) if clean else None,
        "dice_artefact": float(np.mean([r.dice for r in known if r.facts.artefact != CLEAN] or [0.0])),
        "refused": len(rows) - len(known),
        "severity_counts": {
            s: sum(r.severity == s for r in known) for s in ("clean", "mild", "moderate", "visible", "unknown")
        },
    }


def _one_measure(have: Sequence[Row], key: str, resamples: int) -> dict[str, Any]:
    x, y = np.array([r.measures[key] for r in have]), np.array([r.dice for r in have])
    anatomies = [r.facts.anatomy for r in have]
    sign = MEASURES[key][1]
    area = bootstrap(lambda i: aurc(sign * x[i], y[i]), anatomies, resamples // 4)
    per_artefact = {}
    for artefact in ARTEFACTS:
        # Clean scans belong to each artefact's own correlation: they are its severity zero.
        at = [i for i, r in enumerate(have) if r.facts.artefact in (artefact, CLEAN)]
        without = [i for i, r in enumerate(have) if r.facts.artefact == artefact]
        if len(without) >= 3:
            found = spearman_interval(x[at], y[at], [anatomies[i] for i in at], resamples // 4)
            per_artefact[artefact] = interval(found) | {"rho_without_clean": spearman(x[without], y[without])}
    return {
        "name": MEASURES[key][0],
        **interval(spearman_interval(x, y, anatomies, resamples)),
        "per_artefact": per_artefact,
        "aurc": area.value,
        "aurc_ci": [area.low, area.high],
    }


def decoupling(rows: Sequence[Row]) -> dict[str, Any]:
    """The 5x5 matrices (rows: the artefact in the image; columns: the channel) and the task variance under mild artefacts."""
    known = [r for r in rows if r.observation is not None]
    clean = [r for r in known if r.facts.artefact == CLEAN]
    visible = [r for r in known if r.severity == "visible"]
    if not clean:
        return {}
    floor = np.maximum(np.mean([_variances(r) for r in clean], axis=0), TINY)
    matrix, used = _matrix(visible, floor)
    all_levels, _ = _matrix([r for r in known if r.facts.artefact != CLEAN], floor)
    named = [(r, _highest(r, floor)) for r in known if r.facts.artefact in ARTEFACTS]
    confusion, top1 = _confusion(named)
    confusion_visible, top1_visible = _confusion([(r, name) for r, name in named if r.severity == "visible"])
    return {
        "matrix": matrix,
        "matrix_all": all_levels,
        "visible_per_artefact": used,
        "diagonal_dominant": bool(all(row and int(np.argmax(row)) == i for i, row in enumerate(matrix))),
        "confusion": confusion_visible,
        "confusion_all": confusion,
        "top1": asdict(share(*top1_visible)),
        "top1_all": asdict(share(*top1)),
        "calibrated": bool(known and known[0].scores is not None and known[0].scores.risk is not None),
        "task_change": _task_change(known),
    }


def _variances(row: Row) -> NDArray[np.float64]:
    assert row.observation is not None
    return np.array([row.observation.sample.raw[f"artefact_{name}_gm"] for name in ARTEFACTS])


def _matrix(rows: Sequence[Row], floor: NDArray[np.float64]) -> tuple[list[list[float]], dict[str, int]]:
    """Mean sigma_i^2 given artefact j over the mean of clean scans; an artefact without scans gives an empty row."""
    matrix, used = [], {}
    for artefact in ARTEFACTS:
        own = [_variances(r) for r in rows if r.facts.artefact == artefact]
        used[artefact] = len(own)
        matrix.append([float(v) for v in np.mean(own, axis=0) / floor] if own else [])
    return matrix, used


def _highest(row: Row, floor: NDArray[np.float64]) -> str:
    """The artefact with the highest comparable score; without a calibration the largest ratio to clean scans."""
    assert row.scores is not None
    scores = [row.scores.artefacts[name].get("score") for name in ARTEFACTS]
    if all(s is not None for s in scores):
        return ARTEFACTS[int(np.argmax([float(s or 0.0) for s in scores]))]
    return ARTEFACTS[int(np.argmax(_variances(row) / floor))]


def _confusion(named: Sequence[tuple[Row, str]]) -> tuple[list[list[int]], tuple[int, int]]:
    table = np.zeros((5, 5), dtype=int)
    for row, name in named:
        table[ARTEFACTS.index(row.facts.artefact), ARTEFACTS.index(name)] += 1
    return table.tolist(), (int(np.trace(table)), int(table.sum()))


def _task_change(rows: Sequence[Row]) -> dict[str, Any]:
    """sigma_task of mild scans over their clean twins: median ratio and the share within 20 %."""
    clean = {r.facts.head: r for r in rows if r.facts.artefact == CLEAN}
    ratios: dict[str, list[float]] = {name: [] for name in ARTEFACTS}
    for r in rows:
        twin = clean.get(r.facts.head)
        if r.severity == "mild" and twin is not None and r.facts.artefact in ratios:
            ratios[r.facts.artefact].append(r.measures["task_uncertainty"] / twin.measures["task_uncertainty"])
    flat = [v for values in ratios.values() for v in values]
    if not flat:
        return {"n": 0}
    within = sum(abs(v - 1.0) <= GOALS["task_change"] for v in flat)
    return {
        "n": len(flat),
        "median": float(np.median(flat)),
        "mean": float(np.mean(flat)),
        "within_20_percent": asdict(share(within, len(flat))),
        "median_per_artefact": {k: float(np.median(v)) for k, v in ratios.items() if v},
    }


def error_bars(rows: Sequence[Row], ladder: Sequence[Row]) -> dict[str, Any]:
    """Coverage of the 95 % interval of the grey-matter volume, and its width over rising severity (paper's Fig. 5)."""
    known = [r for r in with_dice(rows) if r.facts.gm_ml > 0]
    out: dict[str, Any] = {"n": len(known), "ladder": {}}
    errors = np.array([r.observation.sample.gm_ml - r.facts.gm_ml for r in known if r.observation is not None])
    eq8 = np.array([1.96 * r.observation.eq8_ml for r in known if r.observation is not None])
    if known:
        out["bias_ml"], out["mean_absolute_error_ml"] = float(errors.mean()), float(np.abs(errors).mean())
        out["eq8_coverage"] = asdict(share(int((np.abs(errors) <= eq8).sum()), len(known)))
        out["eq8_half_width_ml"] = float(np.median(eq8))
    widths = [r.scores.values.get("gm_volume_error_ml") for r in known if r.scores is not None]
    if widths and all(w is not None for w in widths):
        half = np.array([float(w or 0.0) for w in widths])
        covered = share(int((np.abs(errors) <= half).sum()), len(known))
        out |= {
            "coverage": covered.value,
            "coverage_interval": asdict(covered),
            "half_width_ml": float(np.median(half)),
        }
    for kind in ("noise", "blur"):
        steps = _rungs(ladder, kind)
        if steps:
            out["ladder"][kind] = [_bar(r) for r in steps]
            half_widths = [b["half_width_ml"] for b in out["ladder"][kind] if b["half_width_ml"] is not None]
            out[f"width_monotone_{kind}"] = spearman(range(len(half_widths)), half_widths) if half_widths else None
    return out


def _bar(row: Row) -> dict[str, Any]:
    assert row.observation is not None and row.scores is not None
    return {
        "strength": row.facts.strength,
        "gm_ml": row.observation.sample.gm_ml,
        "truth_ml": row.facts.gm_ml,
        "half_width_ml": row.scores.values.get("gm_volume_error_ml"),
        "eq8_half_width_ml": 1.96 * row.observation.eq8_ml,
    }


def _rungs(ladder: Sequence[Row], kind: str) -> list[Row]:
    """Clean, then the rungs of one kind in order of severity, without refused ones."""
    clean = [r for r in ladder if r.facts.artefact == CLEAN]
    rungs = sorted((r for r in ladder if r.facts.kind == kind), key=lambda r: r.facts.level)
    return [r for r in (*clean, *rungs) if r.observation is not None] if rungs else []


def extremes(ladder: Sequence[Row]) -> dict[str, Any]:
    """Score against severity over ten severities of one head: rank correlation per process."""
    out: dict[str, Any] = {}
    for kind in sorted({r.facts.kind for r in ladder if r.facts.artefact != CLEAN}):
        rungs = [r for r in _rungs(ladder, kind) if r.facts.artefact != CLEAN]
        levels = [r.facts.level for r in rungs]
        keys = [k for k in ("artefact_uncertainty", "artefact_uncertainty_gm", "risk", "task_uncertainty") if rungs]
        out[kind] = {
            "n": len(rungs),
            "refused": sum(r.facts.kind == kind and r.observation is None for r in ladder),
            "dice": [r.dice for r in rungs],
            "verdicts": [r.verdict for r in rungs],
            **{
                k: spearman(levels, [r.measures[k] for r in rungs]) for k in keys if all(k in r.measures for r in rungs)
            },
        }
    return out


def refusal(rows: Sequence[Row], heads: Sequence[Row]) -> dict[str, Any]:
    """What must be refused is refused; whole heads are judged; how often an artefacted head is not."""
    kinds: dict[str, dict[str, Any]] = {}
    wrong = []
    for row in rows:
        kind = kinds.setdefault(
            row.facts.kind, {"n": 0, "right": 0, "expected": list(row.facts.expected), "verdicts": {}}
        )
        kind["n"] += 1
        kind["verdicts"][row.verdict] = kind["verdicts"].get(row.verdict, 0) + 1
        if row.verdict in row.facts.expected:
            kind["right"] += 1
        else:
            wrong.append({"name": row.facts.name, "verdict": row.verdict, "expected": list(row.facts.expected)})
    must = [r for r in rows if r.facts.expected == ("CANNOT_JUDGE",)]
    bad = [r for r in heads if r.facts.artefact != CLEAN]
    clean = [r for r in heads if r.facts.artefact == CLEAN]
    visible = [r for r in bad if r.severity == "visible"]
    refused = Verdict.CANNOT_JUDGE.value
    return {
        "kinds": kinds,
        "wrong": wrong,
        "refused_of_must_refuse": asdict(share(sum(r.verdict == refused for r in must), len(must))),
        "clean_heads_refused": asdict(share(sum(r.verdict == refused for r in clean), len(clean))),
        "artefacted_heads_refused": asdict(share(sum(r.verdict == refused for r in bad), len(bad))),
        "visible_heads_rescan": asdict(share(sum(r.verdict == "RESCAN" for r in visible), len(visible))),
        "visible_heads_not_passed": asdict(share(sum(r.verdict != "PASS" for r in visible), len(visible))),
        "codes": _codes(bad),
    }


def _codes(rows: Sequence[Row]) -> dict[str, int]:
    """Why artefacted heads were refused, by reason code of preparation or `image` for the gates."""
    codes: dict[str, int] = {}
    for row in rows:
        if row.verdict == Verdict.CANNOT_JUDGE.value:
            code = row.facts.refused or "image"
            codes[code] = codes.get(code, 0) + 1
    return codes


def decision(rows: Sequence[Row], card: Card, resamples: int = RESAMPLES) -> dict[str, Any]:
    """False alarms, sensitivity and the error of predicted Dice at the card's required Dice."""
    calibration = card.calibration
    if calibration is None:
        return {"calibrated": False}
    known = [r for r in with_dice(rows) if r.scores is not None and r.scores.risk is not None]
    if not known:
        return {"calibrated": False, "n": 0}
    required = calibration.required_dice
    good, poor = [r for r in known if r.dice >= required], [r for r in known if r.dice < required]
    clean = [r for r in known if r.facts.artefact == CLEAN]
    predicted = np.array([_value(r, "predicted_dice") for r in known])
    dice = np.array([r.dice for r in known])
    inside = sum(_value(r, "predicted_dice_low") <= r.dice <= _value(r, "predicted_dice_high") for r in known)
    error = bootstrap(
        lambda i: float(np.abs(predicted[i] - dice[i]).mean()), [r.facts.anatomy for r in known], resamples // 4
    )
    alarms, caught = share(_rescans(good), len(good)), share(_rescans(poor), len(poor))
    return {
        "calibrated": True,
        "required_dice": required,
        "false_alarms": alarms.value,
        "false_alarms_interval": asdict(alarms),
        "sensitivity": caught.value,
        "sensitivity_interval": asdict(caught),
        "sensitivity_with_review": asdict(share(sum(r.verdict != "PASS" for r in poor), len(poor))),
        "clean_rescan": asdict(share(_rescans(clean), len(clean))),
        "clean_not_passed": asdict(share(sum(r.verdict != "PASS" for r in clean), len(clean))),
        "test_a_on_acceptable": asdict(share(_fired(good, lambda s: test_a(s, required, calibration)), len(good))),
        "test_b_on_clean": asdict(share(_fired(clean, lambda s: test_b(s, calibration)), len(clean))),
        "dice_mae": error.value,
        "dice_mae_ci": [error.low, error.high],
        "dice_interval_coverage": asdict(share(inside, len(known))),
        "reliability": reliability(predicted, dice),
        "verdicts": {v.value: sum(r.verdict == v.value for r in known) for v in Verdict},
        "n": len(known),
        "n_anatomies": len({r.facts.anatomy for r in known}),
    }


def _value(row: Row, key: str) -> float:
    assert row.scores is not None
    return row.scores.values[key]


def _rescans(rows: Sequence[Row]) -> int:
    return sum(r.verdict == "RESCAN" for r in rows)


def _fired(rows: Sequence[Row], fires: Callable[[Scores], bool]) -> int:
    return sum(r.scores is not None and fires(r.scores) for r in rows)


@dataclass(frozen=True)
class Goal:
    """One goal with what was reached.

    Attributes:
        text: the goal in words. value: what was reached, None where it was not measured. met: whether.
    """

    text: str
    value: float | None
    met: bool | None


def goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """Each goal beside its value; nothing is left out because it was missed."""
    simulated, independent, real = (metrics.get(k, {}) for k in ("simulated", "independent", "real"))
    parts, bars, choice = metrics.get("decoupling", {}), metrics.get("error_bars", {}), metrics.get("decision", {})
    measures = simulated.get("measures", {})
    own = min((measures[k]["aurc"] for k in PRODUCT if k in measures), default=None)
    base = min((m["aurc"] for k, m in measures.items() if k not in PRODUCT), default=None)
    worst = max((v["rho"] for v in simulated.get("per_artefact", {}).values()), default=None)
    change = parts.get("task_change", {}).get("median")
    mono = [v.get("artefact_uncertainty_gm") for v in metrics.get("extremes", {}).values()]
    margin = None if own is None or base is None else own - base
    return [
        _at_most("Simulated, pooled rho of Eq. 9 at most -0.90", simulated.get("rho"), GOALS["rho_pooled"]),
        _at_most("Simulated, upper bound of pooled rho below -0.85", simulated.get("ci_high"), GOALS["rho_upper"]),
        _at_most("Simulated, rho within each artefact at most -0.75 (worst)", worst, GOALS["rho_artefact"]),
        Goal(
            "Simulated, AURC below that of every baseline, ensemble included (difference to the best)",
            margin,
            None if margin is None or "ensemble_dice" not in measures else margin < 0.0,
        ),
        _at_most("Independent simulator, pooled rho at most -0.85", independent.get("rho"), GOALS["rho_independent"]),
        _at_least("Real heads, clean grey-matter Dice at least 0.80", real.get("dice_clean"), GOALS["real_dice"]),
        _at_most("Real heads, pooled rho at most -0.85", real.get("rho"), GOALS["rho_real"]),
        _holds("Decoupling matrix diagonal dominant in every row (visible)", parts.get("diagonal_dominant")),
        _at_least("Dominant artefact right at visible severity, at least 0.90", _part(parts, "top1"), GOALS["top1"]),
        _at_most(
            "Task variance changed by mild artefacts by at most 20 % (median)",
            None if change is None else abs(change - 1.0),
            GOALS["task_change"],
        ),
        _between("Coverage of the 95 % interval of the volume, 0.93 to 0.97", bars.get("coverage"), 0.93, 0.97),
        _at_least(
            "Score monotone over ten severities, rank correlation at least 0.95 (worst)",
            min((m for m in mono if m is not None), default=None),
            GOALS["monotone"],
        ),
        _at_least("Required Dice at least 0.70", choice.get("required_dice"), GOALS["required_dice"]),
        _at_most("False alarms on test heads at most 5 %", choice.get("false_alarms"), GOALS["false_alarms"]),
        _at_least("Sensitivity below the required Dice at least 0.95", choice.get("sensitivity"), GOALS["sensitivity"]),
        _at_most("Mean absolute error of predicted Dice at most 0.03", choice.get("dice_mae"), GOALS["dice_mae"]),
        _at_least(
            "Everything that must be refused is refused (share)",
            _part(metrics.get("refusal", {}), "refused_of_must_refuse"),
            1.0,
        ),
    ]


def _part(parts: Mapping[str, Any], key: str) -> float | None:
    found = parts.get(key)
    return float(found["value"]) if found and found["n"] else None


def _at_most(text: str, value: float | None, limit: float) -> Goal:
    return Goal(text, value, None if value is None else value <= limit)


def _at_least(text: str, value: float | None, limit: float) -> Goal:
    return Goal(text, value, None if value is None else value >= limit)


def _between(text: str, value: float | None, low: float, high: float) -> Goal:
    return Goal(text, value, None if value is None else low <= value <= high)


def _holds(text: str, value: bool | None) -> Goal:
    return Goal(text, None if value is None else float(value), value)
