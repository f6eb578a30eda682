"""The GPU script: on the GPU where there is one, else rehearsed on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.network_student import network_student

__all__ = ["network_student"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_inference", Path(__file__).with_name("inference.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_the_script_runs_on_the_cpu(
    script: ModuleType, network_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage is timed and printed, with FLOPs, bytes and the share of the ceiling, on a small bucket."""
    flags = ["--device", "cpu", "--bucket", "16x24x32", "--rounds", "2", "--matrix", "256", "--no-parity"]
    assert script.main([str(network_student), *flags]) == 0
    out = capsys.readouterr().out
    assert "| torch eager fp32 | 16x24x32" in out
    assert "| cpu fp32 | 16x24x32" in out
    assert "goal on an H200-class card" in out


@pytest.mark.gpu
def test_parity_and_latency_on_the_gpu(
    script: ModuleType, network_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No map, score or verdict differs on CUDA, and a verdict takes less than 150 ms."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU answers torch here")
    assert script.main([str(network_student)]) == 0
    print(capsys.readouterr().out)
