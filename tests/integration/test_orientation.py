"""The same head gives the same scores, however it lay and was sliced and stored; with the student that ships."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from daemon.card import read_model
from daemon.config import SHIPPED_MODEL, ModelSettings
from daemon.dicom_write import Plan
from daemon.golden import decode_volume
from daemon.prepare import to_canonical
from daemon.scorer import look_at, open_student
from daemon.student import Student
from daemon.words import Array, Volume
from tests.builders import build, build_classic_series, build_enhanced, stacks_in

TOLERANCE = 0.02
"""What the same head's scores may differ by, as a share of each score."""

Head = tuple[Array, tuple[float, float, float]]


@pytest.fixture(scope="module")
def student() -> Student:
    """The student that ships."""
    if not SHIPPED_MODEL.is_file():
        pytest.skip("no student is in this checkout")
    return open_student(ModelSettings())


@pytest.fixture(scope="module")
def head(student: Student) -> Head:
    """The head of the student's own golden case, (z, y, x) uint16 with its spacing in the same order."""
    assert student.card.golden is not None
    canonical = to_canonical(decode_volume(read_model(SHIPPED_MODEL).golden))
    scaled = canonical.voxels * (4000.0 / float(canonical.voxels.max()))
    z, y, x = (float(s) for s in canonical.spacing_mm[::-1])
    return np.ascontiguousarray(scaled.transpose(2, 1, 0)).astype(np.uint16), (z, y, x)


def scores_of(images: list[Dataset], student: Student) -> dict[str, float]:
    """Every number that is told of a series."""
    (stack,) = stacks_in(images)
    found = look_at(lambda: build(stack, images), student).scored
    assert found.scores is not None, found.refusal
    artefacts = {f"{name} {key}": value for name, each in found.scores.artefacts.items() for key, value in each.items()}
    return found.scores.flat() | artefacts


def turned(head: Head, degrees_about_x: float, degrees_about_z: float) -> Volume:
    """The affine of the head in a scanner in which it lies at an angle: oblique."""
    voxels, spacing = head
    a, b = np.deg2rad([degrees_about_x, degrees_about_z])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing[::-1])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(voxels.shape[::-1]) - 1) / 2
    return Volume(voxels, affine)


def test_scores_do_not_depend_on_how_a_head_was_sliced_and_stored(student: Student, head: Head) -> None:
    """Sagittal, coronal, axial, rows backwards as in the prone, decubitus, Enhanced, oblique and double oblique: within 2 %, each score."""
    truth = scores_of(build_classic_series(*head, "sagittal"), student)
    backwards = Plan(reverse_rows=True)
    ways = {
        "coronal": build_classic_series(*head, "coronal"),
        "axial, prone": build_classic_series(*head, "axial", plan=backwards, PatientPosition="HFP"),
        "axial, on the left side": build_classic_series(*head, "axial", PatientPosition="HFDL"),
        "coronal, on the right side": build_classic_series(*head, "coronal", plan=backwards, PatientPosition="HFDR"),
        "Enhanced, sagittal, prone": [build_enhanced(*head, "sagittal", plan=backwards)],
        "oblique": build_classic_series(*head, "axial", affine=turned(head, 17.0, 0.0).affine),
        "double oblique, prone": build_classic_series(
            *head, "coronal", plan=backwards, affine=turned(head, -9.0, 12.0).affine
        ),
    }
    for way, images in ways.items():
        found = scores_of(images, student)
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            assert found[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), (way, name)
