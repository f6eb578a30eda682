"""A model file that was really exported: a small network with random weights and a made-up calibration."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from daemon.config import SHIPPED_MODEL
from tests.small_student import calibration


@pytest.fixture(scope="session")
def network_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported file; without torch the student that ships."""
    if importlib.util.find_spec("torch") is None:
        if not SHIPPED_MODEL.is_file():
            pytest.skip("neither torch nor a student is here")
        return SHIPPED_MODEL
    golden, graph, onnx = (importlib.import_module(f"export.{name}") for name in ("golden", "graph", "onnx"))
    path = tmp_path_factory.mktemp("network") / "random.onnx"
    onnx.export_student(
        graph.random_student(), path, onnx.Facts("random", "0", calibration=calibration()), golden.golden_volume()
    )
    return path
