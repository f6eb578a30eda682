"""Training in several processes (DDP through torchrun), here two on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")

STEPS = 4


def run(out: Path, *launcher: str) -> dict[str, torch.Tensor]:
    """Weights after the steps."""
    out.mkdir()
    together = ["--together"] if launcher else []
    command = [sys.executable, *launcher, "-m", "tests.together", str(out), str(STEPS), *together]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    weights: dict[str, torch.Tensor] = torch.load(out / "tiny.pt", weights_only=True)["weights"]
    return weights


def test_two_processes_train_as_one_with_both_their_samples(tmp_path: Path) -> None:
    """The weights agree with one process that sees both samples of each step; one checkpoint, one curve are written."""
    alone = run(tmp_path / "alone")
    both = run(tmp_path / "both", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for name, value in alone.items():
        assert torch.allclose(both[name], value, atol=1e-5), name
    assert len((tmp_path / "both" / "tiny.curve.jsonl").read_text().splitlines()) == 1
