"""The demo's two artefacts, in plain NumPy and on purpose not the code that training simulates with.

They are mid-range: a spike as strong as the strongest sample of the scan (the middle, on a logarithmic scale, of a tenth to
ten times), a quarter of the way out from the centre of k-space; a patient who nods four times by up to 8.5 degrees, 6.6 mm on
average over the brain: the published trajectories (`training.kspace.draw_motion` with the paper's ranges) have a median of 6.4 mm.
How the motion came to be that strong stands in docs/student.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from daemon.words import Array, Volume


@dataclass(frozen=True)
class Pose:
    """Where the head is from one moment on.

    Attributes:
        start: share of the acquisition, 0 to 1.
        nod_deg: rotation about the left-right axis through the middle of the volume.
        forward_mm, up_mm: shift.
    """

    start: float
    nod_deg: float
    forward_mm: float
    up_mm: float


NODS = (
    Pose(0.0, 4.5, 3.0, 1.5),
    Pose(0.25, -6.0, 0.0, -3.0),
    Pose(0.45, 0.0, 0.0, 0.0),
    Pose(0.55, 8.5, 6.0, 1.5),
    Pose(0.75, -4.5, -3.0, 3.0),
)
"""The middle of k-space is filled from 0.45 to 0.55: there the head is where it should be."""

SPIKE_MAGNITUDE = 1.0
"""Of the spike, in units of the largest sample of the scan's k-space."""

SPIKE_PLACE = 0.25
"""Of the spike: share of the way from the centre of k-space to its edge, along each axis."""

RADIUS_MM = 64.0
"""About the radius of a brain."""


def mean_displacement_mm(poses: Sequence[Pose] = NODS) -> float:
    """Root mean square way of points on a sphere of `RADIUS_MM`, over the acquisition."""
    ends = [*(pose.start for pose in poses[1:]), 1.0]
    total = 0.0
    for pose, end in zip(poses, ends, strict=True):
        turn = 2.0 / 3.0 * (math.radians(pose.nod_deg) * RADIUS_MM) ** 2
        total += (end - pose.start) * (turn + pose.forward_mm**2 + pose.up_mm**2)
    return math.sqrt(total)


def with_motion(volume: Volume, poses: Sequence[Pose] = NODS) -> Volume:
    """The same scan of a patient who moves: k-space is filled from the pose that holds at the time.

    The slow phase-encoding direction is front to back: each echo train fills one plane of k-space across it, so only the
    transform along that axis matters.

    Args:
        volume: axes right, anterior, superior, voxels of 1 mm.
        poses: by rising start; the first one starts at 0.
    """
    n = volume.voxels.shape[1]
    edges = [round(pose.start * n) for pose in poses] + [n]
    lines = np.empty(volume.voxels.shape, np.complex64)
    for pose, low, high in zip(poses, edges, edges[1:], strict=False):
        moved = _moved(volume.voxels, pose)
        lines[:, low:high] = fft.fftshift(fft.fft(moved, axis=1), axes=1)[:, low:high]
    image = np.abs(fft.ifft(fft.ifftshift(lines, axes=1), axis=1)).astype(np.float32)
    return Volume(image, volume.affine, volume.provenance)


def _moved(voxels: Array, pose: Pose) -> Array:
    """The head in one pose; trilinear, edges held."""
    if pose.nod_deg == pose.forward_mm == pose.up_mm == 0:
        return voxels
    angle = math.radians(pose.nod_deg)
    turn = np.array([[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]])
    centre = (np.asarray(voxels.shape) - 1) / 2.0
    offset = centre - turn @ (centre + np.array([0.0, pose.forward_mm, pose.up_mm]))
    out: Array = np.empty_like(voxels)
    # A nod stays in the sagittal plane, so each slice is moved by itself.
    for index in range(voxels.shape[0]):
        ndimage.affine_transform(
            voxels[index], turn[1:, 1:], offset[1:], output=out[index], order=1, mode="nearest", prefilter=False
        )
    return out


def with_spike(volume: Volume, magnitude: float = SPIKE_MAGNITUDE, place: float = SPIKE_PLACE) -> Volume:
    """The same scan with one corrupted sample of k-space: stripes across the whole image.

    One sample of k-space is one plane wave in the image, so it is added there. The largest sample of a magnitude image is
    the one at the centre, the sum of its voxels.

    Args:
        volume: any axes.
        magnitude: of the sample, largest sample = 1.
        place: share of the way from the centre to the edge along each axis, in (0, 1).
    """
    shape = volume.voxels.shape
    wave: NDArray[np.complex64] = np.ones((1, 1, 1), np.complex64)
    for axis, n in enumerate(shape):
        index = np.arange(n) - n // 2
        line = np.exp(2j * np.pi * round(place * n / 2) * index / n).astype(np.complex64)
        wave = wave * line.reshape([-1 if a == axis else 1 for a in range(3)])
    size = np.float32(magnitude * float(volume.voxels.mean(dtype=np.float64)))
    image = np.abs(volume.voxels + size * wave).astype(np.float32)
    return Volume(image, volume.affine, volume.provenance)
