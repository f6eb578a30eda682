"""The README's first command does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def demo(pictures: Path) -> subprocess.CompletedProcess[str]:
    """One run of `rescan demo` with the student that ships."""
    if not (ROOT / "daemon" / "models" / "student.onnx").is_file():
        pytest.skip("no student ships yet")
    command = [sys.executable, "-m", "daemon", "demo", "--out", str(pictures)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_every_scan_gets_its_verdict(demo: subprocess.CompletedProcess[str], pictures: Path) -> None:
    """Three scans are pushed, judged and drawn; the clean one passes, the other two must be repeated."""
    parts = demo.stdout.split("\n\n")[0]
    assert parts.count("from the last image to the verdict") == 3, f"{demo.stdout}\n{demo.stderr}"
    clean, rest = parts.split("2. motion scan")
    motion, spike = rest.split("3. spike scan")
    assert "PASS (as expected)" in clean
    assert "RESCAN (as expected)" in motion
    assert "RESCAN (as expected)" in spike
    assert sorted(file.name for file in pictures.glob("*.png")) == ["1-clean.png", "2-motion.png", "3-spike.png"]
    assert all(file.stat().st_size > 20_000 for file in pictures.glob("*.png"))


def test_status_tells_whether_all_was_right(demo: subprocess.CompletedProcess[str]) -> None:
    """The exit status is 0 exactly if all three verdicts are as expected."""
    assert (demo.returncode == 0) == (demo.stdout.count("(as expected)") == 3)


def test_all_three_are_right(demo: subprocess.CompletedProcess[str]) -> None:
    """Clean is PASS, motion and spike are RESCAN for that artefact."""
    assert demo.returncode == 0, demo.stdout
