"""Does every engine, at every precision, say the same? Maps, scores and verdicts against torch in float32."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from daemon.card import Card, ModelFile, read_model
from daemon.engines import PRECISIONS, EngineError, MemoryShort, open_engine
from daemon.golden import decode_volume
from daemon.judge import judge
from daemon.prepare import Prepared, prepare
from daemon.score import raw_scores, reduce_maps, score_reduced
from daemon.student import Student, default_cache
from daemon.words import Array, Maps, Refusal, Volume
from export.golden import formula_head, with_spike
from export.interpret import TorchGraph
from export.onnx import write_model

MAP_TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 8e-2}
"""Largest relative RMS difference of a map; scores and verdicts, which people act on, have their own, tighter limits."""

SCORE_TOLERANCE = 0.01
REFERENCE = "torch fp32"


@dataclass(frozen=True)
class Row:
    """One engine at one precision on one volume.

    Attributes:
        engine: engine and precision.
        volume: what was run.
        map_rms: largest over the maps of the relative RMS difference to the reference.
        score: name of the score that differs most.
        score_difference: its relative difference.
        verdict, expected: verdicts of the engine and the reference; None without a calibration.
        run_s: seconds of one run.
        passed: all three within their limits.
    """

    engine: str
    volume: str
    map_rms: float
    score: str
    score_difference: float
    verdict: str | None
    expected: str | None
    run_s: float
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What one engine made of one volume."""

    maps: Maps
    scores: dict[str, float]
    verdict: str | None


def command(args: argparse.Namespace) -> int:
    """`rescan-export parity FILE`.

    Returns:
        0 where everything that is present agrees, 1 otherwise.
    """
    model = read_model(args.file)
    cases = list(prepared_cases(model, args.volumes))
    rows: list[Row] = []
    for name in args.engines or PRECISIONS:
        for precision in PRECISIONS[name]:
            try:
                rows += compare(model, name, precision, cases)
            except EngineError as error:
                print(f"{name} {precision}: not run: {error}", file=sys.stderr)
    if args.checkpoint is not None:
        rows += compare_checkpoint(model, args.checkpoint, cases)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))
    failed = {row.engine for row in rows if not row.passed}
    if args.admit:
        card = admit(model.card, rows)
        write_model(model.data, card, args.file)
        print(f"{args.file}: admitted {card.precisions or 'nothing beside fp32'}", file=sys.stderr)
        return 1 if any(engine.endswith("fp32") for engine in failed) else 0
    return 1 if failed or not rows else 0


def prepared_cases(model: ModelFile, paths: Iterable[Path]) -> Iterator[tuple[str, Prepared]]:
    """The golden case, a synthetic head with artefacts, and real volumes, prepared as the daemon does.

    Raises:
        ValueError: a path holds no volume that can be prepared.
    """
    if model.golden:
        yield "golden", prepare(decode_volume(model.golden))
    synthetic = synthetic_cases()
    box = prepare(synthetic[0][1]).box
    for name, volume in synthetic:
        yield name, prepare(volume, box)
    for path in paths:
        from daemon.volume import volumes_from_path

        found = 0
        for _, source, _ in volumes_from_path(path):
            if isinstance(source, Refusal):
                continue
            try:
                yield f"{path.name}", prepare(source)
                found += 1
            except Refusal as refusal:
                print(f"{path}: {refusal.reason.text}", file=sys.stderr)
        if not found:
            raise ValueError(f"{path}: no volume that can be prepared; give a head")


def synthetic_cases() -> list[tuple[str, Volume]]:
    """A head from formulas, clean and with each kind of artefact in a simple form."""
    head = formula_head()
    rng = np.random.default_rng(0)
    k = np.fft.fftn(head.voxels)
    noisy = np.abs(head.voxels + 0.15 * rng.normal(size=head.voxels.shape))
    moved = np.where(np.arange(k.shape[1])[None, :, None] % 4 == 0, k * np.exp(0.7j), k)
    cases = {
        "clean": head.voxels,
        "noise": noisy,
        "spike": with_spike(head.voxels, 0.2),
        "blur": np.abs(np.fft.ifftn(k * (np.abs(np.fft.fftfreq(k.shape[2])) < 0.15)[None, None, :])),
        "wrap": head.voxels + 0.5 * np.roll(head.voxels, head.voxels.shape[1] // 2, axis=1),
        "motion": np.abs(np.fft.ifftn(moved)),
    }
    return [(name, Volume(voxels.astype(np.float32), head.affine)) for name, voxels in cases.items()]


def compare(model: ModelFile, engine: str, precision: str, cases: list[tuple[str, Prepared]]) -> list[Row]:
    """Run the cases on one engine and compare with torch in float32.

    Raises:
        EngineError: the engine cannot be used here.
    """
    cache = default_cache() if engine == "tensorrt" else None
    student = Student(model, open_engine(model, engine, precision, 0, cache))
    reference = TorchGraph(model.data)
    rows: list[Row] = []
    loaded: set[tuple[int, ...]] = set()
    for name, prepared in cases:
        shape = (prepared.image.shape[0], prepared.image.shape[1], prepared.image.shape[2])
        if shape not in loaded:
            student.load(shape)
            loaded.add(shape)
        expected = outcome(to_maps(reference.run(prepared.image)), prepared, model.card)
        start = time.perf_counter()
        maps = student.run(prepared)
        run_s = time.perf_counter() - start
        rows.append(row(f"{engine} {precision}", name, outcome(maps, prepared, model.card), expected, run_s, precision))
    return rows


def compare_checkpoint(model: ModelFile, checkpoint: Path, cases: list[tuple[str, Prepared]]) -> list[Row]:
    """Compare the graph with the network it was made from, neither folded nor merged."""
    import torch

    from training.network import load_network

    network, _ = load_network(checkpoint)
    rows = []
    for name, prepared in cases:
        with torch.inference_mode():
            logits, log_variance = network(torch.from_numpy(prepared.image)[None, None])
        variance = log_variance.exp()[0].numpy()
        p = torch.softmax(logits / model.card.temperature, dim=1)[0, 1].numpy()
        expected = outcome(Maps(p, variance[0], variance[1:]), prepared, model.card)
        got = outcome(to_maps(TorchGraph(model.data).run(prepared.image)), prepared, model.card)
        rows.append(row("checkpoint fp32", name, got, expected, 0.0, "fp32"))
    return rows


def outcome(maps: Maps, prepared: Prepared, card: Card) -> Outcome:
    """Scores and verdict of some maps, as the daemon computes them."""
    level = float("inf") if card.calibration is None else card.calibration.affected_variance
    reduced = reduce_maps(maps, prepared, level)
    scores = score_reduced(reduced, prepared, card)
    values = raw_scores(reduced) | {k: v for k, v in scores.flat().items() if k != "risk"}
    verdict = None if card.calibration is None else judge(scores, card).verdict.value
    return Outcome(maps, values, verdict)


def row(engine: str, volume: str, got: Outcome, expected: Outcome, run_s: float, precision: str) -> Row:
    """Compare two outcomes."""
    rms = max(
        relative_rms(getattr(got.maps, name), getattr(expected.maps, name))
        for name in ("gm_probability", "task_variance", "artefact_variance")
    )
    differences = {
        name: _relative(got.scores.get(name, float("inf")), value) for name, value in expected.scores.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    passed = (
        rms <= MAP_TOLERANCE[precision] and differences[worst] <= SCORE_TOLERANCE and got.verdict == expected.verdict
    )
    return Row(engine, volume, rms, worst, differences[worst], got.verdict, expected.verdict, run_s, bool(passed))


def relative_rms(got: Array, expected: Array) -> float:
    """Root mean square of the difference over that of the expected map."""
    difference = float(np.sqrt(np.mean((got.astype(np.float64) - expected) ** 2)))
    return difference / max(float(np.sqrt(np.mean(expected.astype(np.float64) ** 2))), 1e-12)


def to_maps(out: dict[str, Array]) -> Maps:
    """Outputs by name -> maps."""
    return Maps(out["gm_probability"][0], out["task_variance"][0], out["artefact_variance"])


def admit(card: Card, rows: list[Row]) -> Card:
    """The card with the precisions for which every row passed; what was not run here keeps its state."""
    precisions = dict(card.precisions)
    for engine, choices in PRECISIONS.items():
        kept = []
        for precision in choices[1:]:
            own = [r for r in rows if r.engine == f"{engine} {precision}"]
            if all(r.passed for r in own) if own else precision in card.precisions.get(engine, ()):
                kept.append(precision)
        precisions[engine] = tuple(kept)
    return replace(card, precisions={k: v for k, v in precisions.items() if v})


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = (
        f"{'engine':<16} {'volume':<18} {'maps rel. RMS':>13} {'largest score difference':>38} {'verdict':>14} {'s':>7}"
    )
    lines = [f"reference: {REFERENCE}", head]
    for r in rows:
        score = f"{r.score} {100 * r.score_difference:.3f} %"
        verdict = "-" if r.verdict is None else r.verdict if r.verdict == r.expected else f"{r.expected}->{r.verdict}"
        mark = "" if r.passed else "  FAILED"
        lines.append(
            f"{r.engine:<16} {r.volume:<18} {r.map_rms:>13.2e} {score:>38} {verdict:>14} {r.run_s:>7.3f}{mark}"
        )
    return "\n".join(lines)


def _relative(got: float, expected: float) -> float:
    return abs(got - expected) / max(abs(expected), 1e-6)


__all__ = ["MemoryShort", "Row", "admit", "command", "compare", "table"]
