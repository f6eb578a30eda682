"""`rescan explain`: what is found, which rule admits it, why the others do not."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from daemon.__main__ import main
from daemon.explain import as_text, explain_path
from daemon.rules import Rule
from tests.builders import little_stack, part10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A T1 head of 56 slices."""
    for number, ds in enumerate(little_stack(56)):
        (tmp_path / f"{number:03}.dcm").write_bytes(part10(ds))
    return tmp_path


def test_an_admitted_stack(folder: Path) -> None:
    """Images, geometry, and the rule that judges it."""
    (about,) = explain_path(folder)
    assert (about["rule"], about["refused"], about["images"]) == ("t1_head_3d", None, 56)
    assert about["geometry"] == {
        "plane": "sagittal",
        "oblique_deg": 0.0,
        "slices": 56,
        "spacing_mm": [2.5, 2.5, 2.5],
        "extent_mm": 140.0,
    }
    text = as_text(1, about)
    assert "judged    by rule t1_head_3d" in text
    assert "56 sagittal slices 2.5 mm apart" in text


def test_every_rule_that_does_not_admit_says_why(folder: Path) -> None:
    """The first admits nothing here, the second admits, and both are told."""
    rules = (Rule(name="flair", description="(?i)flair"), Rule(name="any_t1"))
    (about,) = explain_path(folder, rules)
    assert about["rule"] == "any_t1"
    assert about["rules"]["any_t1"] is None
    assert about["rules"]["flair"]["code"] == "no_rule"
    assert "not flair: " in as_text(1, about)


def test_damaged_pixels_are_found_where_asked_for(folder: Path) -> None:
    """`--pixels` decodes as the daemon would."""
    path = min(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    assert explain_path(folder)[0]["refused"] is None
    assert explain_path(folder, pixels=True)[0]["refused"]["code"] == "bad_pixels"


def test_nifti_passes_the_header_rules(tmp_path: Path) -> None:
    """It has no header to be matched."""
    nib.save(nib.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4)), tmp_path / "a.nii")
    (about,) = explain_path(tmp_path / "a.nii")
    assert (about["rule"], about["refused"]) == ("t1_head_3d", None)
    assert "4 x 4 x 4" in as_text(1, about)


def test_the_command_prints_json_or_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Machine output on stdout alone."""
    assert main(["explain", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["rule"] == "t1_head_3d"
    assert main(["explain", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("stack 1: 2 T1 MPRAGE sag 1mm")


def test_mistakes_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing path, an empty folder, a wrong rule."""
    assert main(["explain", str(tmp_path / "nothing")]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main(["explain", str(tmp_path)]) == 0
    assert "no image found" in capsys.readouterr().err
    config = tmp_path / "c.toml"
    config.write_text('[[rules]]\nname = "a"\nslces = [1, 2]\n')
    assert main(["explain", str(tmp_path), "--config", str(config)]) == 2
    assert "did you mean slices?" in capsys.readouterr().err
