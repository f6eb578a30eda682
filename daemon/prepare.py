"""Volume -> network input. NumPy and SciPy only; training uses this same code, so what is learnt is what is served.

Three steps: turn to RAS by permuting axes (never by resampling), find the head and cut a box of fixed size around its
upper part, average the voxels into 2 mm cells and scale the intensity. The box hangs on the head, not on the field of
view, and its edges lie on voxel edges: air around the head changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from daemon.coverage import VERTEX_SECTION_CM2, Body, check_whole
from daemon.words import MAX_SPACING_MM, Array, Refusal, Volume

SPACING_MM = 2.0
"""Working resolution of the shipped student."""

BUCKETS = ((96, 112, 96),)
"""Network input shapes, (R-L, A-P, S-I) at `SPACING_MM`. One holds every adult's brain; a larger one for larger heads would show more
neck and air, and the same head would score otherwise in it (docs/decisions/0093)."""

COARSE_MM = 4.0
ABOVE_VERTEX_MM = 10.0
TISSUE_ML = 250.0
"""The intensity that this much of the box exceeds becomes 1.0: near fat and white matter in a T1 head."""

INTENSITY_MAX = 4.0
HEAD_AND_AIR_ML = 8000.0
"""A head has 3 to 6 litres; its threshold is sought among this much of the volume, so that more air does not move it."""

MIN_HEAD_ML, MAX_HEAD_ML = 1600.0, 9000.0
"""A brain without its head has 1000 to 1600 ml; a head under the worst spike of the paper still shows 1700 ml."""

DARK_AIR = 0.12
"""The air around a head is darker than this share of the head, unless noise or a spike fills it."""

FLOOR_SMOOTH_MM = 8.0
"""Width of the filter under which a head that noise has drowned stands out."""

MIN_WIDTH_MM, MIN_LENGTH_MM = 90.0, 110.0
OFF_HALF = 0.3
"""Added before rounding down to whole voxels: fields of view often start at half a voxel, where rounding would tip over."""

MAX_VOXELS = 600_000_000


@dataclass(frozen=True)
class Box:
    """Where the network looks, in millimetres along the three canonical axes of one volume.

    Attributes:
        start_mm: (3,) lower edge (outer edge of the first cell) along the R, A and S axes.
        shape: cells per axis, one of `BUCKETS`.
    """

    start_mm: tuple[float, float, float]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Prepared:
    """The network's input and what is needed to read its output.

    Attributes:
        image: (D, H, W) float32 in [0, INTENSITY_MAX]; 1.0 is bright tissue. Axes R, A, S; cells of `SPACING_MM`.
        native_mask: (D, H, W) bool, cells inside the acquired field of view; scores use only these.
        head_mask: (D, H, W) bool, a rough head.
        affine: (4, 4) float64, cell index to RAS+ millimetres.
        box: where the cells lie.
        scale: the intensity that became 1.0.
    """

    image: Array
    native_mask: NDArray[np.bool_]
    head_mask: NDArray[np.bool_]
    affine: NDArray[np.float64]
    box: Box
    scale: float


@dataclass(frozen=True)
class Canonical:
    """A volume turned to RAS by permutation and flips.

    Attributes:
        voxels: (I, J, K) float32, axes nearest to R, A, S.
        axes: (3, 3) float64, columns are the unit vectors of the three axes in RAS millimetres (oblique kept).
        spacing_mm: (3,) float64.
        start_mm: (3,) float64, outer edge of the first voxel, in coordinates along `axes`.
    """

    voxels: Array
    axes: NDArray[np.float64]
    spacing_mm: NDArray[np.float64]
    start_mm: NDArray[np.float64]


def prepare(volume: Volume, box: Box | None = None) -> Prepared:
    """Turn a volume into the network's input.

    Args:
        volume: in patient space, any orientation, oblique allowed.
        box: where to look, from an earlier `Prepared` of the same geometry; None finds the head.

    Returns:
        The prepared image; the same head gives the same image to float rounding however it was sliced or padded with air.

    Raises:
        Refusal: `too_large`, `non_orthogonal`, `thick_slices`, `no_signal`, `not_a_head`, `partial_coverage`.
    """
    canonical = to_canonical(volume)
    check_spacing(canonical.spacing_mm)
    head, head_start = _coarse_head(canonical)
    if box is None:
        box = _find_box(canonical, head, head_start)
    image, coverage = _average(canonical, box)
    native = coverage > 0.5
    scale = tissue_level(image, native)
    image = np.clip(image / scale, 0.0, INTENSITY_MAX).astype(np.float32)
    return Prepared(
        image=image,
        native_mask=native,
        head_mask=_head_on_grid(head, head_start, box) & native,
        affine=_box_affine(canonical, box),
        box=box,
        scale=scale,
    )


def resample_to_box(volume: Volume, box: Box) -> Array:
    """Average any map that shares the volume's geometry (a tissue mask, a clean twin) into the box's cells.

    Returns:
        (D, H, W) float32 in the map's own unit; 0 outside the field of view.
    """
    return _average(to_canonical(volume), box)[0]


def to_source_grid(cells: Array, prepared: Prepared, volume: Volume, fill: float = 0.0) -> Array:
    """Interpolate a map on the prepared grid back to the volume's own voxels (trilinear).

    Args:
        cells: (D, H, W) float32 on the prepared grid.
        prepared: what `prepare` returned for this volume.
        volume: the source; only its geometry is used.
        fill: value outside the box.

    Returns:
        float32 with the shape of `volume.voxels`.
    """
    canonical = to_canonical(volume)
    out: Array = cells
    inside = np.ones((1, 1, 1), dtype=bool)
    for axis in range(3):
        n = canonical.voxels.shape[axis]
        centre = canonical.start_mm[axis] + (np.arange(n) + 0.5) * canonical.spacing_mm[axis]
        at = (centre - prepared.box.start_mm[axis]) / SPACING_MM - 0.5
        out = _apply(_linear_weights(at, prepared.box.shape[axis]), out, axis)
        ok = (at > -0.5) & (at < prepared.box.shape[axis] - 0.5)
        inside = inside & ok.reshape([-1 if a == axis else 1 for a in range(3)])
    out = np.where(inside, out, np.float32(fill)).astype(np.float32)
    return _from_canonical(out, volume.affine)


def to_canonical(volume: Volume) -> Canonical:
    """Permute and flip the axes so that they run nearest to right, anterior, superior.

    Raises:
        Refusal: `too_large` (more than `MAX_VOXELS`), `non_orthogonal` (axes more than 1 degree off square).
    """
    if volume.voxels.size > MAX_VOXELS:
        raise Refusal("too_large", f"The volume has {volume.voxels.size} voxels; at most {MAX_VOXELS} are read.")
    matrix = np.asarray(volume.affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.all(np.isfinite(matrix)) or np.any(spacing < 1e-3):
        raise Refusal("no_geometry", f"The voxel spacing {spacing.tolist()} mm cannot be used.")
    unit = matrix / spacing
    if np.abs(unit.T @ unit - np.eye(3)).max() > np.sin(np.deg2rad(1.0)):
        raise Refusal("non_orthogonal", "The slices are sheared: their axes are not at right angles.")
    order, flips = _order_and_flips(unit)
    voxels = np.transpose(volume.voxels, order)
    axes = unit[:, order].copy()
    origin = np.asarray(volume.affine, dtype=np.float64)[:3, 3].copy()
    for axis in range(3):
        if flips[axis]:
            voxels = np.flip(voxels, axis)
            origin = origin + axes[:, axis] * spacing[order[axis]] * (voxels.shape[axis] - 1)
            axes[:, axis] *= -1
    spacing = spacing[list(order)]
    start = axes.T @ origin - 0.5 * spacing
    return Canonical(np.asarray(voxels, dtype=np.float32), axes, spacing, start)


def check_spacing(spacing_mm: NDArray[np.float64]) -> None:
    """Whether the student knows heads of this resolution: it was trained on voxels of up to 2 mm.

    A DICOM series is refused for this by its header; a file without one (NIfTI) is refused here.

    Raises:
        Refusal: `thick_slices`.
    """
    if spacing_mm.max() > MAX_SPACING_MM:
        text = f"The voxels are {spacing_mm.max():.2f} mm long; at most {MAX_SPACING_MM:g} mm are admitted."
        raise Refusal("thick_slices", text)


def _order_and_flips(unit: NDArray[np.float64]) -> tuple[tuple[int, int, int], list[bool]]:
    """Which stored axis runs nearest to R, A, S, and whether it runs backwards; the best of the six permutations."""
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    order = max(orders, key=lambda o: sum(abs(unit[world, stored]) for world, stored in enumerate(o)))
    return order, [bool(unit[world, stored] < 0) for world, stored in enumerate(order)]


def _from_canonical(values: Array, affine: NDArray[np.float64]) -> Array:
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    order, flips = _order_and_flips(matrix / np.linalg.norm(matrix, axis=0))
    for axis in range(3):
        if flips[axis]:
            values = np.flip(values, axis)
    return np.ascontiguousarray(np.transpose(values, np.argsort(order)))


def overlap_weights(start: float, spacing: float, n: int, box_start: float, cells: int, cell_mm: float) -> Array:
    """(cells, n) share of each cell's length that each voxel covers: averaging, exact for any spacing."""
    cell_low = box_start + np.arange(cells)[:, None] * cell_mm
    voxel_low = start + np.arange(n)[None, :] * spacing
    overlap = np.minimum(cell_low + cell_mm, voxel_low + spacing) - np.maximum(cell_low, voxel_low)
    weights: Array = (np.clip(overlap, 0.0, None) / cell_mm).astype(np.float32)
    return weights


def _linear_weights(at: NDArray[np.float64], n: int) -> Array:
    """(len(at), n) weights of linear interpolation at fractional indices, clamped to the ends."""
    at = np.clip(at, 0.0, n - 1.0)
    low = np.minimum(np.floor(at).astype(int), max(n - 2, 0))
    weights = np.zeros((len(at), n), dtype=np.float32)
    rows = np.arange(len(at))
    weights[rows, low] = 1.0 - (at - low)
    if n > 1:
        weights[rows, low + 1] = at - low
    return weights


def _apply(weights: Array, values: Array, axis: int) -> Array:
    """Multiply `weights` (m, n) along one axis of a 3-D array."""
    moved = np.tensordot(weights, values, axes=([1], [axis]))
    out: Array = np.moveaxis(moved, 0, axis)
    return out


def _trim(weights: Array) -> tuple[Array, slice]:
    """Drop the voxels that no cell touches."""
    used = np.flatnonzero(weights.any(axis=0))
    if used.size == 0:
        return weights[:, :1], slice(0, 1)
    keep = slice(int(used[0]), int(used[-1]) + 1)
    return weights[:, keep], keep


def _average(canonical: Canonical, box: Box) -> tuple[Array, Array]:
    """Mean of the voxels inside each cell and the share of the cell inside the field of view, both (D, H, W)."""
    weights, keeps = [], []
    for axis in range(3):
        full = overlap_weights(
            canonical.start_mm[axis],
            canonical.spacing_mm[axis],
            canonical.voxels.shape[axis],
            box.start_mm[axis],
            box.shape[axis],
            SPACING_MM,
        )
        trimmed, keep = _trim(full)
        weights.append(trimmed)
        keeps.append(keep)
    out: Array = canonical.voxels[tuple(keeps)]
    for axis in (2, 1, 0):
        out = _apply(weights[axis], out, axis)
    cover = [w.sum(axis=1) for w in weights]
    coverage = cover[0][:, None, None] * cover[1][None, :, None] * cover[2][None, None, :]
    return (out / np.maximum(coverage, 1e-6)).astype(np.float32), coverage.astype(np.float32)


def tissue_level(image: Array, native: NDArray[np.bool_]) -> float:
    """The intensity that `TISSUE_ML` of the box exceeds. An absolute volume, so neither air nor crop moves it."""
    rank = int(TISSUE_ML * 1000.0 / SPACING_MM**3)
    values = image[native]
    if values.size <= rank:
        raise Refusal("partial_coverage", "Less than half a litre of the head lies in the field of view.")
    level = float(np.partition(values, values.size - rank)[values.size - rank])
    if not level > 0:
        raise Refusal("no_signal", "The image is empty: no voxel of the head carries signal.")
    return level


def _coarse_cells(
    canonical: Canonical, voxels: Array | None = None
) -> tuple[Array, NDArray[np.float64], NDArray[np.float64]]:
    """About 4 mm cells made of whole voxels, anchored in space (not at the field of view's edge).

    Args:
        canonical: the volume.
        voxels: what to average in its geometry; None: the intensity itself.

    Returns:
        cells, cell size in mm (3,), outer edge of the first cell in mm (3,).
    """
    cells: Array = canonical.voxels if voxels is None else voxels
    step = np.maximum(np.round(COARSE_MM / canonical.spacing_mm).astype(int), 1)
    first = np.floor(canonical.start_mm / canonical.spacing_mm + OFF_HALF).astype(int)
    start = canonical.start_mm.copy()
    for axis in range(3):
        before = int(first[axis] % step[axis])
        n = cells.shape[axis] + before
        after = int(-n % step[axis])
        weights = np.zeros((cells.shape[axis], (n + after) // step[axis]), dtype=np.float32)
        rows = np.arange(cells.shape[axis])
        weights[rows, (rows + before) // step[axis]] = 1.0
        weights /= np.maximum(weights.sum(axis=0), 1.0)
        cells = _apply(np.ascontiguousarray(weights.T), cells, axis)
        start[axis] -= before * canonical.spacing_mm[axis]
    return cells, step * canonical.spacing_mm, start


@dataclass(frozen=True)
class _Head:
    mask: NDArray[np.bool_]
    cell_mm: NDArray[np.float64]


def _coarse_head(canonical: Canonical) -> tuple[_Head, NDArray[np.float64]]:
    """The largest bright body in the volume, on about 4 mm cells, and the outer edge of its grid.

    Where it is too small for a head and the air around it is not dark, noise or a spike may have drowned the rest of the
    head: what lies above that floor is then looked for.
    """
    cells, cell_mm, start = _coarse_cells(canonical)
    if not np.all(np.isfinite(cells)):
        raise Refusal("bad_pixels", "The image holds values that are not numbers.")
    cell_ml = float(np.prod(cell_mm)) / 1000.0
    body = _largest_body(np.sqrt(np.clip(cells, 0.0, None)), cell_ml)
    if body.sum() * cell_ml < MIN_HEAD_ML and _floor(cells) > DARK_AIR * float(np.median(cells[body])):
        drowned = _largest_body(_above_floor(canonical), cell_ml)
        body = drowned if drowned.sum() * cell_ml >= MIN_HEAD_ML else body
    return _Head(body, cell_mm), start


def _floor(cells: Array) -> float:
    """Level of the air: the darkest tenth of the field of view (padding of zeros left out) stays below it."""
    held = cells[cells > 0.0]
    return float(np.percentile(held, 10.0)) if held.size else 0.0


def _above_floor(canonical: Canonical) -> Array:
    """Signal above the floor, on coarse cells, in the unit of the intensity.

    The powers of signal, noise and spike add (the mean square of a magnitude is S^2 + 2 sigma^2, and S^2 + A^2 over a
    spike's wavelength), so the floor's power is taken off. Where a spike has long waves their troughs lie below the floor, only
    where there is signal: the distance from the floor counts, not its sign.
    """
    power, cell_mm, _ = _coarse_cells(canonical, np.square(canonical.voxels))
    rest = np.abs(power - _floor(power))
    smooth: Array = ndimage.gaussian_filter(rest, FLOOR_SMOOTH_MM / float(cell_mm.mean()), mode="nearest")
    # What the chance of the noise leaves in the air is taken off as well.
    above: Array = np.sqrt(np.clip(smooth - _floor(smooth), 0.0, None))
    return above


def _largest_body(brightness: Array, cell_ml: float) -> NDArray[np.bool_]:
    """The largest body brighter than Otsu's threshold; (I, J, K) bool.

    Raises:
        Refusal: `no_signal`, `not_a_head`.
    """
    smooth = ndimage.gaussian_filter(brightness, 1.0, mode="nearest")
    if not smooth.max() > 0.0:
        raise Refusal("no_signal", "The image is empty: no voxel carries signal.")
    level = otsu(_brightest(smooth, cell_ml))
    mask = ndimage.binary_opening(smooth > level, iterations=2)
    labels, count = ndimage.label(mask)
    if count == 0:
        raise Refusal("not_a_head", "Nothing as large as a head stands out from the background.")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body: NDArray[np.bool_] = np.asarray(ndimage.binary_fill_holes(labels == int(sizes.argmax())), dtype=bool)
    return body


def _brightest(cells: Array, cell_ml: float) -> Array:
    """The brightest `HEAD_AND_AIR_ML`: a head and some air, however much air lies around it."""
    rank = min(int(HEAD_AND_AIR_ML / cell_ml), cells.size) - 1
    return np.partition(cells.ravel(), cells.size - 1 - rank)[cells.size - 1 - rank :]


def otsu(values: Array, bins: int = 256) -> float:
    """Otsu's threshold: the cut that leaves the least variance inside the two classes (IEEE SMC 9:62, 1979)."""
    top = float(np.percentile(values, 99.5))
    counts, edges = np.histogram(np.clip(values, None, top), bins=bins)
    centre = 0.5 * (edges[:-1] + edges[1:])
    weight = np.cumsum(counts).astype(np.float64)
    mass = np.cumsum(counts * centre)
    rest = weight[-1] - weight
    between = np.zeros(bins)
    ok = (weight > 0) & (rest > 0)
    between[ok] = weight[ok] * rest[ok] * (mass[ok] / weight[ok] - (mass[-1] - mass[ok]) / rest[ok]) ** 2
    return float(centre[int(between.argmax())])


def _find_box(canonical: Canonical, head: _Head, start: NDArray[np.float64]) -> Box:
    """Hang the box on the vertex and centre it on the upper head; refuse what cannot be a head."""
    cell_ml = float(np.prod(head.cell_mm)) / 1000.0
    volume_ml = float(head.mask.sum()) * cell_ml
    if not MIN_HEAD_ML <= volume_ml <= MAX_HEAD_ML:
        raise Refusal("not_a_head", f"The brightest body measures {volume_ml:.0f} ml; a head has 2000 to 6000 ml.")
    body = Body(head.mask, head.cell_mm, start)
    tops = np.flatnonzero(body.sections_cm2() > VERTEX_SECTION_CM2)
    if tops.size == 0:
        raise Refusal("not_a_head", "No section of the brightest body is as wide as a head.")
    top = int(tops[-1])
    fov_end = canonical.start_mm[2] + canonical.voxels.shape[2] * canonical.spacing_mm[2]
    vertex_mm = min(start[2] + (top + 1) * head.cell_mm[2], fov_end)
    upper = body.upper(top)
    centre, extent = np.zeros(2), np.zeros(2)
    for axis in (0, 1):
        low, high = _span(upper.sum(axis=tuple(a for a in range(3) if a != axis)))
        centre[axis] = start[axis] + 0.5 * (low + high) * head.cell_mm[axis]
        extent[axis] = (high - low) * head.cell_mm[axis]
    if extent[0] < MIN_WIDTH_MM or extent[1] < MIN_LENGTH_MM:
        raise Refusal("not_a_head", f"The body is {extent[0]:.0f} by {extent[1]:.0f} mm; no head is that small.")
    check_whole(body, top, canonical.voxels, canonical.spacing_mm, canonical.start_mm)
    shape = BUCKETS[0]
    low_edge = (
        centre[0] - 0.5 * shape[0] * SPACING_MM,
        centre[1] - 0.5 * shape[1] * SPACING_MM,
        vertex_mm + ABOVE_VERTEX_MM - shape[2] * SPACING_MM,
    )
    steps = np.floor((np.array(low_edge) - canonical.start_mm) / canonical.spacing_mm + OFF_HALF)
    snapped = canonical.start_mm + canonical.spacing_mm * steps
    return Box((float(snapped[0]), float(snapped[1]), float(snapped[2])), shape)


def _span(profile: NDArray[np.int64]) -> tuple[int, int]:
    """First and last-plus-one cell of a body along one axis, leaving out single stray cells (2 % of the mass each end)."""
    share = np.cumsum(profile) / max(int(profile.sum()), 1)
    low = int(np.searchsorted(share, 0.005))
    high = int(np.searchsorted(share, 0.995)) + 1
    return low, high


def _head_on_grid(head: _Head, start: NDArray[np.float64], box: Box) -> NDArray[np.bool_]:
    """Nearest-cell lookup of the coarse head on the prepared grid."""
    index = []
    inside = np.ones((1, 1, 1), dtype=bool)
    for axis in range(3):
        centre = box.start_mm[axis] + (np.arange(box.shape[axis]) + 0.5) * SPACING_MM
        at = np.floor((centre - start[axis]) / head.cell_mm[axis]).astype(int)
        ok = (at >= 0) & (at < head.mask.shape[axis])
        inside = inside & ok.reshape([-1 if a == axis else 1 for a in range(3)])
        index.append(np.clip(at, 0, head.mask.shape[axis] - 1))
    found: NDArray[np.bool_] = head.mask[np.ix_(*index)] & inside
    return found


def _box_affine(canonical: Canonical, box: Box) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = canonical.axes * SPACING_MM
    affine[:3, 3] = canonical.axes @ (np.asarray(box.start_mm) + 0.5 * SPACING_MM)
    return affine
