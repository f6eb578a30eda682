"""Where planes lie, and whether they make a volume: pure arithmetic on the header's numbers.

Slices are ordered by their position along the slice normal, never by a number. Each assumption is checked, and the one
that fails is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daemon.header import Frame
from daemon.reasons import REASONS
from daemon.words import Reason

MIN_SLICES = 8
"""Fewer planes are a localizer or a fragment, not a volume."""

SAME_POSITION_MM = 0.01
"""Planes closer than this lie at the same place: ten times the rounding of the DS values that scanners write."""

POSITION_TOLERANCE = 0.05
"""How far a plane may lie from the regular grid, as a share of the slice spacing: 0.05 mm on a 1 mm grid, which moves no
tissue by a noticeable amount and covers the rounding of every vendor seen."""

POSITION_FLOOR_MM = 0.02
"""The tolerance never goes below this: rounding to two decimals is common."""

SHEAR_DEG = 1.0
"""The slices' direction may differ from their normal by this much: over a head of 200 mm it displaces 3.5 mm."""

UNIT_TOLERANCE = 1e-3
"""Direction cosines may be this far from length one and from a right angle: three decimals are the coarsest seen."""

SPACING_RANGE_MM = (0.01, 100.0)
POSITION_LIMIT_MM = 10_000.0

EVERY_OTHER = 1.5
"""A spacing of this many times the announced one means that slices are missing in a regular pattern."""

PLANE_NAMES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Geometry:
    """A regular stack of parallel planes.

    Attributes:
        order: (slices,) index of the planes given, by rising position along the normal.
        first_mm: (3,) centre of the first pixel of the first slice, LPS.
        step_mm: (3,) from one slice to the next, LPS.
        row_mm: (3,) from one column to the next (along a row), LPS.
        column_mm: (3,) from one row to the next (down a column), LPS.
        spacing_mm: between rows, between columns, between slices.
        plane: sagittal, coronal or axial: the nearest.
        oblique_deg: angle between the normal and that patient axis.
    """

    order: tuple[int, ...]
    first_mm: tuple[float, float, float]
    step_mm: tuple[float, float, float]
    row_mm: tuple[float, float, float]
    column_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    plane: str
    oblique_deg: float

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return len(self.order)

    @property
    def extent_mm(self) -> float:
        """How much of the patient the stack covers along its normal."""
        return self.slices * self.spacing_mm[2]

    def affine_ras(self) -> NDArray[np.float64]:
        """(4, 4) from (column, row, slice, 1) indices to RAS+ millimetres."""
        affine = np.eye(4)
        affine[:3, :3] = np.array([self.row_mm, self.column_mm, self.step_mm]).T
        affine[:3, 3] = self.first_mm
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def measure(planes: Sequence[Frame], nominal_mm: float | None = None) -> Geometry | Reason:
    """Find the regular grid on which planes of one orientation lie.

    Args:
        planes: of one orientation and pixel spacing, at most one at each position, in any order.
        nominal_mm: distance between slices that the header announces, None if it does not.

    Returns:
        The geometry, or the first assumption that fails.
    """
    axes = _axes(planes[0]) if planes else None
    positions = _positions(planes)
    if axes is None or positions is None or planes[0].pixel_spacing_mm is None:
        return _reason("no_geometry")
    row, column, normal = axes
    if len(planes) < MIN_SLICES:
        return _reason("too_few_slices", f"There are only {len(planes)} slices; a volume needs {MIN_SLICES}.")
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    regular = _fit(positions[order], along[order], nominal_mm)
    if isinstance(regular, Reason):
        return regular
    first, step = regular
    spacing = float(np.linalg.norm(step))
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / spacing, -1.0, 1.0))))
    if tilt > SHEAR_DEG:
        return _reason(
            "non_orthogonal", f"The slices are sheared by {tilt:.1f} degrees; at most {SHEAR_DEG:g} are read."
        )
    rows_mm, columns_mm = planes[0].pixel_spacing_mm
    nearest = int(np.abs(normal).argmax())
    return Geometry(
        order=tuple(int(i) for i in order),
        first_mm=_triple(first),
        step_mm=_triple(step),
        row_mm=_triple(row * columns_mm),
        column_mm=_triple(column * rows_mm),
        spacing_mm=(rows_mm, columns_mm, spacing),
        plane=PLANE_NAMES[nearest],
        oblique_deg=float(np.degrees(np.arccos(min(abs(float(normal[nearest])), 1.0)))),
    )


def _axes(plane: Frame) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Unit vectors along a row, down a column and normal to the plane; None where the header has none that can be used."""
    if plane.orientation is None or plane.pixel_spacing_mm is None:
        return None
    if not all(SPACING_RANGE_MM[0] <= s <= SPACING_RANGE_MM[1] for s in plane.pixel_spacing_mm):
        return None
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1.0) for length in lengths) > UNIT_TOLERANCE or abs(row @ column) > UNIT_TOLERANCE:
        return None
    row = row / lengths[0]
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def _positions(planes: Sequence[Frame]) -> NDArray[np.float64] | None:
    """(planes, 3) positions in LPS; None where one is missing or absurd."""
    found = [plane.position_mm for plane in planes]
    if any(position is None for position in found):
        return None
    positions = np.array(found, dtype=np.float64)
    return positions if np.all(np.abs(positions) < POSITION_LIMIT_MM) else None


def _fit(
    positions: NDArray[np.float64], along: NDArray[np.float64], nominal_mm: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | Reason:
    """First position and step of the regular grid through sorted positions."""
    gaps = np.diff(along)
    typical = float(np.median(gaps))
    if not SPACING_RANGE_MM[0] <= typical <= SPACING_RANGE_MM[1]:
        return _reason("no_geometry", f"The slices lie {typical:g} mm apart, which cannot be.")
    grids = [_Grid.through(positions, gaps, spacing) for spacing in (typical, nominal_mm, float(gaps.min())) if spacing]
    best = min(grids, key=lambda grid: grid.off_share)
    if best.off_share > 1.0:
        return _reason("non_uniform", f"The slices are not evenly spaced: one lies {best.off_mm:.2f} mm off its place.")
    spacing = float(np.linalg.norm(best.step))
    absent = int(best.index[-1]) + 1 - len(best.index)
    if absent:
        return _reason("missing_slices", f"{absent} slices are missing inside the volume, {_where(best.index)}.")
    if nominal_mm is not None and _skips(spacing, nominal_mm):
        text = f"The slices lie {spacing:g} mm apart and the header announces {nominal_mm:g} mm: some are missing."
        return _reason("missing_slices", text)
    return best.first, best.step


@dataclass(frozen=True)
class _Grid:
    """Positions on a line at whole multiples of a step.

    Attributes:
        index: (planes,) place of each position on the grid, 0, 1, ...
        first, step: (3,) millimetres.
        off_mm: how far the worst position lies from its place.
        off_share: the same as a share of the tolerance; infinite where two planes share a place.
    """

    index: NDArray[np.float64]
    first: NDArray[np.float64]
    step: NDArray[np.float64]
    off_mm: float
    off_share: float

    @classmethod
    def through(cls, positions: NDArray[np.float64], gaps: NDArray[np.float64], spacing: float) -> _Grid:
        """The grid of about this spacing; gap by gap, so that rounding does not add up over hundreds of slices."""
        index = np.concatenate([[0.0], np.cumsum(np.rint(gaps / spacing))])
        step, first = _line(index, positions)
        off = float(np.linalg.norm(positions - (first + index[:, None] * step), axis=1).max())
        share = off / max(POSITION_FLOOR_MM, POSITION_TOLERANCE * float(np.linalg.norm(step)))
        return cls(index, first, step, off, share if np.all(np.diff(index) >= 1) else float("inf"))


def _line(
    index: NDArray[np.float64], positions: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least-squares step and first position of a straight line through positions at integer places."""
    centred = index - index.mean()
    step = centred @ positions / max(float(centred @ centred), 1e-9)
    return step, positions.mean(axis=0) - index.mean() * step


def _skips(spacing: float, nominal_mm: float) -> bool:
    """Whether the spacing is a multiple (2, 3, ...) of the announced one."""
    times = spacing / nominal_mm if nominal_mm > 0 else 0.0
    return times >= EVERY_OTHER and abs(times - round(times)) < POSITION_TOLERANCE


def _where(index: NDArray[np.float64]) -> str:
    gaps = [int(index[i]) + 2 for i in np.flatnonzero(np.diff(index) > 1)]
    return f"at place {', '.join(map(str, gaps[:5]))}{', ...' if len(gaps) > 5 else ''} by position"


def _triple(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in vector)
    return x, y, z


def _reason(code: str, text: str | None = None) -> Reason:
    return Reason(code, text or REASONS[code])


def first_volume(planes: Sequence[Frame]) -> tuple[list[int], int]:
    """Choose one volume where planes repeat at the same positions (a dynamic, diffusion or functional series).

    Args:
        planes: of one orientation, in any order.

    Returns:
        Indices of the planes of the first volume that is whole (else of the fullest), and how many volumes there are.
    """
    if any(plane.position_mm is None or plane.orientation is None for plane in planes):
        return list(range(len(planes))), 1
    along = np.array([plane.position_mm for plane in planes]) @ _normal(planes[0])
    order = np.argsort(along, kind="stable")
    places: list[list[int]] = []
    for i in order:
        if places and along[i] - along[places[-1][0]] <= SAME_POSITION_MM:
            places[-1].append(int(i))
        else:
            places.append([int(i)])
    count = max(len(place) for place in places)
    if count == 1:
        return [place[0] for place in places], 1
    volumes = _by_label(planes, places, count) or _by_rank(planes, places, count)
    fullest = max(len(volume) for volume in volumes)
    return next(volume for volume in volumes if len(volume) == fullest), count


def _normal(plane: Frame) -> NDArray[np.float64]:
    assert plane.orientation is not None
    return np.cross(plane.orientation[:3], plane.orientation[3:])


def _by_label(planes: Sequence[Frame], places: list[list[int]], count: int) -> list[list[int]] | None:
    """Volumes by the first part of `Frame.order` that tells the planes of every place apart and has one value per volume."""
    for part in range(len(planes[0].order)):
        values = [[planes[i].order[part] for i in place] for place in places]
        labels = {value for place in values for value in place}
        if len(labels) == count and all(len(set(place)) == len(place) for place in values):
            return [
                [i for place in places for i in place if planes[i].order[part] == label] for label in sorted(labels)
            ]
    return None


def _by_rank(planes: Sequence[Frame], places: list[list[int]], count: int) -> list[list[int]]:
    ranked = [sorted(place, key=lambda i: planes[i].order) for place in places]
    return [[place[n] for place in ranked if n < len(place)] for n in range(count)]
