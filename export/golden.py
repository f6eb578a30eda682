"""Where the golden case comes from: a synthetic head with an artefact, the same on every machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from daemon.prepare import SPACING_MM
from daemon.words import Array, Volume

SEED = 20261122
FORMULA = "formula"
SHAPE = (92, 110, 104)
"""Cells of 2 mm: a field of view of 184 x 220 x 208 mm."""


def golden_volume(anatomy: str = FORMULA) -> Volume:
    """The volume of the golden case, at 2 mm, with an RF spike.

    Args:
        anatomy: what `rescan-train --data` takes (`builtin`, a file, a folder), whose first label map is taken; or `formula`, a
            head of ellipsoids, which checks an engine as well but looks less like what the student knows.

    Raises:
        ValueError: there are no label maps.
    """
    head = formula_head() if anatomy == FORMULA else anatomy_head(anatomy)
    return Volume(with_spike(head.voxels), head.affine)


def formula_head() -> Volume:
    """A head of ellipsoids with a folded cortex: skin, skull, fluid, grey and white matter, neck."""
    rng = np.random.default_rng(SEED)
    r, a, s = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    r, a, s = r * SPACING_MM, a * SPACING_MM, s * SPACING_MM - 12.0
    folds = 4.0 * np.sin(r / 5.0) * np.sin(a / 6.0) * np.sin(s / 5.5)
    skin = _ellipsoid(r, a, s, (78, 98, 96))
    neck = (np.hypot(r, a + 10) < 55) & (s < -20)
    image = np.where((skin < 0) | neck, 0.85, 0.0)
    for size, fold, level in (
        ((72, 92, 90), 0.0, 0.12),
        ((69, 88, 84), 0.0, 0.28),
        ((66, 85, 80), 1.0, 0.62),
        ((61, 80, 75), 1.0, 1.0),
    ):
        image = np.where((_ellipsoid(r, a, s, size) + fold * folds < 0) & (s > -75), level, image)
    image = ndimage.gaussian_filter(image, 0.4) * (1.0 + 0.05 * ndimage.gaussian_filter(rng.normal(size=SHAPE), 2.0))
    image = np.abs(image + 0.015 * rng.normal(size=SHAPE))
    return Volume(image.astype(np.float32), _centred_affine())


def anatomy_head(data: str) -> Volume:
    """A synthetic T1 head from label maps, at 2 mm.

    Raises:
        ValueError: there are no label maps.
    """
    from training.anatomy import Subject, draw_head, load_subjects, synthesise

    subjects = [s for s in load_subjects(data) if isinstance(s, Subject)]
    if not subjects:
        raise ValueError(f"golden case: {data} holds no label map; give one that does, or {FORMULA!r}")
    draw = draw_head(np.random.default_rng(SEED), free_contrast=0.0)
    size = tuple(float(n) * SPACING_MM for n in SHAPE)
    draw = replace(draw, spacing_mm=(SPACING_MM,) * 3, fov_mm=(size[0], size[1], size[2]), above_vertex_mm=8.0)
    return synthesise(subjects[0], draw).clean


def with_spike(voxels: Array, strength: float = 0.6) -> Array:
    """Add one spike to k-space: stripes across the whole image.

    Args:
        voxels: (I, J, K) magnitude.
        strength: of the spike over the largest value of k-space.
    """
    k = np.fft.fftn(voxels)
    k[9, 5, 11] += strength * np.abs(k).max()
    out: Array = np.abs(np.fft.ifftn(k)).astype(np.float32)
    return out


def _ellipsoid(r: Array, a: Array, s: Array, half_mm: tuple[float, float, float]) -> Array:
    """About the distance in mm from the surface, negative inside."""
    radius = np.sqrt((r / half_mm[0]) ** 2 + (a / half_mm[1]) ** 2 + (s / half_mm[2]) ** 2)
    out: Array = (radius - 1.0) * min(half_mm)
    return out


def _centred_affine() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * SPACING_MM for n in SHAPE]
    return affine
