"""A whole cascade at toy size, from anatomy to student: it learns, decouples a little, resumes and repeats itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")
pytest.importorskip("nilearn", reason="nilearn is not installed: the built-in anatomy needs the demo extra")

from daemon.words import ARTEFACTS  # noqa: E402
from training.bank import IMAGES, list_cases, read_case  # noqa: E402
from training.network import UNet, load_network  # noqa: E402
from training.validate import decoupling, read  # noqa: E402

STAGES = ("task", "teacher_noise", "teacher_spike", "teacher_blur", "teacher_wrap", "teacher_motion", "student")


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One smoke cascade, shared by the tests of this file."""
    out = tmp_path_factory.mktemp("cascade")
    begun = time.monotonic()
    run(out)
    print(f"smoke cascade: {time.monotonic() - begun:.0f} s")
    return out


def run(out: Path) -> None:
    """`rescan-train cascade` as a user would."""
    command = [sys.executable, "-m", "training", "cascade", "--out", str(out), "--profile", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_all_stages_are_there(cascade: Path) -> None:
    """Seven checkpoints, each with its curve, each naming what it was trained on."""
    for stage in STAGES:
        checkpoint = load_network(cascade / f"{stage}.pt")[1]
        assert checkpoint["stage"] == stage
        assert checkpoint["data"] == "builtin"
        assert (cascade / f"{stage}.curve.jsonl").read_text().strip()


def test_student_beats_the_untrained(cascade: Path) -> None:
    """On a head it never saw, the student segments better than a network that learnt nothing."""
    case = read_case(list_cases(cascade / "bank" / "val")[0])
    student = load_network(cascade / "student.pt")[0]
    torch.manual_seed(0)
    trained, untrained = read(student, case, 0).dice, read(UNet(student.config).eval(), case, 0).dice
    print(f"held-out Dice: {trained:.3f} trained, {untrained:.3f} untrained")
    assert trained > untrained + 0.1


RISING = ("spike", "blur", "wrap")
"""Artefacts asserted at smoke size: the drawn noise leaves nothing of the head, the drawn motion is mild."""


def test_own_channel_ranks_severe_above_clean(cascade: Path) -> None:
    """A spike, blur and wrap raise their own channel on a head never seen."""
    student = load_network(cascade / "student.pt")[0]
    matrix, _, _ = decoupling(student, [read_case(p) for p in list_cases(cascade / "bank" / "val")])
    print("mean sigma_i^2 given artefact j, over clean\n", np.round(matrix, 2))
    own = {a: float(matrix[i, i]) for i, a in enumerate(ARTEFACTS)}
    assert all(own[a] > 1.0 for a in RISING), own


def test_finished_stages_are_not_repeated(cascade: Path) -> None:
    """The same command again changes no checkpoint."""
    before = {s: (cascade / f"{s}.pt").stat().st_mtime_ns for s in STAGES}
    run(cascade)
    assert {s: (cascade / f"{s}.pt").stat().st_mtime_ns for s in STAGES} == before


def test_bank_replays(cascade: Path) -> None:
    """A case deleted and made again is the same to the last bit."""
    folder = list_cases(cascade / "bank" / "val")[0]
    before = np.array(read_case(folder).images[IMAGES.index("motion_a")])
    folder.rename(folder.with_suffix(".old"))
    run(cascade)
    assert np.array_equal(np.array(read_case(folder).images[IMAGES.index("motion_a")]), before)
