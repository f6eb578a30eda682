"""The README's first command does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """A clean scan is PASS, motion and spike are RESCAN for that artefact; three pictures; status 0."""
    if not (ROOT / "daemon" / "models" / "student.onnx").is_file():
        pytest.skip("no student ships yet")
    command = [sys.executable, "-m", "daemon", "demo", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "1. clean scan" in done.stdout
    assert done.stdout.count("(as expected)") == 3
    assert done.stdout.count("from the last image to the verdict") == 3
    pictures = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert pictures == ["1-clean.png", "2-motion.png", "3-spike.png"]
    assert all(file.stat().st_size > 20_000 for file in (tmp_path / "out").glob("*.png"))
