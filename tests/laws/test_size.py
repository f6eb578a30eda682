"""The same head scores the same with more air around it, and in a larger input; with the student that ships."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest

from daemon.card import read_model
from daemon.config import SHIPPED_MODEL
from daemon.engines import open_engine
from daemon.prepare import Prepared, prepare
from daemon.score import raw_scores, reduce_maps, score_reduced
from daemon.student import Student
from daemon.words import Volume

TOLERANCE = 0.01
"""Largest change of a score, as a share of it."""

LEAST = 0.001
"""Smaller changes are none: a clean scan's mean variance is 0.01 in the box and 0.04 around grey matter."""

AIR_MM = 30
MARGINS = ((8, 8), (8, 8), (16, 0))
"""Cells around the prepared image: 112 x 128 x 112 instead of 96 x 112 x 96. The top stays where it is."""


@pytest.fixture(scope="module")
def scans() -> list[Volume]:
    """The demo's head, 1 mm: clean, moved, with a spike."""
    pytest.importorskip("nilearn", reason="nilearn is not installed: the built-in anatomy needs the demo extra")
    from daemon.demo.command import make_scans

    return [scan.volume for scan in make_scans()]


@pytest.fixture(scope="module")
def student() -> Student:
    """The student that ships, ready for both sizes."""
    if not SHIPPED_MODEL.is_file():
        pytest.skip("no student is in this checkout")
    model = read_model(SHIPPED_MODEL)
    bucket = model.card.buckets[0]
    larger = tuple(n + low + high for n, (low, high) in zip(bucket, MARGINS, strict=True))
    card = dataclasses.replace(model.card, buckets=(bucket, (larger[0], larger[1], larger[2])))
    student = Student(dataclasses.replace(model, card=card), open_engine(model, "openvino", "fp32", 0))
    student.load_all()
    return student


def scores_of(student: Student, prepared: Prepared) -> dict[str, float]:
    """Every number that is told of a scan, and every one that the risk can be made of."""
    reduced = reduce_maps(student.run(prepared), prepared)
    scores = score_reduced(reduced, prepared, student.card)
    artefacts = {f"{name} score": each["score"] for name, each in scores.artefacts.items()}
    assert scores.risk is not None
    # The risk is a logarithm: its argument is what may change by a share of itself.
    return raw_scores(reduced) | scores.flat() | artefacts | {"risk": math.exp(scores.risk)}


def assert_same(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        least = TOLERANCE if name.endswith(" score") else LEAST  # an artefact's score is itself a share
        assert found[name] == pytest.approx(value, rel=TOLERANCE, abs=least), name


def test_more_air_changes_no_score(student: Student, scans: list[Volume]) -> None:
    """30 mm of air on every side."""
    for scan in scans:
        wide = np.pad(scan.voxels, AIR_MM, mode="constant", constant_values=float(np.percentile(scan.voxels, 1)))
        affine = scan.affine.copy()
        affine[:3, 3] -= affine[:3, :3] @ np.full(3, AIR_MM)
        assert_same(scores_of(student, prepare(Volume(wide, affine))), scores_of(student, prepare(scan)))


def test_a_larger_input_changes_no_score(student: Student, scans: list[Volume]) -> None:
    """The same head in the next larger input of the network."""
    for scan in scans:
        small = prepare(scan)
        large = dataclasses.replace(
            small,
            image=np.pad(small.image, MARGINS),
            native_mask=np.pad(small.native_mask, MARGINS),
            head_mask=np.pad(small.head_mask, MARGINS),
        )
        assert_same(scores_of(student, large), scores_of(student, small))
