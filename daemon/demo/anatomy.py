"""A whole head with exactly known tissue, built from the MNI152 template inside the `nilearn` package.

The template is an average: skull-stripped, without a CSF map, cut off at its lower edge, and smooth where single brains are
folded. Hence four steps: the cortex is sharpened into a thin ribbon around white-matter blades that the average still hints
at (plus seeded folds of its own), CSF is what is left of the brain's envelope, the grid is extended down to the neck and
forward to the nose, and meninges, skull, scalp, eyes, face and neck are built from plain shapes and bent by a smooth field.

The result is a label map with FreeSurfer ids (and ids from 500 on for what lies outside the brain), so it can stand in for any
segmented head. The demo and the training draw from different streams of seeds and never share a head.

Source of the template: ICBM 2009a Nonlinear Symmetric, Fonov et al., NeuroImage 54:313 (2011); free use with its notice kept.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from scipy import ndimage

from daemon.words import Array

Labels = NDArray[np.int16]
Mask = NDArray[np.bool_]
Shape = tuple[int, int, int]
Scale = float | tuple[float, float, float]

GRID: Shape = (200, 256, 264)
"""Voxels of 1 mm (right, anterior, superior)."""

FIRST_MM = (-100.0, -132.0, -160.0)
"""Centre of the first voxel in the template's millimetres: room for ears, nose and neck around it."""

TEMPLATE_SCALE = 0.93
"""The template's brain is larger than a typical one; 0.93 along each axis gives about 1500 ml inside the skull."""

_TEMPLATE_FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


class Stream(IntEnum):
    """Who draws: each stream has seeds of its own, so a head of one is never a head of the other."""

    TRAINING = 1
    DEMO = 2
    GOLDEN = 3


class Tissue(IntEnum):
    """Label ids: FreeSurfer's up to 100 (left; the right ones in `RIGHT_IDS`), then what lies outside the brain."""

    AIR = 0
    WHITE = 2
    CORTEX = 3
    VENTRICLE = 4
    CEREBELLAR_WHITE = 7
    CEREBELLAR_CORTEX = 8
    THALAMUS = 10
    CAUDATE = 11
    PUTAMEN = 12
    PALLIDUM = 13
    BRAINSTEM = 16
    CSF = 24
    SOFT = 502
    BONE = 506
    EYE = 507
    FAT = 508
    MUSCLE = 509
    MUCOSA = 511
    SKIN = 512
    CAVITY = 514
    MARROW = 516
    SCALP = 530


RIGHT_IDS = {2: 41, 3: 42, 4: 43, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52}
"""Left id -> right id; all others are on both sides."""

GREY = (3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52)
"""Ids counted as grey matter: cortex of cerebrum and cerebellum, and the deep nuclei."""


class AnatomyMissing(Exception):
    """The package with the template is not there, or holds something else; the message says how to get it."""


@dataclass(frozen=True)
class Template:
    """The average brain, each (I, J, K) float32 in [0, 1], 1 mm, axes right, anterior, superior.

    Attributes:
        t1: intensity.  grey, white: share of that tissue.
        first_mm: centre of the first voxel, template millimetres.
    """

    t1: Array
    grey: Array
    white: Array
    first_mm: tuple[float, float, float]


@dataclass(frozen=True)
class LabelledHead:
    """One head as labels.

    Attributes:
        labels: (I, J, K) int16, ids of `Tissue`, right-hand ids included; 1 mm, axes right, anterior, superior.
        affine: (4, 4), voxel to RAS+ millimetres.
    """

    labels: Labels
    affine: NDArray[np.float64]


def head_seed(stream: Stream, index: int) -> SeedSequence:
    """The seed of one head; two streams share none, whatever the index."""
    return SeedSequence([0x52455343, int(stream), index])


@lru_cache(maxsize=1)
def read_template() -> Template:
    """Read the template from the installed `nilearn`, without importing it.

    Raises:
        AnatomyMissing: nilearn is not installed or its files are not what they were.
    """
    import nibabel

    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise AnatomyMissing("the made-up head needs the package nilearn; install the extra `demo`")
    folder = Path(spec.origin).parent / "datasets" / "data"
    maps = []
    for kind in ("t1", "gm", "wm"):
        path = folder / _TEMPLATE_FILES.format(kind)
        if not path.is_file():
            raise AnatomyMissing(f"nilearn holds no {path.name}; install the version pinned in locks/demo.txt")
        image: Any = nibabel.load(path)
        maps.append(np.asarray(image.dataobj).astype(np.float32) / 255.0)
    affine = np.asarray(image.affine)
    if not np.allclose(affine[:3, :3], np.eye(3)):
        raise AnatomyMissing("nilearn's template is not on a 1 mm grid; install the version pinned in locks/demo.txt")
    first = (float(affine[0, 3]), float(affine[1, 3]), float(affine[2, 3]))
    return Template(maps[0], maps[1], maps[2], first)


def draw_head(seed: SeedSequence) -> LabelledHead:
    """Draw one whole head.

    Args:
        seed: from `head_seed`; the same seed gives the same head.

    Returns:
        The head on a grid of `GRID`; its vertex is about 10 mm below the upper end.
    """
    rng = default_rng(seed)
    brain = draw_brain(read_template(), rng)
    labels = _build_head(brain, rng)
    labels = _bend(labels, rng)
    affine = np.eye(4)
    affine[:3, 3] = FIRST_MM
    return LabelledHead(_sides(labels), affine)


# --- Brain --------------------------------------------------------------------------------------------------------------

_CROP = (slice(20, 177), slice(20, 215), slice(0, 162))
"""Where the template has a brain, with a margin."""


@dataclass(frozen=True)
class Brain:
    """Labels of the brain on the template's grid: (I, J, K) int16 and the centre of its first voxel in millimetres."""

    labels: Labels
    first_mm: tuple[float, float, float]


def draw_brain(template: Template, rng: Generator) -> Brain:
    """Sharpen the average into one brain: thin folded cortex, CSF in between, deep grey matter as in the average."""
    t1, grey, white = (part[_CROP] for part in (template.t1, template.grey, template.white))
    first = tuple(f + c.start for f, c in zip(template.first_mm, _CROP, strict=True))
    x, y, z = _axes(t1.shape, first)
    csf = np.clip(1.0 - grey - white, 0.0, 1.0)
    envelope = ndimage.binary_fill_holes(ndimage.binary_opening(t1 > 0))
    folded = _folded_cortex(t1, white, csf, envelope, rng)
    plain = np.where((white > grey) & (white > csf), Tissue.WHITE, np.where(grey > csf, Tissue.CORTEX, Tissue.CSF))
    deep = _ellipsoid((x, y, z), (0, -5, 4), (36, 38, 26))
    cerebellum, stem = _hindbrain(grey + white, (x, y, z))
    labels = np.where(deep | cerebellum, plain, folded).astype(np.int16)
    labels = _name_deep(labels, deep, (x, y, z))
    labels[cerebellum & (labels == Tissue.CORTEX)] = Tissue.CEREBELLAR_CORTEX
    labels[cerebellum & (labels == Tissue.WHITE)] = Tissue.CEREBELLAR_WHITE
    labels[stem & (grey + white > 0.5)] = Tissue.BRAINSTEM
    labels[~envelope] = Tissue.AIR
    return Brain(labels, (first[0], first[1], first[2]))


def _folded_cortex(t1: Array, white: Array, csf: Array, envelope: Mask, rng: Generator) -> Labels:
    """White-matter blades, a ribbon of cortex around them, and CSF where neither reaches.

    A blade is where white matter is likely, or stands out from its surroundings on a scale of a few millimetres, which the
    average keeps in its gyri; a seeded band of folds makes each head and each hemisphere its own.
    """
    likely = np.log((white + 0.02) / (1.02 - white))
    ridge = _band(white, 0.7, 3.0)
    blades = (
        likely + 9.0 * ridge + 8.0 * _band(t1, 0.7, 4.0) + 0.6 * band_noise(t1.shape, 2.5, 5.0, rng, step=2) + 0.5 > 0
    )
    blades &= ndimage.binary_erosion(envelope, iterations=2)
    distance = ndimage.distance_transform_edt(~blades).astype(np.float32)
    thickness_mm = 3.0 + 0.25 * band_noise(t1.shape, 6.0, 12.0, rng, step=2)
    cortex = (distance <= thickness_mm) & (csf < 0.75)
    return np.where(blades, Tissue.WHITE, np.where(cortex, Tissue.CORTEX, Tissue.CSF)).astype(np.int16)


def _hindbrain(tissue: Array, axes: tuple[Array, Array, Array]) -> tuple[Mask, Mask]:
    """Cerebellum and brainstem by watershed on the tissue share, from markers at places that hold in every template."""
    x, y, z = axes
    markers = np.zeros(tissue.shape, np.int8)
    markers[np.broadcast_to(z > 4, tissue.shape)] = 1
    markers[np.broadcast_to((y > -5) & (z > -50), tissue.shape)] = 1
    markers[_ellipsoid(axes, (38, -20, -22), (12, 14, 6)) | _ellipsoid(axes, (-38, -20, -22), (12, 14, 6))] = 1
    markers[_ellipsoid(axes, (0, -88, 2), (30, 12, 8))] = 1
    for side in (-1, 1):
        markers[_ellipsoid(axes, (side * 24, -64, -40), (20, 17, 10))] = 2
    markers[_ellipsoid(axes, (0, -60, -34), (6, 8, 8))] = 2
    markers[_ellipsoid(axes, (0, -26, -30), (9, 8, 12)) | _ellipsoid(axes, (0, -42, -66), (5, 5, 12))] = 3
    markers[tissue < 0.02] = -1
    cost = np.round(255.0 * (1.0 - np.clip(ndimage.gaussian_filter(tissue, 1.0), 0, 1))).astype(np.uint8)
    basins = ndimage.watershed_ift(cost, markers)
    limit = (z < -8) & (np.abs(x) < 24) & (y < -8)
    return np.asarray(basins == 2), np.asarray((basins == 3) & limit)


def _name_deep(labels: Labels, deep: Mask, axes: tuple[Array, Array, Array]) -> Labels:
    """Name the deep grey matter by where it lies, and the CSF inside the brain."""
    x, y, z = axes
    grey = deep & (labels == Tissue.CORTEX)
    across = np.abs(x)
    thalamus = grey & (across < 24) & (y < -3) & (y > -34) & (z > -4)
    caudate = grey & (across < 19) & (y >= -3) & (z > 0)
    lentiform = grey & ~thalamus & ~caudate & (across >= 11) & (across < 34) & (y > -20) & (z > -10)
    out = labels.copy()
    out[thalamus], out[caudate], out[lentiform] = Tissue.THALAMUS, Tissue.CAUDATE, Tissue.PUTAMEN
    out[lentiform & (across < 22) & (y < 6) & (z < 6)] = Tissue.PALLIDUM
    out[(deep | ((across < 34) & (y < -20) & (y > -55) & (z > -8) & (z < 26))) & (labels == Tissue.CSF)] = (
        Tissue.VENTRICLE
    )
    return out


# --- Head around it -----------------------------------------------------------------------------------------------------


def _build_head(brain: Brain, rng: Generator) -> Labels:
    """Put the brain into a head on `GRID`."""
    axes = _axes(GRID, FIRST_MM)
    inner, depth_mm, from_brain_mm = _cranium(brain)
    labels = np.full(GRID, Tissue.AIR, np.int16)
    below_skin_mm = _body(depth_mm, axes)
    _lay_face_and_neck(labels, below_skin_mm > 0, axes, rng)
    _lay_cranium(labels, depth_mm, axes, rng)
    _lay_skin(labels, below_skin_mm)
    _lay_cavities(labels, axes)
    labels[inner] = Tissue.CSF
    labels[inner & (from_brain_mm > 4.0) & (axes[2] < -8)] = Tissue.BONE
    placed = _place(brain)
    labels[placed > 0] = placed[placed > 0]
    _lay_cord(labels, axes)
    return labels


def _place(brain: Brain) -> Labels:
    """The brain, scaled, on `GRID`; nearest neighbour."""
    size = np.asarray(brain.labels.shape)
    at = []
    for axis in range(3):
        mm = (FIRST_MM[axis] + np.arange(GRID[axis])) / TEMPLATE_SCALE
        at.append(np.round(mm - brain.first_mm[axis]).astype(int))
    ok = [(a >= 0) & (a < n) for a, n in zip(at, size, strict=True)]
    inside = ok[0][:, None, None] & ok[1][None, :, None] & ok[2][None, None, :]
    index = np.ix_(*(np.clip(a, 0, n - 1) for a, n in zip(at, size, strict=True)))
    return np.where(inside, brain.labels[index], 0).astype(np.int16)


def _cranium(brain: Brain) -> tuple[Mask, Array, Array]:
    """Inside of the skull, the distance from it in mm (negative inside) and that from the brain; made at 2 mm: smooth."""
    step = 2
    coarse = _place(brain)[::step, ::step, ::step] > 0
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(coarse, 8), iterations=6))[8:-8, 8:-8, 8:-8]
    distance = ndimage.distance_transform_edt(~closed) - ndimage.distance_transform_edt(closed)
    distance = ndimage.gaussian_filter(distance.astype(np.float32) * step, 1.2) - 1.0
    fine = _enlarge(distance, GRID, step)
    away = step * ndimage.distance_transform_edt(~coarse).astype(np.float32)
    return fine < 0, fine, _enlarge(away, GRID, step)


def _enlarge(values: Array, shape: Shape, step: int) -> Array:
    """Linear interpolation from every `step`-th voxel to all of them, one axis after the other."""
    for axis, n in enumerate(shape):
        m = values.shape[axis]
        at = np.minimum(np.arange(n) / step, m - 1.0)
        weights = np.clip(1.0 - np.abs(at[:, None] - np.arange(m)[None, :]), 0.0, None).astype(np.float32)
        values = np.moveaxis(np.tensordot(weights, values, axes=([1], [axis])), 0, axis)
    return np.ascontiguousarray(values)


SCALP_MM = 12.5
"""From the inside of the skull to the skin."""


def _body(depth_mm: Array, axes: tuple[Array, Array, Array]) -> Array:
    """Depth below the skin in mm (negative outside): cranium with scalp, face, nose, jaw, ears and neck, merged softly."""
    z = axes[2]
    body = depth_mm < SCALP_MM
    body |= _ellipsoid(axes, (0, 24, -62), (66, 62, 58))
    body |= _ellipsoid(axes, (0, 40, -92), (46, 44, 36))
    body |= _neck(axes)
    body |= _ellipsoid(axes, (0, 84, -44), (13, 26, 22)) & (z > -62)
    for side in (-1, 1):
        body |= _ellipsoid(axes, (side * 77, -18, -38), (10, 17, 28))
    coarse = ndimage.gaussian_filter(body[::2, ::2, ::2].astype(np.float32), 1.4) > 0.5
    # The body goes on below the field of view: no skin there.
    deep = ndimage.distance_transform_edt(np.pad(coarse, ((1, 1), (1, 1), (8, 1)), mode="edge"))[1:-1, 1:-1, 8:-1]
    distance = 2.0 * (deep - ndimage.distance_transform_edt(~coarse)).astype(np.float32)
    return _enlarge(distance - np.where(coarse, 1.0, -1.0).astype(np.float32), GRID, 2)


def _neck(axes: tuple[Array, Array, Array]) -> Mask:
    x, y, z = axes
    drop = np.clip(-70.0 - z, 0.0, None)
    across = 56.0 + 0.010 * np.clip(drop - 45.0, 0.0, None) ** 2
    return np.asarray(((x / across) ** 2 + ((y + 30.0 + 0.15 * drop) / 58.0) ** 2 < 1) & (z < -40))


def _lay_face_and_neck(labels: Labels, outline: Mask, axes: tuple[Array, Array, Array], rng: Generator) -> None:
    """Muscle in bundles with fat between, bone of jaw and face, tongue."""
    _, y, z = axes
    bundles = band_noise(GRID, (2.0, 2.0, 8.0), (4.5, 4.5, 20.0), rng, step=2)
    labels[outline] = Tissue.SOFT
    labels[outline & (bundles > -0.2)] = Tissue.MUSCLE
    labels[outline & (bundles < -1.3)] = Tissue.FAT
    back = outline & (y < -62 - 0.15 * np.clip(-70.0 - z, 0, None)) & (z < -60)
    labels[back & (bundles < 0.7)] = Tissue.FAT
    facial = _ellipsoid(axes, (0, 48, -48), (40, 26, 30))
    labels[facial & outline] = Tissue.BONE
    labels[facial & outline & (bundles > 0.9)] = Tissue.MARROW
    jaw = _ellipsoid(axes, (0, 34, -100), (46, 44, 15)) & ~_ellipsoid(axes, (0, 28, -100), (37, 38, 30)) & (y > 12)
    labels[jaw & outline] = Tissue.BONE
    labels[ndimage.binary_erosion(jaw, iterations=3)] = Tissue.MARROW
    labels[_ellipsoid(axes, (0, 36, -88), (25, 30, 20))] = Tissue.MUSCLE
    labels[_ellipsoid(axes, (0, 36, -88), (25, 30, 20)) & (bundles < -0.9)] = Tissue.SOFT


def _lay_cranium(labels: Labels, depth_mm: Array, axes: tuple[Array, Array, Array], rng: Generator) -> None:
    """Dura and CSF, two tables of bone with marrow between, fat under the scalp, temporal muscle."""
    x, _, z = axes
    above = z > -62
    thickness = 6.2 + 0.8 * band_noise(GRID, 8.0, 16.0, rng, step=2)
    skull = (depth_mm >= 0) & (depth_mm < thickness) & above
    labels[(depth_mm >= thickness) & (depth_mm < SCALP_MM) & (z > -30)] = Tissue.SCALP
    temporal = (depth_mm >= thickness) & (depth_mm < SCALP_MM - 3.0) & (np.abs(x) > 52) & (z < 12) & (z > -50)
    labels[temporal] = Tissue.MUSCLE
    labels[skull] = Tissue.BONE
    labels[skull & (depth_mm > 2.0) & (depth_mm < thickness - 2.0)] = Tissue.MARROW
    # The base of the skull is porous: air cells of the mastoid and bone without marrow.
    base = skull & (z < -28) & (np.abs(x) < 60)
    labels[base] = Tissue.BONE


def _lay_skin(labels: Labels, below_skin_mm: Array) -> None:
    """Skin of about 2 mm, and a layer of fat below it."""
    labels[(below_skin_mm > 0) & (below_skin_mm < 5)] = Tissue.FAT
    labels[(below_skin_mm > 0) & (below_skin_mm < 2)] = Tissue.SKIN


def _lay_cavities(labels: Labels, axes: tuple[Array, Array, Array]) -> None:
    """Eyes in their fat, sinuses, nose, throat, spine."""
    x, y, z = axes
    for side in (-1, 1):
        labels[_ellipsoid(axes, (side * 28, 48, -32), (17, 24, 16)) & (y < 72)] = Tissue.FAT
        labels[_ellipsoid(axes, (side * 28, 59, -32), (12, 12, 12))] = Tissue.EYE
        labels[_ellipsoid(axes, (side * 24, 36, -31), (3, 14, 3))] = Tissue.SOFT
        labels[_ellipsoid(axes, (side * 25, 48, -60), (13, 16, 13))] = Tissue.AIR
        labels[_ellipsoid(axes, (side * 50, -26, -50), (7, 12, 10))] = Tissue.CAVITY
        labels[_ellipsoid(axes, (side * 7, 44, -54), (4, 28, 15))] = Tissue.MUCOSA
        labels[_ellipsoid(axes, (side * 3, 46, -54), (2, 30, 16))] = Tissue.AIR
    labels[_ellipsoid(axes, (0, 12, -34), (11, 10, 8))] = Tissue.AIR
    labels[_ellipsoid(axes, (0, 64, -8), (14, 4, 8))] = Tissue.AIR
    throat_mm = 8.0 - 0.06 * np.clip(-70.0 - z, 0, None)
    labels[((x / 11.0) ** 2 + ((y - throat_mm) / 6.0) ** 2 < 1) & (z < -52)] = Tissue.AIR
    _lay_spine(labels, axes)


def _lay_spine(labels: Labels, axes: tuple[Array, Array, Array]) -> None:
    x, y, z = axes
    centre = -22.0 - 0.10 * np.clip(-70.0 - z, 0, None)
    body = ((x / 13.0) ** 2 + ((y - centre) / 10.0) ** 2 < 1) & (z < -62)
    labels[body] = Tissue.BONE
    labels[((x / 11.5) ** 2 + ((y - centre) / 8.5) ** 2 < 1) & (z < -64)] = Tissue.MARROW
    labels[body & (np.mod(z, 19.0) < 4.0)] = Tissue.CAVITY
    arch = ((x / 19.0) ** 2 + ((y - centre + 22.0) / 14.0) ** 2 < 1) & (z < -64) & (np.mod(z, 19.0) > 7.0)
    labels[arch] = Tissue.BONE


def _lay_cord(labels: Labels, axes: tuple[Array, Array, Array]) -> None:
    """The spinal cord in its canal continues the template's brainstem, which ends at the lower edge of its field of view."""
    x, y, z = axes
    centre = -42.0 - 0.02 * np.clip(-66.0 - z, 0, None)
    canal = ((x / 10.5) ** 2 + ((y - centre) / 9.0) ** 2 < 1) & (z < -58)
    labels[canal & (labels != Tissue.BRAINSTEM)] = Tissue.CSF
    labels[((x / 6.0) ** 2 + ((y - centre) / 4.8) ** 2 < 1) & (z < -60)] = Tissue.BRAINSTEM


# --- Deformation, sides, small tools --------------------------------------------------------------------------------------


def _bend(labels: Labels, rng: Generator) -> Labels:
    """Make the head its own: sizes within 4 %, a tilt of a few degrees, a smooth bend of about 2 mm; nearest neighbour."""
    scale = 1.0 + 0.02 * np.clip(rng.standard_normal(3), -2, 2)
    tilt = np.deg2rad(3.0) * np.clip(rng.standard_normal(3), -2, 2)
    centre = np.array([0.0, -15.0, 0.0])
    axes = _axes(GRID, FIRST_MM)
    matrix = np.diag(1.0 / scale) @ _small_rotation(tilt)
    index = np.zeros(GRID, np.int32)
    inside = np.ones(GRID, bool)
    for axis in range(3):
        at = 1.5 * smooth_field(GRID, 45.0, rng) + np.float32(centre[axis] - FIRST_MM[axis] + 0.5)
        for other in range(3):
            at += (matrix[axis, other] * (axes[other] - centre[other])).astype(np.float32)
        # Below its lower end the body goes on; everywhere else there is air outside the grid.
        inside &= (at < GRID[axis]) if axis == 2 else (at >= 0) & (at < GRID[axis])
        index *= GRID[axis]
        index += np.clip(at, 0, GRID[axis] - 1).astype(np.int32)
    return np.where(inside, labels.ravel()[index], np.int16(0))


def _small_rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    cross = np.array([[0, -angles[2], angles[1]], [angles[2], 0, -angles[0]], [-angles[1], angles[0], 0]])
    rotation: NDArray[np.float64] = np.linalg.qr(np.eye(3) + cross)[0]
    return rotation * np.sign(np.diag(rotation))


def smooth_field(shape: Shape, scale_mm: float, rng: Generator) -> Array:
    """Standard normal field on voxels of 1 mm that varies smoothly over about `scale_mm`."""
    step = 8
    knots = tuple(-(-n // step) + 1 for n in shape)
    field = ndimage.gaussian_filter(rng.standard_normal(knots).astype(np.float32), scale_mm / 2.0 / step)
    return _enlarge(field / field.std(), shape, step)


def _sides(labels: Labels) -> Labels:
    """Ids of the right half of the brain: FreeSurfer numbers the sides apart."""
    right = slice(int(-FIRST_MM[0]), None)
    table = np.arange(int(max(Tissue)) + 1, dtype=np.int16)
    for left_id, right_id in RIGHT_IDS.items():
        table[left_id] = right_id
    out = labels.copy()
    out[right] = table[labels[right]]
    return out


def _axes(shape: tuple[int, ...], first_mm: tuple[float, ...]) -> tuple[Array, Array, Array]:
    """Millimetres along each axis, shaped to broadcast."""
    lines = [np.asarray(f + np.arange(n), dtype=np.float32) for n, f in zip(shape, first_mm, strict=True)]
    return lines[0][:, None, None], lines[1][None, :, None], lines[2][None, None, :]


def _ellipsoid(axes: tuple[Array, Array, Array], centre: tuple[float, ...], radii: tuple[float, ...]) -> Mask:
    """Inside of an ellipsoid; centre and radii in millimetres. Only its bounding box is computed."""
    lines = [(a.ravel() - c) / r for a, c, r in zip(axes, centre, radii, strict=True)]
    box = []
    for line in lines:
        within = np.flatnonzero(np.abs(line) < 1.0)
        box.append(slice(int(within[0]), int(within[-1]) + 1) if within.size else slice(0, 0))
    x, y, z = (line[part] ** 2 for line, part in zip(lines, box, strict=True))
    out = np.zeros(tuple(line.size for line in lines), bool)
    out[tuple(box)] = x[:, None, None] + y[None, :, None] + z[None, None, :] < 1.0
    return out


def _band(values: Array, fine: Scale, coarse: Scale) -> Array:
    """What stands out between two scales (standard deviations in voxels)."""
    out: Array = ndimage.gaussian_filter(values, fine) - ndimage.gaussian_filter(values, coarse)
    return out


def band_noise(shape: Shape, fine: Scale, coarse: Scale, rng: Generator, step: int = 1) -> Array:
    """Standard normal field limited to a band of scales (voxels); `step` computes it on every second voxel and enlarges."""
    small = tuple(-(-n // step) for n in shape)
    fine, coarse = np.divide(fine, step).tolist(), np.divide(coarse, step).tolist()
    field = _band(rng.standard_normal(small).astype(np.float32), fine, coarse)
    field = field / field.std()
    return field if step == 1 else _enlarge(field, shape, step)
