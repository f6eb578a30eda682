"""A head made of ellipsoids, with maps as a student would return them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from daemon.pictures import Pictures, draw
from daemon.prepare import Prepared, prepare
from daemon.score import WorstSlice
from daemon.words import ARTEFACTS, Maps, Volume


def head_volume(spacing_mm: float = 2.0) -> Volume:
    """Scalp, skull, brain with a folded border and ventricles, in RAS; brighter on the patient's right front top."""
    shape = tuple(round(size / spacing_mm) for size in (180, 220, 220))
    r, a, s = np.meshgrid(*((np.arange(n) + 0.5) * spacing_mm - n * spacing_mm / 2 for n in shape), indexing="ij")
    out = np.zeros(shape, np.float32)
    up = s - 20
    out[(r / 76) ** 2 + (a / 96) ** 2 + (s / 104) ** 2 < 1] = 0.9
    out[(r / 70) ** 2 + (a / 90) ** 2 + (s / 98) ** 2 < 1] = 0.12
    fold = 1 + 0.05 * np.sin(np.arctan2(a, r) * 17) * np.sin(up / 9)
    out[((r / 64) ** 2 + (a / 82) ** 2 + (up / 64) ** 2) < 1] = 0.28
    out[((r / 62) ** 2 + (a / 80) ** 2 + (up / 62) ** 2) * fold < 1] = 0.62
    out[((r / 54) ** 2 + (a / 72) ** 2 + (up / 54) ** 2) * fold**3 < 1] = 1.0
    out[((np.abs(r) - 12) / 7) ** 2 + (a / 28) ** 2 + (up / 14) ** 2 < 1] = 0.25
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [-(n - 1) * spacing_mm / 2 for n in shape]
    return Volume(out * 800, affine)


def head_maps(prepared: Prepared, artefact: str = "motion", centre: tuple[int, int, int] = (60, 75, 62)) -> Maps:
    """Grey matter where the image is grey; one artefact's variance high in a ball around `centre`."""
    image = prepared.image
    grey = np.clip(1 - np.abs(image - 0.62) / 0.2, 0, 1).astype(np.float32)
    grid = np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij")
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)))
    ball: NDArray[np.float32] = np.exp(-((distance / 18) ** 2)).astype(np.float32)
    edges = 0.002 + 0.01 * grey
    variance = np.stack([edges * (0.3 + 12 * ball * (name == artefact)) for name in ARTEFACTS]).astype(np.float32)
    return Maps(grey, edges.astype(np.float32), variance)


def head_pictures(artefact: str = "motion", centre: tuple[int, int, int] = (60, 75, 62)) -> Pictures:
    """Pictures of the phantom, the worst slices through `centre`."""
    volume = head_volume()
    prepared = prepare(volume)
    worst = [
        WorstSlice("axial", centre[2], 0.0, 0.1, "upper third of the head"),
        WorstSlice("coronal", centre[1], 0.0, 0.09, "front third of the head"),
        WorstSlice("sagittal", centre[0], 0.0, 0.08, "right third of the head"),
    ]
    return draw(volume, prepared, head_maps(prepared, artefact, centre), worst)
