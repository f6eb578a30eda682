"""A head that is cut off: refused from the image, whatever the header says; and never `PASS` where brain reaches the edge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from daemon.coverage import folds_over
from daemon.judge import MAX_GM_AT_EDGE_CM2, judge
from daemon.prepare import Box, Prepared, prepare, to_canonical
from daemon.score import Scores, gm_at_edge_cm2, predicted_dice, reduce_maps
from daemon.volume import volumes_from_path
from daemon.words import ARTEFACTS, Maps, Refusal, Verdict, Volume
from tests.builders import head_phantom, volume_of
from tests.model_builders import made_up_calibration, made_up_card

AXES = {"right-left": 0, "front-back": 1, "head-foot": 2}
CALIBRATION = made_up_calibration()
CARD = made_up_card(CALIBRATION)


@pytest.fixture(scope="module")
def whole() -> Volume:
    """The head of the tests, whole, with folds that are not the same on both sides."""
    head = head_phantom().astype(np.float32)
    folds = ndimage.gaussian_filter(np.random.default_rng(5).normal(0.0, 1.0, head.shape), 2.0)
    return volume_of(head * (1.0 + 0.2 * folds / folds.std()), (2.0, 2.0, 2.0))


def kept(volume: Volume, axis: int, first: int, last: int) -> Volume:
    """Some of the planes along one axis."""
    inside = [slice(None)] * 3
    inside[axis] = slice(first, last)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, axis] * first
    return Volume(np.ascontiguousarray(volume.voxels[tuple(inside)]), affine)


def code_of(volume: Volume) -> str | None:
    try:
        prepare(volume)
    except Refusal as refusal:
        return refusal.reason.code
    return None


SHARES = (0.5, 0.6, 0.7, 0.77, 0.8)
CUTS = [
    pytest.param(axis, from_low, share, id=f"{share:.0%} of {name}, {'low' if from_low else 'high'} end kept")
    for name, axis in AXES.items()
    for from_low in (True, False)
    for share in SHARES
    if name != "head-foot" or from_low or share < 0.7  # else the neck alone is cut
]


def code_of_part(volume: Volume, axis: int, from_low: bool, share: float) -> str | None:
    """What becomes of a share of the planes along one axis."""
    planes = volume.voxels.shape[axis]
    count = int(share * planes)
    return code_of(kept(volume, axis, 0, count) if from_low else kept(volume, axis, planes - count, planes))


@pytest.mark.parametrize(("axis", "from_low", "share"), CUTS)
def test_a_head_cut_off_at_any_side_is_refused(whole: Volume, axis: int, from_low: bool, share: float) -> None:
    """Half to four fifths of the planes along each axis, from either end: partial coverage, or no head at all."""
    assert code_of_part(whole, axis, from_low, share) in {"partial_coverage", "not_a_head"}


def test_a_real_head_is_taken_whole_and_refused_in_part(shared_data: Path) -> None:
    """The Philips series, cut in the three directions at half to 85 % of its planes."""
    (volume,) = [
        found
        for _, found, _ in volumes_from_path(shared_data / "dicom" / "philips_mprage")
        if isinstance(found, Volume)
    ]
    canonical = to_canonical(volume)
    affine = np.eye(4)
    affine[:3, :3] = canonical.axes * canonical.spacing_mm
    head = Volume(np.ascontiguousarray(canonical.voxels), affine)
    assert code_of(head) is None
    # 48 mm of air lie before its face, 17 mm above its vertex.
    for axis, share in ((0, 0.5), (0, 0.8), (1, 0.5), (1, 0.7)):
        for from_low in (True, False):
            found = code_of_part(head, axis, from_low, share)
            assert found in {"partial_coverage", "not_a_head"}, (axis, from_low, share)
    assert code_of_part(head, 2, True, 0.85) == code_of_part(head, 2, False, 0.5) == "partial_coverage"


@pytest.mark.parametrize("width_mm", [100, 110, 120, 130])
def test_a_narrow_slab_through_the_middle_is_refused(whole: Volume, width_mm: int) -> None:
    """100 to 130 mm of a head of 152 mm: both sides of the brain are missing, and nobody lies exactly in the middle."""
    first = (whole.voxels.shape[0] - width_mm // 2) // 2 + 4
    assert code_of(kept(whole, 0, first, first + width_mm // 2)) == "partial_coverage"


@pytest.mark.parametrize(("axis", "first", "last"), [(0, 6, -6), (1, 6, -2), (2, 14, None), (2, 25, None), (2, 0, -1)])
def test_air_neck_and_a_little_scalp_may_be_cut(whole: Volume, axis: int, first: int, last: int | None) -> None:
    """A tight field of view, and one that ends below the brain, are prepared as before."""
    assert code_of(kept(whole, axis, first, whole.voxels.shape[axis] if last is None else last)) is None


def test_padding_does_not_hide_a_cut(whole: Volume) -> None:
    """A head that is cut off, in a matrix filled up with zeros, is still cut off."""
    cut = kept(whole, 0, 0, 60)
    voxels = np.zeros_like(whole.voxels)
    voxels[:60] = cut.voxels
    assert code_of(Volume(voxels, whole.affine)) == "partial_coverage"


def test_the_side_is_named(whole: Volume) -> None:
    """The sentence says where, in the patient's words."""
    for axis, first, last, side in (
        (0, 30, 96, "left"),
        (0, 0, 66, "right"),
        (1, 30, 112, "back"),
        (1, 0, 80, "front"),
    ):
        with pytest.raises(Refusal, match=f"cut off at the {side}"):
            prepare(kept(whole, axis, first, last))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_head_that_folds_over_is_no_cut(whole: Volume, axis: int) -> None:
    """What leaves the field of view on one side comes in on the other: left to the student, which knows wrap-around."""
    planes = whole.voxels.shape[axis]
    smaller = int(0.62 * planes)
    first = (planes - smaller) // 2
    folded = np.zeros_like(np.take(whole.voxels, range(smaller), axis=axis))
    for plane in range(planes):
        at: list[Any] = [slice(None)] * 3
        at[axis] = (plane - first) % smaller
        folded[tuple(at)] += np.take(whole.voxels, plane, axis=axis)
    affine = whole.affine.copy()
    affine[:3, 3] += affine[:3, axis] * first
    assert folds_over(folded, axis, (0, smaller))
    assert code_of(Volume(folded, affine)) is None
    assert code_of(kept(whole, axis, first, first + smaller)) == "partial_coverage"


# --- The second net: grey matter at the edge ---------------------------------------------------------------------------


def with_grey_matter(prepared: Prepared, gm: np.ndarray) -> float:
    maps = Maps(
        gm.astype(np.float32), np.full(gm.shape, 0.1, np.float32), np.full((len(ARTEFACTS), *gm.shape), 0.1, np.float32)
    )
    return gm_at_edge_cm2(reduce_maps(maps, prepared), prepared)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grey_matter_at_the_edge_is_measured_where_the_field_of_view_ends(axis: int) -> None:
    """A block of 10 by 10 cells of 2 mm that ends at the border has 4 cm^2 there; one that ends before it has none."""
    image = np.full((40, 44, 48), 0.5, np.float32)
    native = np.zeros(image.shape, dtype=bool)
    native[4:36, 4:40, 4:44] = True
    image[~native] = 0.0
    prepared = Prepared(image, native, native, np.eye(4), Box((0.0, 0.0, 0.0), image.shape), 1.0)
    gm = np.zeros(image.shape)
    gm[15:25, 15:25, 15:25] = 1.0
    assert with_grey_matter(prepared, gm) == 0.0
    shift = [0, 0, 0]
    shift[axis] = -11
    assert with_grey_matter(prepared, np.roll(gm, shift, (0, 1, 2))) == pytest.approx(4.0)
    # Zeros around the same block are padding: the edge is where the signal ends.
    inner = [slice(None)] * 3
    inner[axis] = slice(15, 40)
    padded = np.zeros_like(image)
    padded[tuple(inner)] = image[tuple(inner)]
    assert with_grey_matter(replace(prepared, image=padded), gm) == pytest.approx(4.0)


@pytest.mark.parametrize(("area", "verdict"), [(0.0, Verdict.PASS), (MAX_GM_AT_EDGE_CM2 + 0.1, Verdict.CANNOT_JUDGE)])
def test_grey_matter_at_the_edge_is_never_pass(area: float, verdict: Verdict) -> None:
    """A scan that would pass, with brain at the edge of the image: partial coverage."""
    values = {"risk": -4.0, "gm_volume_ml": 700.0} | predicted_dice(-4.0, CALIBRATION)
    parts = {name: {"uncertainty": 0.1, "score": 0.05} for name in ARTEFACTS}
    found = judge(Scores(values, parts, (), {"gm_ml": 700.0, "gm_at_edge_cm2": area}, -4.0), CARD)
    assert found.verdict is verdict
    assert (found.reasons[0].code == "partial_coverage") is (verdict is Verdict.CANNOT_JUDGE)
