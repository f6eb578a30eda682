"""The worst slices as pictures: one grey image per plane, and one transparent layer per artefact to lay over it.

The layers are separate files of the same size, so the page can fade them and show one artefact at a time without asking
again. Planes are shown as radiologists expect them: the patient's right is on the left of the picture, the nose of a
sagittal plane points to the left. Nothing here names a patient; the folder's name is the opaque identifier of the result.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from daemon.card import Calibration
from daemon.prepare import SPACING_MM, Canonical, Prepared, to_canonical
from daemon.score import WorstSlice
from daemon.words import ARTEFACTS, Array, Maps, Volume

Pixels = NDArray[np.uint8]

PIXEL_MM = 1.0
"""Edge of a pixel: half a cell of the prepared grid, so that fine ghosts stay visible."""

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
SIDES = {
    "axial": {"left": "R", "right": "L", "top": "A", "bottom": "P"},
    "coronal": {"left": "R", "right": "L", "top": "S", "bottom": "I"},
    "sagittal": {"left": "A", "right": "P", "top": "S", "bottom": "I"},
}
"""Patient's side at each edge of a picture."""

LAYERS = ("total", *ARTEFACTS, "task", "outline")
"""Transparent layers in the order of the page's buttons; `outline` is the border of predicted grey matter."""

FULL_FACTOR = 8.0
"""A layer is fully opaque where the variance is this many times the level at which it begins to show."""

UNCALIBRATED_FACTOR = 2.0
"""Without a calibration a layer begins to show at this multiple of its own median in the head."""

WHITE_QUANTILE = 0.995
GREY_GAMMA = 0.85

UNCERTAIN_RGB = (255, 79, 216)
CERTAIN_RGB = (92, 225, 230)
"""Magenta for uncertainty, cyan for the outline: neither is a colour of a verdict nor of tissue."""

MANIFEST = "pictures.json"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PICTURE = re.compile(r"[a-z]{1,16}(-[a-z]{1,16})?\.png")


@dataclass(frozen=True)
class Pictures:
    """The pictures of one result.

    Attributes:
        files: file name -> PNG bytes: `<plane>.png` and `<plane>-<layer>.png`.
        manifest: plain JSON: planes with place, size and sides; layers; the scale of the layers.
    """

    files: Mapping[str, bytes]
    manifest: Mapping[str, Any]


def draw(
    volume: Volume,
    prepared: Prepared,
    maps: Maps,
    worst: Sequence[WorstSlice],
    calibration: Calibration | None = None,
) -> Pictures:
    """Draw the worst slice of each plane with its layers.

    Args:
        volume: what was acquired; the grey images show it, not the coarser input of the network.
        prepared: the network's input made from `volume`; its box says where the maps lie.
        maps: what the student returned, (D, H, W) on the prepared grid.
        worst: one slice per plane; a plane that is absent gets the middle of the grid.
        calibration: gives the layers an absolute scale, the same for every scan; None scales each by itself.

    Returns:
        Three grey images and `len(LAYERS)` layers for each.
    """
    canonical = to_canonical(volume)
    levels = _levels(maps, prepared, calibration)
    by_plane = {slice_.plane: slice_ for slice_ in worst}
    order = [s.plane for s in worst if s.plane in AXES] + [p for p in AXES if p not in by_plane]
    white = _white_level(prepared)
    files: dict[str, bytes] = {}
    planes: list[dict[str, Any]] = []
    for plane in order:
        found = by_plane.get(plane)
        index = found.index if found else prepared.box.shape[AXES[plane]] // 2
        grey = _to_screen(_grey(canonical, prepared, plane, index, white), plane)
        files[f"{plane}.png"] = png_grey(grey)
        for layer in LAYERS:
            files[f"{plane}-{layer}.png"] = _layer(maps, plane, index, layer, levels)
        planes.append(
            {
                "plane": plane,
                "place": found.place if found else "",
                "slice": index,
                "width": int(grey.shape[1]),
                "height": int(grey.shape[0]),
                "sides": SIDES[plane],
            }
        )
    scale = {"calibrated": calibration is not None, "full_factor": FULL_FACTOR, "shows_from": levels}
    return Pictures(files, {"planes": planes, "layers": list(LAYERS), "scale": scale})


def _levels(maps: Maps, prepared: Prepared, calibration: Calibration | None) -> dict[str, float]:
    """Per layer, the variance at which it begins to show."""
    head = prepared.head_mask if prepared.head_mask.any() else np.ones_like(prepared.head_mask)
    task = UNCALIBRATED_FACTOR * float(np.median(maps.task_variance[head]))
    if calibration is None:
        parts = [UNCALIBRATED_FACTOR * float(np.median(v[head])) for v in maps.artefact_variance]
        levels = {"total": sum(parts), **dict(zip(ARTEFACTS, parts, strict=True))}
    else:
        clean = np.exp(np.asarray(calibration.artefact_clean))
        shares = clean / clean.sum()
        total = calibration.affected_variance
        levels = {"total": total, **{n: float(total * s) for n, s in zip(ARTEFACTS, shares, strict=True)}}
    return {name: max(float(level), 1e-9) for name, level in {**levels, "task": task}.items()}


def _white_level(prepared: Prepared) -> float:
    """Intensity of the source that becomes white: bright tissue, not the brightest vessel."""
    inside = prepared.image[prepared.head_mask]
    return prepared.scale * (float(np.quantile(inside, WHITE_QUANTILE)) if inside.size else 1.0)


def _grey(canonical: Canonical, prepared: Prepared, plane: str, index: int, white: float) -> Pixels:
    """One plane of the acquired volume on pixels of `PIXEL_MM`: nearest slice, bilinear within; black outside."""
    axis = AXES[plane]
    centre_mm = prepared.box.start_mm[axis] + (index + 0.5) * SPACING_MM
    at = round((centre_mm - canonical.start_mm[axis]) / canonical.spacing_mm[axis] - 0.5)
    if not 0 <= at < canonical.voxels.shape[axis]:
        shape = [prepared.box.shape[a] * round(SPACING_MM / PIXEL_MM) for a in range(3) if a != axis]
        return np.zeros(shape, np.uint8)
    image = _plane(canonical.voxels, axis, at)
    grids = []
    for other in (a for a in range(3) if a != axis):
        pixels = prepared.box.shape[other] * round(SPACING_MM / PIXEL_MM)
        mm = prepared.box.start_mm[other] + (np.arange(pixels) + 0.5) * PIXEL_MM
        grids.append((mm - canonical.start_mm[other]) / canonical.spacing_mm[other] - 0.5)
    coordinates = np.meshgrid(*grids, indexing="ij")
    sampled = ndimage.map_coordinates(image, coordinates, order=1, mode="constant", cval=0.0)
    level = np.clip(sampled / max(white, 1e-12), 0.0, 1.0) ** GREY_GAMMA
    grey: Pixels = np.round(255.0 * level).astype(np.uint8)
    return grey


def _plane(values: Array, axis: int, index: int) -> Array:
    """(D, H, W) -> the plane of one axis."""
    return np.asarray(np.take(values, index, axis=axis), dtype=np.float32)


def _layer(maps: Maps, plane: str, index: int, layer: str, levels: Mapping[str, float]) -> bytes:
    """One transparent layer as PNG."""
    if layer == "outline":
        return png_layer(_to_screen(_outline(maps.gm_probability, plane, index), plane), CERTAIN_RGB)
    axis = AXES[plane]
    if layer == "total":
        variance = _plane(maps.artefact_variance.sum(axis=0), axis, index)
    elif layer == "task":
        variance = _plane(maps.task_variance, axis, index)
    else:
        variance = _plane(maps.artefact_variance[ARTEFACTS.index(layer)], axis, index)
    return png_layer(_to_screen(opacity(_enlarge(variance), levels[layer]), plane), UNCERTAIN_RGB)


def opacity(variance: Array, level: float) -> Pixels:
    """How opaque a layer is: nothing up to `level`, everything from `FULL_FACTOR * level` on, logarithmic between.

    Args:
        variance: sigma^2 >= 0, any shape.
        level: > 0, in the same unit.

    Returns:
        The same shape, 0 to 255.
    """
    ratio = np.log(np.maximum(variance, 1e-12) / level) / math.log(FULL_FACTOR)
    return np.round(255.0 * np.clip(ratio, 0.0, 1.0)).astype(np.uint8)


def _outline(gm_probability: Array, plane: str, index: int) -> Pixels:
    """The border of predicted grey matter, one pixel wide."""
    inside = _enlarge(_plane(gm_probability, AXES[plane], index)) > 0.5
    border = inside & ~ndimage.binary_erosion(inside)
    return np.where(border, 255, 0).astype(np.uint8)


def _enlarge(cells: Array) -> Array:
    """(A, B) cells -> (2A, 2B) pixels, bilinear, cell centres kept in place."""
    factor = round(SPACING_MM / PIXEL_MM)
    grids = [(np.arange(n * factor) + 0.5) / factor - 0.5 for n in cells.shape]
    out: Array = ndimage.map_coordinates(cells, np.meshgrid(*grids, indexing="ij"), order=1, mode="nearest")
    return out.astype(np.float32)


def _to_screen(pixels: Pixels, plane: str) -> Pixels:
    """Axes that grow to the right, the front and the top -> rows from the top, columns from the left, as in `SIDES`.

    Args:
        pixels: (first axis, second axis) of the plane, in the order R, A, S without the plane's own.
        plane: name from `SIDES`; all three planes turn alike, because every edge to the left and the top is the far end
            of its axis: R, A, S.
    """
    if plane not in SIDES:
        raise ValueError(f"plane: got {plane!r}; use one of {', '.join(SIDES)}")
    return np.ascontiguousarray(pixels[::-1, ::-1].T)


# --- PNG --------------------------------------------------------------------------------------------------------------


def png_grey(pixels: Pixels) -> bytes:
    """(rows, columns) uint8 -> an 8-bit greyscale PNG (W3C PNG, colour type 0)."""
    return _png(pixels, colour_type=0, extra=b"")


def png_layer(alpha: Pixels, rgb: tuple[int, int, int]) -> bytes:
    """(rows, columns) opacity 0..255 -> a PNG of one colour: palette entry n is `rgb` with opacity n (colour type 3)."""
    palette = _chunk(b"PLTE", bytes(rgb) * 256) + _chunk(b"tRNS", bytes(range(256)))
    return _png(alpha, colour_type=3, extra=palette)


def _png(pixels: Pixels, colour_type: int, extra: bytes) -> bytes:
    rows, columns = pixels.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, colour_type, 0, 0, 0)
    filtered = np.hstack([np.zeros((rows, 1), np.uint8), pixels]).tobytes()
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(filtered, 6)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --- On disk ----------------------------------------------------------------------------------------------------------


def write(pictures: Pictures, folder: Path, picture_id: str) -> None:
    """Put the pictures of one result below `folder`, whole or not at all; a folder that is there already stays.

    Args:
        pictures: of one result.
        folder: STATE/pictures.
        picture_id: opaque identifier of the result; letters, digits, `-` and `_`.

    Raises:
        ValueError: an identifier that could be a path.
        OSError: the disk does not take them.
    """
    if not _NAME.fullmatch(picture_id):
        raise ValueError(f"picture_id: got {picture_id!r}; use letters, digits, - and _")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (folder / picture_id).exists():
        return
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        for name, data in pictures.files.items():
            (fresh / name).write_bytes(data)
        (fresh / MANIFEST).write_text(json.dumps(pictures.manifest), encoding="utf-8")
        fresh.rename(folder / picture_id)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not (folder / picture_id).exists():
            raise


def read_manifest(folder: Path, picture_id: str) -> dict[str, Any] | None:
    """The manifest of one result; None where no pictures were drawn or they were removed."""
    if not _NAME.fullmatch(picture_id):
        return None
    try:
        found = json.loads((folder / picture_id / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_picture(folder: Path, picture_id: str, name: str) -> bytes | None:
    """One PNG; None where there is none."""
    if not _NAME.fullmatch(picture_id) or not _PICTURE.fullmatch(name):
        return None
    try:
        return (folder / picture_id / name).read_bytes()
    except OSError:
        return None


def remove_older(folder: Path, before: float) -> int:
    """Remove pictures drawn before a time.

    Args:
        folder: STATE/pictures.
        before: unix seconds.

    Returns:
        How many results lost theirs.
    """
    removed = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path.stat().st_mtime < before:
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
    return removed
