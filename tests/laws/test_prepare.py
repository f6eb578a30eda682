"""Laws of preparation: the same head gives the same image, however it was sliced, stored or surrounded by air."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from daemon.prepare import (
    BUCKETS,
    INTENSITY_MAX,
    SPACING_MM,
    Box,
    prepare,
    resample_to_box,
    to_canonical,
    to_source_grid,
)
from daemon.words import Refusal, Volume

CODES = [(1, 2, 3), (3, 1, 2), (-1, -2, 3), (2, -3, 1), (-3, 2, -1), (-2, 1, -3)]
"""Stored axis a runs along world axis |code| - 1, backwards when negative."""


def make_head(spacing_mm: float = 1.5, shape_mm: tuple[int, int, int] = (180, 220, 240)) -> Volume:
    """An ellipsoid skull with a brain of two tissues and a neck; RAS, centre of the field of view at the origin."""
    n = [round(s / spacing_mm) for s in shape_mm]
    i, j, k = np.meshgrid(*((np.arange(m) - (m - 1) / 2) * spacing_mm for m in n), indexing="ij")
    z = k - 30.0
    head = (i / 75) ** 2 + (j / 95) ** 2 + (z / 85) ** 2 < 1
    neck = (i**2 + (j + 15) ** 2 < 55**2) & (z < -20)
    brain = (i / 62) ** 2 + (j / 80) ** 2 + (z / 70) ** 2 < 1
    folds = np.sin(i / 4.0) * np.sin(j / 5.0) * np.sin(z / 4.5) > 0
    voxels = 0.8 * (head | neck) + 0.2 * (brain & folds) - 0.25 * (brain & ~folds)
    voxels = ndimage.gaussian_filter(voxels, 0.5) * 300.0
    rng = np.random.default_rng(0)
    voxels = np.abs(voxels + rng.normal(0, 4.0, voxels.shape)).astype(np.float32)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [-(m - 1) / 2 * spacing_mm for m in n]
    return Volume(voxels, affine)


def restore(volume: Volume, codes: tuple[int, int, int]) -> Volume:
    """The same head, stored along other axes."""
    order = [abs(c) - 1 for c in codes]
    voxels, affine = np.transpose(volume.voxels, order), volume.affine[:, [*order, 3]].copy()
    for axis, code in enumerate(codes):
        if code < 0:
            voxels = np.flip(voxels, axis)
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(np.ascontiguousarray(voxels), affine)


@pytest.fixture(scope="module")
def head() -> Volume:
    return make_head()


def test_output_is_a_bucket_in_range(head: Volume) -> None:
    """The image has an allowed shape, finite values in range, and its brightest tissue near 1."""
    prepared = prepare(head)
    assert prepared.image.shape in BUCKETS
    assert prepared.image.dtype == np.float32
    assert prepared.image.min() >= 0.0
    assert prepared.image.max() <= INTENSITY_MAX
    assert 0.7 < np.percentile(prepared.image[prepared.head_mask], 90) < 1.3


@pytest.mark.parametrize("codes", CODES)
def test_storage_order_changes_nothing(head: Volume, codes: tuple[int, int, int]) -> None:
    """Sagittal, coronal or axial, forwards or backwards: the same prepared image."""
    expected, got = prepare(head), prepare(restore(head, codes))
    assert np.allclose(got.affine, expected.affine, atol=1e-6)
    assert np.allclose(got.image, expected.image, atol=1e-4)


@pytest.mark.parametrize("pad", [(20, 20, 20), (0, 13, 0), (7, 0, 31)])
def test_more_air_changes_nothing(head: Volume, pad: tuple[int, int, int]) -> None:
    """30 mm more air, or any whole number of voxels of it, leaves the image as it was inside the old field of view."""
    rng = np.random.default_rng(1)
    wide = np.abs(rng.normal(0, 4.0, [n + 2 * p for n, p in zip(head.voxels.shape, pad, strict=True)]))
    inner = tuple(slice(p, p + n) for p, n in zip(pad, head.voxels.shape, strict=True))
    wide[inner] = head.voxels
    affine = head.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(pad)
    expected, got = prepare(head), prepare(Volume(wide.astype(np.float32), affine))
    assert got.box.shape == expected.box.shape
    assert np.abs(np.subtract(got.box.start_mm, expected.box.start_mm)).max() <= 1e-6
    inside = expected.native_mask
    assert np.abs(got.image - expected.image)[inside].max() < 0.01


def test_oblique_head_is_not_resampled(head: Volume) -> None:
    """A tilted prescription keeps its voxels: the same image, on tilted axes."""
    a = np.deg2rad(12.0)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    expected, got = prepare(head), prepare(Volume(head.voxels, turn @ head.affine))
    assert np.corrcoef(got.image.ravel(), expected.image.ravel())[0, 1] > 0.98
    assert got.affine[2, 1] == pytest.approx(SPACING_MM * np.sin(a), abs=1e-6)


def test_averaging_is_exact() -> None:
    """A 2 mm cell of a 1 mm volume is the mean of its eight voxels."""
    voxels = np.random.default_rng(2).random((8, 8, 8)).astype(np.float32)
    volume = Volume(voxels, np.eye(4))
    cells = resample_to_box(volume, Box((-0.5, -0.5, -0.5), (4, 4, 4)))
    assert np.allclose(cells, voxels.reshape(4, 2, 4, 2, 4, 2).mean(axis=(1, 3, 5)), atol=1e-6)


@pytest.mark.parametrize("codes", CODES[:3])
def test_maps_come_back_to_the_source_grid(head: Volume, codes: tuple[int, int, int]) -> None:
    """A smooth map on the cells, brought back, equals itself evaluated at the voxels."""
    source = restore(head, codes)
    prepared = prepare(source)
    at = np.stack(np.meshgrid(*(np.arange(n) for n in prepared.image.shape), indexing="ij"), -1)
    world = at @ prepared.affine[:3, :3].T + prepared.affine[:3, 3]
    back = to_source_grid((world @ [0.01, 0.02, 0.03]).astype(np.float32), prepared, source, fill=np.nan)
    voxel = np.stack(np.meshgrid(*(np.arange(n) for n in source.voxels.shape), indexing="ij"), -1)
    expected = (voxel @ source.affine[:3, :3].T + source.affine[:3, 3]) @ [0.01, 0.02, 0.03]
    # Half a cell at the box's edge is held constant, hence 1 mm of slack in a map of slope 0.03 per mm.
    assert np.nanmax(np.abs(back - expected)) < 0.07
    assert np.nanmedian(np.abs(back - expected)) < 1e-4


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda v: Volume(np.zeros_like(v.voxels), v.affine), "no_signal"),
        (lambda v: Volume(v.voxels, v.affine * np.array([1, 1, 0, 1])), "no_geometry"),
        (lambda v: Volume(v.voxels, v.affine + np.eye(4, k=1) * 0.5), "non_orthogonal"),
        (lambda v: Volume(np.where(v.voxels > 100, np.nan, v.voxels).astype(np.float32), v.affine), "bad_pixels"),
        (lambda v: Volume(np.ascontiguousarray(v.voxels[:, :, ::2]), v.affine @ np.diag([1, 1, 2, 1])), "thick_slices"),
        (lambda v: Volume(v.voxels[40:60, 50:80, 60:90], v.affine), "not_a_head"),
        (lambda v: Volume(np.ascontiguousarray(v.voxels[:, :, :105]), v.affine), "partial_coverage"),
        (lambda v: Volume(np.ascontiguousarray(v.voxels[:, :, 90:]), v.affine), "partial_coverage"),
    ],
    ids=["empty", "flat", "sheared", "nan", "thick", "fragment", "no vertex", "top only"],
)
def test_what_is_no_head_is_refused(head: Volume, spoil, code: str) -> None:
    """Each assumption that fails has its own code."""
    with pytest.raises(Refusal) as refusal:
        prepare(spoil(head))
    assert refusal.value.reason.code == code


def small_bright_brain() -> Volume:
    """A head whose brain alone (1450 ml) is bright: what noise leaves of it is too small for a head."""
    head = make_head()
    i, j, k = (np.indices(head.voxels.shape) * 1.5).astype(np.float32) - 90.0
    brain = (i / 62) ** 2 + ((j - 20) / 80) ** 2 + ((k - 60) / 70) ** 2 < 1
    return Volume((head.voxels * np.where(brain, 1.0, 0.45)).astype(np.float32), head.affine)


def spoilt(volume: Volume, noise: float, spike: float) -> Volume:
    """Complex noise, and a spike of high frequency, in units of the tissue's 240."""
    rng = np.random.default_rng(3)
    parts = rng.normal(0.0, 240.0 * noise, (2, *volume.voxels.shape)) if noise else np.zeros((2, 1, 1, 1))
    i, j, k = np.indices(volume.voxels.shape)
    wave = 240.0 * spike * np.exp(1j * (2.1 * i + 1.3 * j + 0.4 * k))
    voxels = np.abs(volume.voxels + parts[0] + 1j * parts[1] + wave)
    return Volume(voxels.astype(np.float32), volume.affine)


@pytest.mark.parametrize(("noise", "spike"), [(0.5, 0.0), (1.0, 0.0), (1.5, 0.0), (0.0, 0.5), (0.0, 1.5), (0.0, 4.0)])
def test_a_drowned_head_is_found(noise: float, spike: float) -> None:
    """Noise or a spike stronger than the dimmer half of the head moves the box by less than 25 mm."""
    head = small_bright_brain()
    moved = np.subtract(prepare(spoilt(head, noise, spike)).box.start_mm, prepare(head).box.start_mm)
    assert np.abs(moved).max() < 25.0, moved


def test_noise_makes_no_head_of_a_brain() -> None:
    """A brain without its skull stays refused, in the clear and in noise."""
    head = make_head()
    i, j, k = (np.indices(head.voxels.shape) * 1.5).astype(np.float32) - 90.0
    brain = (i / 55) ** 2 + ((j - 20) / 75) ** 2 + ((k - 60) / 65) ** 2 < 1
    stripped = Volume(np.where(brain, head.voxels, 0.0).astype(np.float32), head.affine)
    for noise in (0.0, 0.3, 1.0, 2.5):
        with pytest.raises(Refusal) as refusal:
            prepare(spoilt(stripped, noise, 0.0))
        assert refusal.value.reason.code == "not_a_head"


def test_canonical_axes_are_right_handed_where_the_source_is(head: Volume) -> None:
    """Permuting and flipping to RAS keeps the world position of every voxel."""
    source = restore(head, (-3, 2, -1))
    canonical = to_canonical(source)
    peak = np.unravel_index(int(source.voxels.argmax()), source.voxels.shape)
    world = source.affine[:3, :3] @ np.array(peak) + source.affine[:3, 3]
    at = np.unravel_index(int(canonical.voxels.argmax()), canonical.voxels.shape)
    centre = canonical.start_mm + (np.array(at) + 0.5) * canonical.spacing_mm
    assert np.allclose(canonical.axes @ centre, world, atol=1e-6)
