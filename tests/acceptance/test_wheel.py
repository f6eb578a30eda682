"""The wheel, installed elsewhere, is the program."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.builders import head_phantom, volume_of
from tests.conftest import ROOT

SHIPPED = "daemon/models/student.onnx"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, without the network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(out), str(ROOT)], check=True, cwd=out)
    (found,) = out.glob("rescan-*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; dependencies are seen in the one that runs the tests."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q"]
    subprocess.run([*install, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], check=True, cwd=folder)
    return folder / "bin"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def test_what_is_in_it(wheel: Path) -> None:
    """The three packages with their data, and no tests."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"daemon", "training", "export"}
    assert any(name.startswith("daemon/page/static/") for name in names)
    assert any(name.startswith("daemon/schemas/") for name in names)
    if (ROOT / SHIPPED).is_file():
        assert SHIPPED in names
    assert not any("__pycache__" in name or name.endswith(".pt") for name in names)


def test_it_is_the_wheel_that_runs(elsewhere: Path, tmp_path: Path) -> None:
    """The program comes from the fresh environment, not from the checkout."""
    done = run(elsewhere / "python", "-c", "import daemon; print(daemon.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(elsewhere.parent)


def test_help(elsewhere: Path, tmp_path: Path) -> None:
    """`rescan --help` names the commands and the notice."""
    text = run(elsewhere / "rescan", "--help", cwd=tmp_path).stdout
    assert "serve" in text
    assert "Not a medical device" in text


def test_score(elsewhere: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """`rescan score` judges a file with the student inside the wheel."""
    model = [] if (ROOT / SHIPPED).is_file() else ["--model", request.getfixturevalue("student")]
    volume = volume_of(head_phantom(), (2.0, 2.0, 2.0))
    nibabel.save(nibabel.Nifti1Image(volume.voxels.astype(np.float32), volume.affine), tmp_path / "scan.nii.gz")
    done = run(elsewhere / "rescan", "score", "scan.nii.gz", "--json", "--engine", "cpu", *model, cwd=tmp_path)
    (result,) = json.loads(done.stdout)
    assert result["verdict"] in {"PASS", "REVIEW", "RESCAN", "CANNOT_JUDGE"}
    assert result["reasons"]
