"""Is the head whole in the field of view? Where a head should end in air, it must not end at the edge of the image.

A head that is cut off looks clean to a network that sees only what is left of it, so this is asked of the image before any
network sees it. Neck, chin and nose may be cut, and so may a little scalp: what counts is the upper head, where the brain is.
A head that folds over reaches the edge too, but goes on at the opposite one; that is an artefact, and for the student to name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from daemon.words import Array, Refusal

UPPER_HEAD_MM = 90.0
"""Depth below the vertex that is free of nose and chin."""

VERTEX_SECTION_CM2 = 15.0
"""The topmost section as large as this is taken for the vertex."""

MAX_VERTEX_CUT_CM2 = 45.0
"""A head that still has this section in the topmost slice has lost its vertex."""

MAX_CUT_SHARE = 0.3
"""A border plane may cut this share of the head's largest parallel section: of a round head, the outer 16 % of the half-axis,
12 mm at the side and 15 mm at the front and the back. So much is skin, muscle and bone; beyond it lies brain. Sixteen real
heads that are whole stay under 0.1; four cut 8 mm into the brain, at each side, are over 0.33."""

MIN_BELOW_VERTEX_MM, MAX_BELOW_VERTEX_MM = 115.0, 140.0
BELOW_VERTEX_PER_LENGTH = 0.70
"""A brain reaches 0.70 to 0.78 of the head's length (front to back) below the vertex, 142 to 161 mm in 13 real adults."""

FOLD_CORRELATION = (0.6, 0.3)
"""Fine detail of the first and the last plane of a folded image agrees as that of neighbours does: 0.33 to 0.9. In an image cut
at the front and the back it does not: up to 0.1. Left and right are alike, up to 0.5, hence the higher value between them; what
passes wrongly is caught by `daemon.judge`, which withholds `PASS` where grey matter reaches the edge."""

_SIDES = (("left", "right"), ("back", "front"))


@dataclass(frozen=True)
class Body:
    """A rough head on coarse cells.

    Attributes:
        mask: (I, J, K) bool along R, A, S.
        cell_mm: (3,) edge lengths of a cell.
        start_mm: (3,) outer edge of the first cell.
    """

    mask: NDArray[np.bool_]
    cell_mm: NDArray[np.float64]
    start_mm: NDArray[np.float64]

    def sections_cm2(self) -> NDArray[np.float64]:
        """Area of each axial section, bottom first."""
        area: NDArray[np.float64] = self.mask.sum(axis=(0, 1)) * self.cell_mm[0] * self.cell_mm[1] / 100.0
        return area

    def upper(self, top: int) -> NDArray[np.bool_]:
        """The part down to `UPPER_HEAD_MM` below section `top`."""
        return self.mask[:, :, max(0, top + 1 - int(UPPER_HEAD_MM / self.cell_mm[2])) : top + 1]


def acquired_planes(voxels: Array) -> list[tuple[int, int]]:
    """First and last-plus-one plane along each axis that holds more than one value: padding is no field of view."""
    bounds = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        held = np.flatnonzero(voxels.max(axis=others) > voxels.min(axis=others))
        bounds.append((int(held[0]), int(held[-1]) + 1) if held.size else (0, voxels.shape[axis]))
    return bounds


def check_whole(
    body: Body, top: int, voxels: Array, spacing_mm: NDArray[np.float64], start_mm: NDArray[np.float64]
) -> None:
    """Refuse a head that goes on beyond the acquired field of view.

    Args:
        body: the head.
        top: its topmost section.
        voxels: (I, J, K) float32 that it was found in, along R, A, S.
        spacing_mm: (3,) of the voxels.
        start_mm: (3,) outer edge of the first voxel.

    Raises:
        Refusal: `partial_coverage`, naming the side.
    """
    planes = acquired_planes(voxels)
    _check_vertex(body, top, start_mm[2] + planes[2][1] * spacing_mm[2])
    upper = body.upper(top)
    for axis, names in enumerate(_SIDES):
        low, high = (start_mm[axis] + plane * spacing_mm[axis] for plane in planes[axis])
        shares = cut_shares(upper, axis, body.cell_mm[axis], low - body.start_mm[axis], high - body.start_mm[axis])
        cut = [name for name, share in zip(names, shares, strict=True) if share > MAX_CUT_SHARE]
        if cut and not (min(shares) > 0.0 and folds_over(voxels, axis, planes[axis])):
            text = " and ".join(cut)
            raise Refusal(
                "partial_coverage", f"The head is cut off at the {text}: brain lies at the edge of the image."
            )
    _check_depth(body, top, upper, float(start_mm[2] + planes[2][0] * spacing_mm[2]))


def cut_shares(
    upper: NDArray[np.bool_], axis: int, cell_mm: float, low_mm: float, high_mm: float
) -> tuple[float, float]:
    """How much of the head's largest section both border planes cut.

    Args:
        upper: (I, J, K) bool, the upper head.
        axis: 0 or 1.
        cell_mm: edge of a cell along the axis.
        low_mm: where the acquired field of view begins, from the outer edge of the first cell.
        high_mm: where it ends.

    Returns:
        Shares in [0, 1], of the low and of the high border.
    """
    areas = [float(ndimage.binary_fill_holes(plane).sum()) for plane in np.moveaxis(upper, axis, 0)]
    largest = max(*areas, 1.0)
    # The outermost cell may hold a single voxel of the field of view, hence the one inside it counts too.
    first = min(int(low_mm / cell_mm + 0.5), len(areas) - 2)
    last = min(max(int(high_mm / cell_mm + 0.5) - 1, 1), len(areas) - 1)
    return min(areas[first], areas[first + 1]) / largest, min(areas[last], areas[last - 1]) / largest


def folds_over(voxels: Array, axis: int, planes: tuple[int, int]) -> bool:
    """Whether the image goes on at its opposite edge: the detail of the first and last plane agrees."""
    first, last = (_detail(np.take(voxels, i, axis=axis)) for i in (planes[0], planes[1] - 1))
    norm = float(np.sqrt((first**2).sum() * (last**2).sum()))
    return norm > 0.0 and float((first * last).sum()) / norm > FOLD_CORRELATION[axis]


def _detail(plane: Array) -> Array:
    """A plane without what varies slowly: the two sides of a head are alike in outline, not in their folds."""
    smooth = ndimage.gaussian_filter(np.asarray(plane, dtype=np.float32), 1.0)
    detail: Array = smooth - ndimage.gaussian_filter(smooth, 4.0)
    return detail


def _check_vertex(body: Body, top: int, end_mm: float) -> None:
    sections = body.sections_cm2()
    last = min(max(int((end_mm - body.start_mm[2]) / body.cell_mm[2] + 0.5) - 1, 1), len(sections) - 1)
    if top >= last - 1 and min(sections[last], sections[last - 1]) > MAX_VERTEX_CUT_CM2:
        raise Refusal("partial_coverage", "The top of the head lies outside the field of view.")


def _check_depth(body: Body, top: int, upper: NDArray[np.bool_], bottom_mm: float) -> None:
    """Refuse a field of view that ends within the brain at the bottom; longer heads hold deeper brains."""
    length = np.flatnonzero(upper.any(axis=(0, 2)))
    length_mm = (int(length[-1]) + 1 - int(length[0])) * body.cell_mm[1] if length.size else 0.0
    needed_mm = float(np.clip(BELOW_VERTEX_PER_LENGTH * length_mm, MIN_BELOW_VERTEX_MM, MAX_BELOW_VERTEX_MM))
    below_mm = body.start_mm[2] + (top + 1) * body.cell_mm[2] - bottom_mm
    if below_mm < needed_mm:
        raise Refusal("partial_coverage", f"Only the upper {below_mm:.0f} mm of the head were acquired.")
