"""`rescan-train evaluate`: the paper's experiments and ours on one student, in one report.

Two steps. First the scans are made, once, from fixed severities (`training.evaluation.making`); this does not depend on
the student. Then networks run over them, and everything is computed from what they saw. Both steps keep what they have
done in the scratch folder and continue where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daemon.card import Calibration, Card, CardError, parse_calibration, read_model
from daemon.words import ARTEFACTS
from training.anatomy import Source
from training.calibrate import write_samples
from training.evaluation import analysis, figures, report
from training.evaluation.analysis import Row
from training.evaluation.making import SETS, make_sets_side_by_side
from training.evaluation.observe import Observation, Runner, mask_of, observe, open_runner, pairwise_dice
from training.evaluation.plan import SEVERITIES, read_severities
from training.evaluation.scans import CLEAN, listed, read

log = logging.getLogger("rescan.training")

TEST_SETS = tuple(s for s in SETS if s not in ("calibration", "negatives"))
REFERENCE_SETS = ("simulated", "independent", "real", "ladder")
TEACHERS = tuple(f"teacher_{a}" for a in ARTEFACTS)


@dataclass(frozen=True)
class Plan:
    """What one run does.

    Attributes:
        student: checkpoint or exported file.
        teachers: folder with `task.pt` and the teachers; None leaves the ensemble and the severities' names out.
        sources: test and calibration subjects by split.
        shared: real scans; None leaves them out.
        out: report and metrics.
        scratch: scans and what networks saw.
        sets: which.
        workers: processes that make scans.
        small: one head of each kind, to rehearse.
        ensemble_heads: heads per subject over which the ensemble runs.
        engine: of an exported student.
        calibration: for a checkpoint that carries none.
        resamples: of every bootstrap.
        limit: scans per set, clean ones first; None takes all.
        make: make the scans that are missing; False takes what is there.
        temperature: of a checkpoint.
        reference_sets: sets whose severities the task network names.
    """

    student: Path
    teachers: Path | None
    sources: dict[str, list[Source]]
    shared: Path | None
    out: Path
    scratch: Path
    sets: tuple[str, ...]
    workers: int
    small: bool
    ensemble_heads: int
    engine: str
    calibration: Calibration | None
    resamples: int
    limit: int | None = None
    make: bool = True
    temperature: float = 1.0
    reference_sets: tuple[str, ...] = REFERENCE_SETS


def evaluate(plan: Plan) -> dict[str, Any]:
    """Make scans, run the networks, compute, write `report.html`, `metrics.json`, `card.json` and `tables.md`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: a file that cannot be read, or a set that does not exist.
    """
    begun, severities = time.monotonic(), read_severities()
    root, cache = plan.scratch / "scans", plan.scratch / "seen"
    if plan.make:
        make_sets_side_by_side(plan.workers, root, plan.sets, plan.sources, plan.shared, severities, plan.small)
    runner = open_runner(plan.student, plan.engine, plan.temperature)
    card = _card(plan)
    seen = {
        group: observe(runner, root, cache, group, _bar(f"student {group}"), _first(root, group, plan.limit))
        for group in plan.sets
    }
    plan.out.mkdir(parents=True, exist_ok=True)
    _write_samples(plan, seen)
    reference = _observe_reference(plan, root, cache)
    ensemble = _ensemble(plan, root, cache)
    rows = {
        group: [
            analysis.make_row(f, seen[group].get(f.name), card, reference.get(group, {}), ensemble, severities)
            for f in listed(root, group)
            if f.refused or f.name in seen[group]
        ]
        for group in plan.sets
    }
    metrics = compute(rows, card, plan.resamples)
    metrics["model"] = plan.student.name
    metrics["made"] = _made(plan, begun)
    drawn = draw_figures(rows, metrics, runner, root)
    (plan.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (plan.out / "report.html").write_text(report.page(metrics, drawn), encoding="utf-8")
    facts = {"evaluation": card_facts(metrics)}
    (plan.out / "card.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (plan.out / "tables.md").write_text(report.markdown(metrics), encoding="utf-8")
    return metrics


def _first(root: Path, group: str, limit: int | None) -> set[str] | None:
    """Names of the first scans of a set, clean ones first; None takes all."""
    if limit is None:
        return None
    order = sorted((f for f in listed(root, group) if not f.refused), key=lambda f: (f.artefact != CLEAN, f.name))
    return {f.name for f in order[:limit]}


def _card(plan: Plan) -> Card:
    if plan.student.suffix != ".onnx":
        return analysis.bare_card(plan.calibration, plan.student.stem)
    try:
        return read_model(plan.student).card
    except CardError as error:
        raise ValueError(str(error)) from error


def _bar(text: str) -> Any:
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=text, unit="scan", mininterval=5.0)


def _write_samples(plan: Plan, seen: dict[str, dict[str, Observation]]) -> None:
    """What `rescan-train calibrate` reads: the calibration scans and the images to refuse, never a test scan."""
    samples = [o.sample for group in ("calibration", "negatives") for o in seen.get(group, {}).values()]
    if samples:
        write_samples(samples, plan.out / "samples.jsonl")


def _observe_reference(plan: Plan, root: Path, cache: Path) -> dict[str, dict[str, float]]:
    """Dice that the task network, which has seen no artefact, loses against the clean twin: it names the severities."""
    task = plan.teachers / "task.pt" if plan.teachers is not None else None
    if task is None or not task.exists():
        log.warning("no task.pt: severities have no names in this report")
        return {}
    runner = open_runner(task)
    groups = [g for g in plan.reference_sets if g in plan.sets]
    return {g: losses(observe(runner, root, cache, g, _bar(f"reference {g}"))) for g in groups}


def losses(seen: dict[str, Observation]) -> dict[str, float]:
    """Dice lost against the clean twin, of every scan where both are known."""
    return {
        name: o.sample.loss for name, o in seen.items() if o.sample.dice is not None and o.sample.clean_dice is not None
    }


def _ensemble(plan: Plan, root: Path, cache: Path) -> dict[str, float]:
    """Mean pairwise Dice of the teachers' segmentations on the simulated set."""
    if plan.teachers is None or plan.ensemble_heads == 0 or "simulated" not in plan.sets:
        return {}
    files = [plan.teachers / f"{name}.pt" for name in TEACHERS]
    if not all(f.exists() for f in files):
        log.warning("not all teachers are in %s: the ensemble is left out", plan.teachers.name)
        return {}
    wanted = {f.name for f in listed(root, "simulated") if int(f.head[-2:]) < plan.ensemble_heads}
    runners = [open_runner(f) for f in files]
    seen = [observe(r, root, cache, "simulated", _bar(r.key), wanted) for r in runners]
    names = set.intersection(*(set(s) for s in seen))
    return {
        name: pairwise_dice(mask_of(cache, r.key, "simulated", s[name]) for r, s in zip(runners, seen, strict=True))
        for name in sorted(names)
    }


def compute(rows: dict[str, list[Row]], card: Card, resamples: int) -> dict[str, Any]:
    """Every number of the report from the rows of every set."""
    out: dict[str, Any] = {}
    for group in ("simulated", "independent", "real"):
        if rows.get(group):
            out[group] = analysis.experiment(rows[group], resamples)
    for simulator in ("own", "independent"):
        real = [r for r in rows.get("real", []) if r.facts.simulator in (simulator, "none")]
        if real:
            out[f"real_{simulator}"] = analysis.experiment(real, resamples)
    if "simulated" in out:
        out["gaps"] = gaps(out)
    simulated, ladder = rows.get("simulated", []), rows.get("ladder", [])
    out["decoupling"] = analysis.decoupling(simulated)
    out["error_bars"] = analysis.error_bars(simulated, ladder)
    out["extremes"] = analysis.extremes(ladder)
    heads = [r for g in ("simulated", "independent", "clean", "real", "ladder") for r in rows.get(g, [])]
    out["refusal"] = analysis.refusal(rows.get("refusal", []), heads)
    out["decision"] = analysis.decision([*simulated, *rows.get("clean", [])], card, resamples)
    out["decision_real"] = analysis.decision(rows.get("real", []), card, resamples)
    out["goals"] = [asdict(g) for g in analysis.goals(out)]
    return out


def card_facts(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures that travel in the card: enough to judge the model by, without the tables."""
    names = ("rho", "ci_low", "ci_high", "n", "n_anatomies", "aurc", "dice_clean", "refused")
    out: dict[str, Any] = {
        group: {k: metrics[group][k] for k in names if metrics[group].get(k) is not None}
        for group in ("simulated", "independent", "real")
        if group in metrics
    }
    parts, choice = metrics.get("decoupling", {}), metrics.get("decision", {})
    out["decoupling"] = {k: parts[k] for k in ("matrix", "confusion", "diagonal_dominant") if k in parts}
    out["decision"] = {
        k: choice[k] for k in ("required_dice", "false_alarms", "sensitivity", "dice_mae", "n") if k in choice
    }
    out["error_bars"] = {k: v for k, v in metrics.get("error_bars", {}).items() if k == "coverage"}
    out["goals"] = metrics.get("goals", [])
    out["made"] = metrics.get("made", {})
    return out


def gaps(metrics: dict[str, Any]) -> dict[str, Any]:
    """What another simulator and another anatomy cost: differences of pooled rho to the simulated experiment."""
    base = metrics["simulated"].get("rho")
    return {
        name: None if base is None or metrics.get(group, {}).get("rho") is None else metrics[group]["rho"] - base
        for name, group in (("simulator", "independent"), ("anatomy", "real_own"), ("both", "real_independent"))
    }


def draw_figures(rows: dict[str, list[Row]], metrics: dict[str, Any], runner: Runner, root: Path) -> dict[str, str]:
    """Caption -> picture."""
    out: dict[str, str] = {}
    simulated, ladder = rows.get("simulated", []), rows.get("ladder", [])
    if simulated:
        chosen = _examples(simulated)
        scans = [read(root, r.facts) for r in chosen]
        out["As Fig. 4: one head, its artefacts, and where the student is uncertain"] = figures.examples(
            [(s, runner.maps(s.prepared)) for s in scans]
        )
        keys = ("artefact_uncertainty", "artefact_uncertainty_gm", "entropy", "ensemble_dice", "snr", "cnr")
        out["As Fig. 7: Dice against each measure, simulated test set"] = figures.scatter(simulated, keys)
        out["As Fig. 6: artefact uncertainty by artefact and severity"] = figures.boxes(simulated)
        out["Risk-coverage curves, simulated test set"] = figures.coverage_curves(simulated)
        if metrics["decoupling"]:
            out["Decoupling"] = figures.matrices(metrics["decoupling"])
    for group, title in (("independent", "independent simulator"), ("real", "real heads (as Fig. 8)")):
        if rows.get(group):
            others = ("artefact_uncertainty", "artefact_uncertainty_gm", "entropy", "snr", "cnr")
            out[f"Dice against each measure, {title}"] = figures.scatter(rows[group], others)
    if ladder:
        out["As Fig. 5: grey-matter volume with its interval over rising noise and blur"] = figures.error_bar_ladder(
            metrics["error_bars"]
        )
        out["Ten severities of one head"] = figures.ladders(ladder)
    if metrics["decision"].get("calibrated"):
        out["Predicted and reached Dice"] = figures.reliability_diagram(
            metrics["decision"], [*simulated, *rows.get("clean", [])]
        )
    return out


def _examples(rows: Sequence[Row]) -> list[Row]:
    """The first head, clean and with each artefact at its third level."""
    head = rows[0].facts.head
    own = [r for r in rows if r.facts.head == head and r.observation is not None]
    order = {a: i for i, a in enumerate((CLEAN, *ARTEFACTS))}
    chosen = [r for r in own if r.facts.artefact == CLEAN or r.facts.level == 3]
    return sorted(chosen, key=lambda r: order[r.facts.artefact])


def _made(plan: Plan, begun: float) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, {_cores()} cores",
        "seconds": round(time.monotonic() - begun),
        "severities": SEVERITIES.name,
        "severities named by": "the task network"
        if plan.teachers is not None and plan.reference_sets
        else "the student itself",
        "sets": ", ".join(plan.sets),
        "rehearsal": plan.small,
    }


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan-train evaluate`."""
    p = subparsers.add_parser("evaluate", help="the paper's experiments and ours on one student: report and metrics")
    p.add_argument("--student", type=Path, required=True, help="checkpoint (.pt) or exported student (.onnx)")
    p.add_argument("--teachers", type=Path, help="folder with task.pt and the teachers (baseline, names of severities)")
    p.add_argument("--data", default="builtin", help="where heads come from, as for `cascade`; split by splits.json")
    p.add_argument("--shared", type=Path, help="folder of real scans; left out: no real set, no public files")
    p.add_argument("--out", type=Path, required=True, help="folder for report.html, metrics.json, samples.jsonl")
    p.add_argument("--scratch", type=Path, help="folder for scans and what networks saw (default: OUT/scratch)")
    p.add_argument("--sets", default=",".join(SETS), help="comma-separated, default %(default)s")
    p.add_argument("--workers", type=int, default=1, help="processes that make scans (default %(default)s)")
    p.add_argument("--small", action="store_true", help="one head of each kind: a rehearsal")
    p.add_argument(
        "--ensemble-heads", type=int, default=1, help="heads per subject for the ensemble (default %(default)s)"
    )
    p.add_argument("--engine", default="auto", help="for an exported student: auto, openvino, cpu, cuda, tensorrt")
    p.add_argument("--calibration", type=Path, help="facts of `rescan-train calibrate`, for a checkpoint")
    p.add_argument("--resamples", type=int, default=2000, help="of every bootstrap (default %(default)s)")
    p.add_argument(
        "--limit", type=int, help="at most so many scans per set, clean ones first: for the temperature, or a look"
    )
    p.add_argument("--temperature", type=float, default=1.0, help="of a checkpoint's logits (default %(default)s)")
    p.add_argument(
        "--reference-sets",
        default=",".join(REFERENCE_SETS),
        help="sets whose severities the task network names (default %(default)s)",
    )
    p.add_argument("--no-make", action="store_true", help="take the scans that are there, make none")
    p.set_defaults(func=_command)


def _command(args: argparse.Namespace) -> int:
    from training.__main__ import split_data

    sets = tuple(s for s in args.sets.split(",") if s)
    unknown = sorted(set(sets) - set(SETS))
    if unknown:
        raise ValueError(f"--sets: {', '.join(unknown)} unknown; expected some of {', '.join(SETS)}")
    plan = Plan(
        student=args.student,
        teachers=args.teachers,
        sources=split_data(args.data),
        shared=args.shared,
        out=args.out,
        scratch=args.scratch or args.out / "scratch",
        sets=sets if args.shared is not None else tuple(s for s in sets if s != "real"),
        workers=args.workers,
        small=args.small,
        ensemble_heads=args.ensemble_heads,
        engine=args.engine,
        calibration=_read_calibration(args.calibration),
        resamples=args.resamples,
        limit=args.limit,
        make=not args.no_make,
        temperature=args.temperature,
        reference_sets=tuple(s for s in args.reference_sets.split(",") if s),
    )
    metrics = evaluate(plan)
    for goal in metrics["goals"]:
        word = {True: "reached", False: "NOT REACHED", None: "not measured"}[goal["met"]]
        value = "" if goal["value"] is None else f" {goal['value']:.3f}"
        log.info("%s:%s %s", goal["text"], value, word)
    log.info("report: %s", plan.out / "report.html")
    return 0


def _read_calibration(path: Path | None) -> Calibration | None:
    if path is None:
        return None
    try:
        return parse_calibration(json.loads(path.read_text(encoding="utf-8"))["calibration"], path.name)
    except (OSError, ValueError, KeyError, CardError) as error:
        raise ValueError(f"{path.name}: no calibration ({error}); make one with `rescan-train calibrate`") from error
