"""A model file of five operators with a made-up calibration: for tests of everything around the network, never of verdicts.

Grey matter is where the image is bright, and every variance is a constant; so it is quick, needs no torch, and any head has
plenty of grey matter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.card import (
    CARD_KEY,
    CARD_VERSION,
    GOLDEN_KEY,
    Card,
    Golden,
    ModelFile,
    card_json,
    graph_sha256,
    parse_calibration,
    replace_metadata,
)
from daemon.config import SHIPPED_MODEL
from daemon.engines import OUTPUTS, open_engine
from daemon.golden import encode_volume, golden_sha256
from daemon.prepare import BUCKETS, SPACING_MM
from daemon.student import Student, golden_outcome
from daemon.words import ARTEFACTS
from tests.builders import head_phantom, volume_of

OPSET = 18


def calibration(*, bad: bool = False) -> dict[str, Any]:
    """A calibration with which every scan that has grey matter is `PASS`, or, where `bad`, `RESCAN`."""
    return {
        "population": "none: made up for tests",
        "risk": [{"score": "entropy_gm", "weight": 1.0, "floor": 0.001}],
        "dice": {"x": [-10.0, 10.0], "y": [0.6, 0.55] if bad else [0.95, 0.9]},
        "bounds": [{"risk_upto": 100.0, "low": -0.05, "high": 0.04, "scans": 100}],
        "bound_rate": 0.1,
        "required_dice": 0.8,
        "alarm_risk": -100.0 if bad else 100.0,
        "alarm_rate": 0.05,
        "alarm_confidence": 0.95,
        "alarm_scans": 100,
        "artefact_clean": [-3.0, -3.0, -3.0, -3.0, -5.0],
        "artefact_unmixing": [[float(i == j) for j in range(5)] for i in range(5)],
        "affected_variance": 1.0,
        "volume_width": {"x": [-10.0, 10.0], "y": [1.0, 2.0]},
        "gates": [],
        "samples": {},
    }


def graph() -> bytes:
    """The graph as bytes."""
    onnx = pytest.importorskip("onnx", reason="neither onnx nor a student is here")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    numbers = {"gain": 0.95, "low": 0.02, "high": 0.98, "slope": 0.01, "base": 0.05}
    constants = [helper.make_tensor(name, kind, [], [value]) for name, value in numbers.items()]
    probability, variance, artefact = OUTPUTS
    nodes = [
        helper.make_node("Mul", ["image", "gain"], ["bright"]),
        helper.make_node("Clip", ["bright", "low", "high"], [probability]),
        helper.make_node("Mul", ["image", "slope"], ["faint"]),
        helper.make_node("Add", ["faint", "base"], [variance]),
        helper.make_node("Concat", [variance] * len(ARTEFACTS), [artefact], axis=1),
    ]
    shape = [1, 1, "D", "H", "W"]
    inputs = [helper.make_tensor_value_info("image", kind, shape)]
    outputs = [
        helper.make_tensor_value_info(name, kind, [1, len(ARTEFACTS) if name == artefact else 1, "D", "H", "W"])
        for name in OUTPUTS
    ]
    made = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return bytes(model.SerializeToString())


def card(data: bytes, *, bad: bool) -> Card:
    return Card(
        card_version=CARD_VERSION,
        name="small",
        version="0",
        artefacts=ARTEFACTS,
        input_name="image",
        outputs=dict.fromkeys(OUTPUTS, "for tests"),
        spacing_mm=SPACING_MM,
        orientation="RAS+",
        preparation="as the daemon's",
        buckets=BUCKETS,
        temperature=1.0,
        graph_sha256=graph_sha256(data),
        opset=OPSET,
        operators={"Mul": 2, "Clip": 1, "Add": 1, "Concat": 1},
        weights=5,
        activation_bytes_per_voxel=64.0,
        gigaflops={"x".join(map(str, bucket)): 0.01 for bucket in BUCKETS},
        precisions={},
        intended_use="tests",
        limits=("tests",),
        licence="as the software",
        training={},
        evaluation={},
        calibration=parse_calibration(calibration(bad=bad), "tests"),
    )


def build_student(file: Path, *, bad: bool = False) -> Path:
    """Write the model file; where onnx is absent, the shipped student serves instead."""
    try:
        data = graph()
    except pytest.skip.Exception:
        if SHIPPED_MODEL.is_file():
            return SHIPPED_MODEL
        raise
    packed = encode_volume(volume_of(head_phantom().astype(np.float32), (2.0, 2.0, 2.0)))
    made = card(data, bad=bad)
    student = Student(
        ModelFile(data, "", made, packed), open_engine(ModelFile(data, "", made, packed), "cpu", "fp32", 1)
    )
    for bucket in BUCKETS:
        student.load(bucket)
    scores, verdict = golden_outcome(student, packed)
    made = replace(made, golden=Golden(golden_sha256(packed), scores, verdict, 0.01))
    file.write_bytes(replace_metadata(data, {CARD_KEY: card_json(made), GOLDEN_KEY: packed}))
    return file


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file under which scans pass."""
    return build_student(tmp_path_factory.mktemp("student") / "small.onnx")


@pytest.fixture(scope="session")
def strict_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file under which scans are to be repeated."""
    return build_student(tmp_path_factory.mktemp("student") / "strict.onnx", bad=True)
