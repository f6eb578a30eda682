"""Labels -> the magnitude volume that a T1-weighted MPRAGE of that head would give: 176 sagittal slices, 1 mm.

Levels are relative to white matter; they and their spread are drawn anew for each scan around published T1 contrasts, so no
two scans share a histogram. Texture is fine and patchy; the coil's shading is a smooth field; the noise is Rician.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from scipy import ndimage

from daemon.demo.anatomy import GREY, RIGHT_IDS, LabelledHead, Labels, Tissue, band_noise, smooth_field
from daemon.words import Array, Volume

SLICES, COLUMNS, ROWS = 176, 256, 256
"""Sagittal slices, then the two axes in plane: front to back, top to bottom; 1 mm each way."""

WHITE_LEVEL = 1200.0
"""Stored intensity of white matter: of the order that scanners write."""

NOISE = 0.02
"""Standard deviation of the noise of each receiver channel, white matter = 1; about that of a 5 minute scan at 3 T."""

SHADING = 0.12
"""Standard deviation of the logarithm of the coil's shading."""

POINT_SPREAD = 0.5
"""Standard deviation of the point spread, voxels."""

# Mean level of a tissue (white matter = 1), spread of the mean between scans, spread inside one scan.
LEVELS: dict[Tissue, tuple[float, float, float]] = {
    Tissue.WHITE: (1.00, 0.02, 0.03),
    Tissue.CORTEX: (0.63, 0.03, 0.04),
    Tissue.VENTRICLE: (0.25, 0.03, 0.03),
    Tissue.CSF: (0.25, 0.03, 0.06),
    Tissue.CEREBELLAR_WHITE: (0.94, 0.03, 0.04),
    Tissue.CEREBELLAR_CORTEX: (0.60, 0.03, 0.08),
    Tissue.THALAMUS: (0.80, 0.03, 0.04),
    Tissue.CAUDATE: (0.66, 0.03, 0.03),
    Tissue.PUTAMEN: (0.73, 0.03, 0.03),
    Tissue.PALLIDUM: (0.91, 0.03, 0.03),
    Tissue.BRAINSTEM: (0.88, 0.03, 0.05),
    Tissue.SOFT: (0.62, 0.05, 0.12),
    Tissue.BONE: (0.10, 0.02, 0.05),
    Tissue.EYE: (0.30, 0.05, 0.04),
    Tissue.FAT: (1.10, 0.10, 0.15),
    Tissue.MUSCLE: (0.47, 0.04, 0.08),
    Tissue.MUCOSA: (0.65, 0.08, 0.12),
    Tissue.SKIN: (0.60, 0.08, 0.10),
    Tissue.CAVITY: (0.28, 0.05, 0.10),
    Tissue.MARROW: (0.72, 0.10, 0.15),
    Tissue.SCALP: (1.15, 0.12, 0.12),
}


@dataclass(frozen=True)
class Scan:
    """One made-up acquisition.

    Attributes:
        volume: float32 magnitude, white matter near `WHITE_LEVEL`.
        labels: (I, J, K) int16 on the same grid: what is really there.
    """

    volume: Volume
    labels: Labels

    def grey_mask(self) -> Array:
        """(I, J, K) float32, 1 where there is grey matter, else 0."""
        return np.isin(self.labels, GREY).astype(np.float32)


def paint(head: LabelledHead, seed: SeedSequence) -> Scan:
    """Scan a head once, without any artefact.

    Args:
        head: what is scanned.
        seed: of this scan's contrast, texture, shading and noise.
    """
    rng = default_rng(seed)
    labels, affine = _field_of_view(head)
    image = _levels(labels, rng)
    image = ndimage.gaussian_filter(image, POINT_SPREAD)
    image *= _shading(image.shape, rng)
    image = rician(image, NOISE, rng) * np.float32(WHITE_LEVEL)
    return Scan(Volume(image, affine, {"manufacturer": "RESCAN SIMULATOR"}), labels)


def rician(image: Array, sigma: float, rng: Generator) -> Array:
    """Magnitude of the image with complex Gaussian noise of `sigma` per channel."""
    real = image + np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32)
    imaginary = np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32)
    out: Array = np.hypot(real, imaginary)
    return out


def _field_of_view(head: LabelledHead) -> tuple[Labels, NDArray[np.float64]]:
    """Centre the slices on the head, hang the rows on its upper end."""
    spare = [have - want for have, want in zip(head.labels.shape, (SLICES, COLUMNS, ROWS), strict=True)]
    low = (spare[0] // 2, spare[1] // 2, spare[2])
    labels = head.labels[low[0] : low[0] + SLICES, low[1] : low[1] + COLUMNS, low[2] : low[2] + ROWS]
    affine = head.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.asarray(low, dtype=np.float64)
    return np.ascontiguousarray(labels), affine


def _levels(labels: Labels, rng: Generator) -> Array:
    """Each tissue's level plus its texture: half patches of some millimetres, half single voxels."""
    mean, spread = np.zeros(int(max(Tissue)) + 1, np.float32), np.zeros(int(max(Tissue)) + 1, np.float32)
    for tissue, (level, between, within) in LEVELS.items():
        drawn = max(0.0, level + between * float(np.clip(rng.standard_normal(), -2, 2)))
        for label in {int(tissue), RIGHT_IDS.get(int(tissue), int(tissue))}:
            mean[label], spread[label] = drawn, within
    shape = (labels.shape[0], labels.shape[1], labels.shape[2])
    texture = 0.7 * band_noise(shape, 2.0, 6.0, rng, step=2) + 0.7 * rng.standard_normal(shape, dtype=np.float32)
    out: Array = np.clip(mean[labels] + spread[labels] * texture, 0.0, None)
    return out


def _shading(shape: tuple[int, ...], rng: Generator) -> Array:
    out: Array = np.exp(SHADING * smooth_field((shape[0], shape[1], shape[2]), 120.0, rng))
    return out
