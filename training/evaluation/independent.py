"""Artefacts that are not from our own simulator: TorchIO where it is right, and a motion composed in another way.

TorchIO (Apache-2.0) is a dependency of the tests alone. Its spike adds to one sample of k-space, its ghosting weakens
periodic planes, its blur is a Gaussian and its noise is Gaussian in the image: four formulations other than ours. Its
`RandomMotion` rotates about the origin of the world and keeps the real part only, so motion is done here, in NumPy and
SciPy: the head moves in image space by cubic-spline resampling, the k-space planes are taken in turn from the moved
heads, and the largest piece, around the centre of k-space, stays at rest so that the labels stay valid.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from daemon.words import Array, Volume

KINDS = {"noise": "noise", "spike": "spike", "blur": "blur", "wrap": "ghosting", "motion": "motion"}
"""Artefact -> the process that stands for it here."""

RESTING_SHARE = 0.12
"""Share of the planes around the centre of k-space that are taken at rest; they hold most of the energy."""


def corrupt(volume: Volume, kind: str, strength: float, seed: int) -> Volume:
    """Corrupt a clean volume.

    Args:
        volume: magnitude image.
        kind: a value of `KINDS`.
        strength: see `severities.json`.
        seed: of every draw.

    Raises:
        ValueError: an unknown kind.
    """
    rng = np.random.default_rng(seed)
    scale = float(np.percentile(volume.voxels, 98))
    image = np.ascontiguousarray(volume.voxels / scale, dtype=np.float32)
    if kind == "motion":
        spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
        out = move(image, spacing, strength, rng)
    elif kind in ("noise", "spike", "blur", "ghosting"):
        out = _torchio(image, volume.affine, kind, strength, rng)
    else:
        raise ValueError(f"kind: expected one of {', '.join(sorted(KINDS.values()))}, got {kind!r}")
    return Volume((np.abs(out) * scale).astype(np.float32), volume.affine)


def _torchio(
    image: Array, affine: NDArray[np.float64], kind: str, strength: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One deterministic TorchIO transform; a scanner shows magnitudes, so the caller takes the absolute value."""
    tio = _import_torchio()
    if kind == "noise":
        transform = tio.Noise(mean=0.0, std=strength, seed=int(rng.integers(2**31)))
    elif kind == "spike":
        transform = tio.Spike(spikes_positions=_spike_position(rng), intensity=strength)
    elif kind == "blur":
        transform = tio.Blur(std=tuple(float(v) for v in strength * rng.uniform(0.7, 1.3, 3)))
    else:
        transform = tio.Ghosting(
            num_ghosts=int(rng.integers(3, 9)), axis=int(rng.integers(3)), intensity=strength, restore=None
        )
    import torch

    scan = tio.ScalarImage(tensor=torch.from_numpy(image.copy())[None], affine=affine)
    out: NDArray[np.float32] = transform(scan).data[0].numpy()
    return out


def _import_torchio() -> Any:
    try:
        return importlib.import_module("torchio")
    except ImportError as error:
        raise ValueError(
            "torchio is not installed; install the dev extra, or leave the independent sets out"
        ) from error


def _spike_position(rng: np.random.Generator) -> NDArray[np.float64]:
    """One position in [0, 1)^3, within the middle half of k-space and off its centre."""
    while True:
        position = rng.uniform(0.25, 0.75, 3)
        if np.abs(position - 0.5).max() > 0.03:
            return position[None]


def move(
    image: Array, spacing_mm: NDArray[np.float64], strength: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Three to five jerks of a head while k-space fills plane by plane.

    Args:
        image: (I, J, K) magnitude.
        spacing_mm: voxel size.
        strength: standard deviation of each jerk, in degrees and in millimetres.
        rng: NumPy generator.

    Returns:
        Magnitude, same shape.
    """
    axis = int(rng.integers(2))
    n = image.shape[axis]
    k = fft.fftshift(fft.fft(image, axis=axis), axes=axis)
    rest = abs(np.arange(n) - n // 2) < max(2.0, 0.5 * RESTING_SHARE * n)
    cuts = np.sort(rng.choice(np.arange(2, n - 2), int(rng.integers(3, 6)), replace=False))
    for low, high in zip(cuts, [*cuts[1:], n], strict=True):
        angles, shifts = rng.normal(0.0, strength, 3), rng.normal(0.0, strength, 3) / spacing_mm
        planes = np.flatnonzero(~rest[low:high]) + low
        if planes.size:
            moved = fft.fftshift(fft.fft(_rigid(image, angles, shifts, spacing_mm), axis=axis), axes=axis)
            where = [slice(None)] * 3
            where[axis] = planes
            k[tuple(where)] = moved[tuple(where)]
    out: NDArray[np.float32] = np.abs(fft.ifft(fft.ifftshift(k, axes=axis), axis=axis)).astype(np.float32)
    return out


def _rigid(
    image: Array, angles_deg: NDArray[np.float64], shift: NDArray[np.float64], spacing_mm: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Rotation about the middle of the volume and translation in voxels, by one spline resampling."""
    matrix = np.eye(3)
    for a, angle in enumerate(np.deg2rad(angles_deg)):
        b, c = [i for i in range(3) if i != a]
        turn = np.eye(3)
        turn[b, b] = turn[c, c] = math.cos(angle)
        turn[b, c], turn[c, b] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    in_voxels = np.diag(1.0 / spacing_mm) @ matrix @ np.diag(spacing_mm)
    centre = (np.array(image.shape) - 1) / 2.0
    offset = centre - in_voxels @ (centre + shift)
    out: NDArray[np.float32] = ndimage.affine_transform(image, in_voxels, offset, order=1, mode="constant")
    return out
