"""The made-up head is a head: whole, its own, with tissue that is known and of a plausible amount."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from daemon.demo.anatomy import (
    GREY,
    GRID,
    RIGHT_IDS,
    LabelledHead,
    Stream,
    Tissue,
    draw_brain,
    draw_head,
    head_seed,
    read_template,
)
from daemon.demo.paint import COLUMNS, ROWS, SLICES, WHITE_LEVEL, Scan, paint
from daemon.prepare import prepare

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nilearn") is None, reason="the extra `demo` is not installed")


@pytest.fixture(scope="module")
def head() -> LabelledHead:
    return draw_head(head_seed(Stream.DEMO, 0))


@pytest.fixture(scope="module")
def scan(head: LabelledHead) -> Scan:
    return paint(head, head_seed(Stream.DEMO, 1))


def test_streams_share_no_seed() -> None:
    """No head of the demo is a head of the training, whatever the index."""
    states = {tuple(head_seed(stream, index).generate_state(4)) for stream in Stream for index in range(500)}
    assert len(states) == len(Stream) * 500


def test_seed_decides() -> None:
    """The same seed gives the same brain; another seed folds it differently."""
    template = read_template()
    one, again, other = (
        draw_brain(template, np.random.default_rng(head_seed(Stream.DEMO, index))).labels for index in (3, 3, 4)
    )
    assert np.array_equal(one, again)
    differs = (one != other) & np.isin(one, (Tissue.CORTEX, Tissue.WHITE))
    assert 0.05 < differs.sum() / np.isin(one, (Tissue.CORTEX, Tissue.WHITE)).sum() < 0.6


def test_labels_are_known(head: LabelledHead) -> None:
    """Every label is a tissue, on a grid of 1 mm."""
    assert head.labels.shape == GRID
    assert head.labels.dtype == np.int16
    assert set(np.unique(head.labels).tolist()) <= {int(t) for t in Tissue} | set(RIGHT_IDS.values())
    assert np.array_equal(head.affine[:3, :3], np.eye(3))


def test_amounts_are_plausible(head: LabelledHead) -> None:
    """Grey and white matter of an adult, in millilitres; the head is one body of three to five litres."""
    grey_ml = np.isin(head.labels, GREY).sum() / 1000
    white_ml = np.isin(head.labels, (2, 41, 7, 46)).sum() / 1000
    assert 500 < grey_ml < 850
    assert 400 < white_ml < 700
    assert 2500 < (head.labels > 0).sum() / 1000 < 5500


def test_sides(head: LabelledHead) -> None:
    """Left ids lie on the left, right ids on the right, in equal parts but not as mirror images."""
    x = np.arange(GRID[0])[:, None, None] + head.affine[0, 3]
    left, right = head.labels == Tissue.CORTEX, head.labels == RIGHT_IDS[Tissue.CORTEX]
    assert (x * left).sum() / left.sum() < -15
    assert (x * right).sum() / right.sum() > 15
    assert left.sum() == pytest.approx(right.sum(), rel=0.15)


def test_the_brain_is_covered(head: LabelledHead) -> None:
    """No grey or white matter touches air, and the cord goes on to the lower end: nothing of the template's cut is left."""
    brain = np.isin(head.labels, (*GREY, 2, 41, 7, 46))
    air = head.labels == Tissue.AIR
    touching = sum(int((brain & np.roll(air, step, axis)).sum()) for axis in range(3) for step in (-1, 1))
    assert touching < 0.002 * brain.sum()
    assert (head.labels[:, :, 0] == Tissue.BRAINSTEM).any()


def test_scan_has_the_shape_of_a_scan(scan: Scan) -> None:
    """176 sagittal slices of 256 by 256, white matter brighter than grey, grey brighter than CSF."""
    assert scan.volume.voxels.shape == scan.labels.shape == (SLICES, COLUMNS, ROWS)
    image = scan.volume.voxels
    white, grey, csf = (float(np.median(image[np.isin(scan.labels, ids)])) for ids in ((2, 41), (3, 42), (4, 43)))
    assert white > 1.2 * grey > 1.2 * 1.5 * csf
    assert 0.7 * WHITE_LEVEL < white < 1.3 * WHITE_LEVEL
    assert np.isfinite(image).all()
    assert image.min() >= 0


def test_scan_is_prepared(scan: Scan) -> None:
    """The daemon takes it for a whole head."""
    prepared = prepare(scan.volume)
    assert prepared.native_mask.mean() > 0.5
    inside = scan.grey_mask().sum() / 1000
    assert inside > 500


def test_same_seed_same_scan(head: LabelledHead, scan: Scan) -> None:
    """A scan can be made again."""
    assert np.array_equal(paint(head, head_seed(Stream.DEMO, 1)).volume.voxels, scan.volume.voxels)
