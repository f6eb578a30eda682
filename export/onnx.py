"""Student -> one `.onnx` file with its card, its golden case and the graph that reduces its maps."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from daemon.card import (
    CARD_KEY,
    CARD_VERSION,
    GOLDEN_KEY,
    REDUCER_KEY,
    Card,
    CardError,
    Golden,
    ModelFile,
    card_json,
    graph_sha256,
    parse_calibration,
    read_model,
    replace_metadata,
)
from daemon.engines import open_engine
from daemon.golden import encode_volume, golden_sha256
from daemon.prepare import BUCKETS, INTENSITY_MAX, SPACING_MM, TISSUE_ML
from daemon.student import Student, golden_outcome
from daemon.words import ARTEFACTS, Volume
from export.graph import INPUT, OPSET, GraphFacts, build_graph, fold, graph_facts, save_bytes
from export.reducer import build_reducer
from training.network import UNet

GOLDEN_TOLERANCE = 0.01
MAX_SHIPPED_BYTES = 25 * 10**6

PREPARATION = (
    f"Axes permuted to R, A, S; cells of {SPACING_MM:g} mm are means of the voxels inside them, in a box hung on the top of the head; "
    f"intensity divided by the level that {TISSUE_ML:g} ml of the box exceed, clipped to 0..{INTENSITY_MAX:g}; 0 outside the field of view"
)

OUTPUT_MEANING = {
    "gm_probability": "(1, 1, D, H, W) float32 in [0, 1]: temperature-scaled probability of grey matter",
    "task_variance": "(1, 1, D, H, W) float32, exp of a log-variance clamped to [-9.7, 11]: sigma_t^2, uncertainty given clean data",
    "artefact_variance": f"(1, 5, D, H, W) float32, the same clamp: sigma_i^2 of {', '.join(ARTEFACTS)}",
}

INTENDED_USE = (
    "Tells, from one T1-weighted MR series of a whole adult head, whether it is good enough to measure grey matter. "
    "Research and quality assurance; not a medical device, never the sole basis of a decision about a patient."
)

LIMITS = (
    "Only grey matter is judged: artefacts outside it are not.",
    "Trained on simulated artefacts of five kinds; others are seen only as far as they resemble these.",
    "Adults with a whole head in the field of view, 3-D T1 contrast, voxels of at most 2 mm.",
    "The stated error rates hold for the population of the calibration; a site checks its own with `rescan calibrate`.",
)

LICENCE = "As the software; see LICENSE and docs/student.md for the data behind the weights."


@dataclass(frozen=True)
class Facts:
    """What the card says beside what follows from the graph; each may come from a file (`--calibration`).

    Attributes:
        name, version: of the model.
        temperature: divisor of the logits.
        calibration: as `daemon.card.Calibration`, decoded JSON; None for a model that may not be served yet.
        training, evaluation: facts and figures for the card.
    """

    name: str = "rescan-student"
    version: str = "0"
    temperature: float = 1.0
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


class ExportError(Exception):
    """An export that must not be shipped; one line with the remedy."""


def read_facts(path: Path | None, base: Facts | None = None) -> Facts:
    """Read a file of facts: JSON with any of the fields of `Facts`.

    Raises:
        ExportError: unreadable, not JSON, or an unknown key.
    """
    base = Facts() if base is None else base
    if path is None:
        return base
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return replace(base, **raw)
    except (OSError, ValueError, TypeError) as error:
        known = ", ".join(f.name for f in dataclasses.fields(Facts))
        raise ExportError(f"{path.name}: expected JSON with keys from {known} ({error})") from None


def export_student(network: UNet, out: Path, facts: Facts, golden: Volume, up: str = "resize") -> Card:
    """Write the model file of a student.

    Args:
        network: trained student.
        out: path of the file; replaced atomically.
        facts: for the card.
        golden: volume of the golden case.
        up: form of the upsampling, `resize` or `transpose`.

    Returns:
        The card inside.

    Raises:
        ExportError: the file would be larger than may ship.
        GraphError: see `export.graph`.
        CardError: the calibration contradicts itself.
    """
    model = build_graph(fold(network, facts.temperature, up), BUCKETS[0])
    graph = graph_facts(model, BUCKETS)
    data = save_bytes(model)
    reducer = base64.b64encode(save_bytes(build_reducer())).decode()
    packed = encode_volume(golden)
    card = replace(_card(facts, graph), graph_sha256=graph_sha256(data))
    data = replace_metadata(data, {GOLDEN_KEY: packed, REDUCER_KEY: reducer})
    card = with_golden(card, data, packed, reducer)
    return write_model(data, card, out)


def recalibrate(source: Path, out: Path, facts_file: Path) -> Card:
    """Embed another calibration, evaluation or training record without touching the graph.

    Raises:
        ExportError: the facts name another temperature than the one baked into the graph.
        CardError: the file cannot be served, or the calibration contradicts itself.
    """
    model = read_model(source)
    old = model.card
    base = Facts(old.name, old.version, old.temperature, None, old.training, old.evaluation)
    if old.calibration is not None:
        base = replace(base, calibration=dataclasses.asdict(old.calibration))
    facts = read_facts(facts_file, base)
    if facts.temperature != old.temperature:
        raise ExportError(
            f"temperature: the graph holds {old.temperature}, {facts_file.name} says {facts.temperature}; "
            "export the checkpoint again"
        )
    calibration = None if facts.calibration is None else parse_calibration(facts.calibration, facts_file.name)
    card = replace(
        old,
        name=facts.name,
        version=facts.version,
        calibration=calibration,
        training=facts.training,
        evaluation=facts.evaluation,
    )
    card = with_golden(card, model.data, model.golden, model.reducer)
    return write_model(model.data, card, out)


def with_golden(card: Card, data: bytes, packed: str, reducer: str) -> Card:
    """The card with the golden case's outcome, computed by ONNX Runtime on the CPU in fp32 through the daemon's own steps."""
    model = ModelFile(data, "", card, packed, reducer)
    student = Student(model, open_engine(model, "cpu", "fp32", 0))
    for bucket in card.buckets:
        student.load(bucket)
    scores, verdict = golden_outcome(student, packed)
    return replace(card, golden=Golden(golden_sha256(packed), scores, verdict, GOLDEN_TOLERANCE))


def write_model(data: bytes, card: Card, out: Path) -> Card:
    """Write a model file with this card, and read it back as the daemon would.

    Raises:
        ExportError: larger than may ship, or it cannot be written.
        CardError: what was written cannot be served.
    """
    data = replace_metadata(data, {CARD_KEY: card_json(card)})
    if len(data) > MAX_SHIPPED_BYTES:
        print(f"note: {len(data)} bytes; a student that ships has at most {MAX_SHIPPED_BYTES}", file=sys.stderr)
    part = out.with_suffix(out.suffix + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        written = read_model(part).card
        part.replace(out)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror}); give another path") from None
    return written


def commit() -> str:
    """Commit of the source that exports, or `unknown` outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def training_facts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its making: everything plain beside weights and optimiser state."""
    plain = {k: v for k, v in checkpoint.items() if k != "weights" and _is_plain(v)}
    return {**plain, "export_commit": commit()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) < 100 and all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return len(value) < 100 and all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool)


def _card(facts: Facts, graph: GraphFacts) -> Card:
    calibration = None if facts.calibration is None else parse_calibration(facts.calibration, "calibration")
    return Card(
        card_version=CARD_VERSION,
        name=facts.name,
        version=facts.version,
        artefacts=ARTEFACTS,
        input_name=INPUT,
        outputs=OUTPUT_MEANING,
        spacing_mm=SPACING_MM,
        orientation="RAS+: the indices grow to the right, to the front, to the top",
        preparation=PREPARATION,
        buckets=BUCKETS,
        temperature=facts.temperature,
        graph_sha256="",
        opset=OPSET,
        operators=graph.operators,
        weights=graph.weights,
        activation_bytes_per_voxel=graph.activation_bytes_per_voxel,
        gigaflops=graph.gigaflops,
        precisions={},
        intended_use=INTENDED_USE,
        limits=LIMITS,
        licence=LICENCE,
        training=facts.training,
        evaluation=facts.evaluation,
        calibration=calibration,
    )


__all__ = ["CardError", "ExportError", "Facts", "export_student", "read_facts", "recalibrate", "training_facts"]
