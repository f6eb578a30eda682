"""The README's first command does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "daemon" / "models" / "student.onnx").is_file(), reason="no student is in this checkout"
    ),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of `rescan demo`, and where its pictures are."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "daemon", "demo", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False), out


def test_clean_passes_and_spike_is_caught(demo: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """The clean scan is PASS, the one with a spike RESCAN for the spike; each with its time; status 0 only if all are."""
    done, _ = demo
    assert "1. clean scan" in done.stdout, done.stderr
    assert "verdict         PASS (as expected)" in done.stdout
    assert "verdict         RESCAN (as expected)\n   artefact        spike" in done.stdout
    assert done.stdout.count("from the last image to the verdict") == 3
    assert (done.returncode == 0) == (done.stdout.count("(as expected)") == 3)


@pytest.mark.xfail(strict=True, reason="the shipped student 0.1.0 does not see motion of 2 mm yet (docs/student.md)")
def test_motion_is_caught(demo: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """The scan with motion is RESCAN for motion."""
    assert demo[0].returncode == 0


def test_pictures(demo: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Each series has its picture."""
    pictures = sorted(demo[1].glob("*.png"))
    assert [p.name for p in pictures] == ["1-clean.png", "2-motion.png", "3-spike.png"]
    assert all(p.stat().st_size > 20_000 for p in pictures)
