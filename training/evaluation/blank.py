"""DICOM files read as if they were NIfTI: geometry and pixels, no header rule applied. For the refusal set only."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.words import Volume


def read_stacks(folder: Path) -> list[Volume]:
    """Every stack of parallel slices or frames in a folder, largest first; files that are no images are left out."""
    import pydicom

    planes: dict[tuple[Any, ...], list[tuple[NDArray[np.float32], NDArray[np.float64], Any]]] = defaultdict(list)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            ds = pydicom.dcmread(path)
            for pixels, position, direction, spacing in _planes(ds):
                key = (str(ds.get("SeriesInstanceUID", "")), pixels.shape, tuple(np.round(direction, 3)), spacing)
                planes[key].append((pixels, position, direction))
        except (pydicom.errors.InvalidDicomError, AttributeError, KeyError, ValueError, NotImplementedError):
            continue
    stacks = [_stack(found, key[3]) for key, found in planes.items()]
    return sorted(stacks, key=lambda v: -v.voxels.size)


def _planes(ds: Any) -> list[tuple[NDArray[np.float32], NDArray[np.float64], tuple[float, ...], tuple[float, float]]]:
    pixels = np.asarray(ds.pixel_array, dtype=np.float32)
    if "PerFrameFunctionalGroupsSequence" not in ds:
        if pixels.ndim == 3:
            pixels = pixels[..., 0] if pixels.shape[-1] in (3, 4) else pixels[0]
        spacing = ds.get("PixelSpacing", (1.0, 1.0))
        position = np.array(ds.get("ImagePositionPatient", (0.0, 0.0, 0.0)), dtype=float)
        direction = tuple(float(v) for v in ds.get("ImageOrientationPatient", (1, 0, 0, 0, 1, 0)))
        return [(pixels, position, direction, (float(spacing[0]), float(spacing[1])))]
    shared = ds.SharedFunctionalGroupsSequence[0]
    out = []
    for frame, groups in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
        measures = _group(groups, shared, "PixelMeasuresSequence").PixelSpacing
        direction = _group(groups, shared, "PlaneOrientationSequence").ImageOrientationPatient
        position = _group(groups, shared, "PlanePositionSequence").ImagePositionPatient
        out.append(
            (
                frame,
                np.array(position, dtype=float),
                tuple(float(v) for v in direction),
                (float(measures[0]), float(measures[1])),
            )
        )
    return out


def _group(own: Any, shared: Any, keyword: str) -> Any:
    return getattr(own if keyword in own else shared, keyword)[0]


def _stack(planes: list[tuple[NDArray[np.float32], NDArray[np.float64], Any]], spacing: tuple[float, float]) -> Volume:
    """Sort by position along the normal; two planes at one place keep the first (repeats, echoes)."""
    direction = np.array(planes[0][2])
    row, column = direction[:3], direction[3:]
    normal = np.cross(row, column)
    by_place = {round(float(normal @ position), 2): (pixels, position) for pixels, position, _ in reversed(planes)}
    places = sorted(by_place)
    voxels = np.stack([by_place[p][0] for p in places]).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacing[1], column * spacing[0]
    last, first = by_place[places[-1]][1], by_place[places[0]][1]
    affine[:3, 2] = (last - first) / (len(places) - 1) if len(places) > 1 else normal
    affine[:3, 3] = first
    return Volume(np.ascontiguousarray(voxels), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
