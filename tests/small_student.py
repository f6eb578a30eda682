"""A student with random weights and a made-up calibration: for tests of everything around the network, never of verdicts."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from daemon.config import SHIPPED_MODEL


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
        "artefact_clean": [-3.0] * 5,
        "artefact_unmixing": [[float(i == j) for j in range(5)] for i in range(5)],
        "affected_variance": 1.0,
        "volume_width": {"x": [-10.0, 10.0], "y": [1.0, 2.0]},
        "gates": [],
        "samples": {},
    }


def build_student(file: Path, *, bad: bool = False) -> Path:
    """Write the model file; needs torch, and takes the shipped student where that is absent."""
    if importlib.util.find_spec("torch") is None:
        if not SHIPPED_MODEL.is_file():
            pytest.skip("neither torch nor a student is here")
        return SHIPPED_MODEL
    golden, graph, onnx = (importlib.import_module(f"export.{name}") for name in ("golden", "graph", "onnx"))
    facts = onnx.Facts(name="small", version="0", calibration=calibration(bad=bad))
    onnx.export_student(graph.random_student(), file, facts, golden.formula_head())
    return file


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file under which scans pass."""
    return build_student(tmp_path_factory.mktemp("student") / "small.onnx")


@pytest.fixture(scope="session")
def strict_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file under which scans are to be repeated."""
    return build_student(tmp_path_factory.mktemp("student") / "strict.onnx", bad=True)
