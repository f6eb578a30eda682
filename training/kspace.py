"""Artefacts as they arise in k-space, on whole volumes, before any cropping (Shaw 2021, section 5).

Drawing is apart from the physics: `draw_*` turns a random generator into a frozen record, `apply` turns a record into a
volume. A record (and the same input) always gives the same volume, so any sample can be replayed.

Order: motion -> fold-over -> spike -> noise -> blur -> line mask -> magnitude. Motion comes first because it makes the
composite k-space that the others edit; noise comes before truncation because only the samples kept carry noise.

Volumes are (I, J, K) or (N, I, J, K), real or complex; axes are always the last three.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

AXES = (-3, -2, -1)


def fft3(image: Tensor) -> Tensor:
    """Centred 3-D Fourier transform, unnormalised: zero frequency at index n // 2 of each axis."""
    out: Tensor = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(image, dim=AXES), dim=AXES), dim=AXES)
    return out


def ifft3(k: Tensor) -> Tensor:
    """Inverse of `fft3`; complex."""
    out: Tensor = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(k, dim=AXES), dim=AXES), dim=AXES)
    return out


def fft1(image: Tensor, axis: int) -> Tensor:
    """Centred transform along one axis (0, 1, 2 of the volume): enough for what edits whole lines or planes."""
    d = axis - 3
    out: Tensor = torch.fft.fftshift(torch.fft.fft(torch.fft.ifftshift(image, dim=d), dim=d), dim=d)
    return out


def ifft1(k: Tensor, axis: int) -> Tensor:
    """Inverse of `fft1`."""
    d = axis - 3
    out: Tensor = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(k, dim=d), dim=d), dim=d)
    return out


@dataclass(frozen=True)
class Noise:
    """Complex Gaussian noise of equal variance in every sample.

    Attributes:
        snr_db: 10 log10(mean |k|^2 / E|n|^2) over the full grid, by Parseval the same in image space. Smaller is worse.
        seed: of the noise itself.
    """

    snr_db: float
    seed: int


@dataclass(frozen=True)
class Spike:
    """One corrupted k-space sample.

    Attributes:
        at: offset of the sample from zero frequency along each axis, in samples; never within 1 of zero on all axes.
        magnitude: in units of the largest |k|. Larger is worse.
        phase: radians.
    """

    at: tuple[int, int, int]
    magnitude: float
    phase: float


@dataclass(frozen=True)
class Blur:
    """Truncation of k-space, zero-filled to the original matrix.

    Attributes:
        ratios: per axis, original over kept samples; 1 keeps all. Larger is worse.
    """

    ratios: tuple[float, float, float]


@dataclass(frozen=True)
class LineMask:
    """Lines left out along one axis (the paper's wrap-around).

    Attributes:
        axis: 0, 1 or 2.
        every: regular: drop each n-th line; 0 for random.
        offset: first dropped line of the regular pattern.
        fraction: random: share of lines dropped.
        seed: of the random pattern.
    """

    axis: int
    every: int
    offset: int
    fraction: float
    seed: int


@dataclass(frozen=True)
class FoldOver:
    """A field of view smaller than the head: what lies outside folds in from the other side.

    Attributes:
        axis: 0, 1 or 2.
        fraction: share of the field of view cut away, 0 to 0.45. Larger is worse.
    """

    axis: int
    fraction: float


@dataclass(frozen=True)
class Motion:
    """Rigid head poses while k-space is filled line by line along the slow axis.

    Attributes:
        slow_axis: 0, 1 or 2.
        times: moments at which the pose changes, rising, as shares of the acquisition in (0, 1).
        rotations_deg: pose after each moment, rotation vector about the volume's centre.
        translations_mm: pose after each moment.
    """

    slow_axis: int
    times: tuple[float, ...]
    rotations_deg: tuple[tuple[float, float, float], ...]
    translations_mm: tuple[tuple[float, float, float], ...]

    def rms_displacement_mm(self, radius_mm: float = 64.0) -> float:
        """Root mean square displacement of points on a sphere about the size of the brain: the severity on record."""
        times = (0.0, *self.times, 1.0)
        total = 0.0
        for i, (r, t) in enumerate(zip(self.rotations_deg, self.translations_mm, strict=True)):
            angle = math.radians(math.sqrt(sum(x * x for x in r)))
            square = sum(x * x for x in t) + 2.0 / 3.0 * (angle * radius_mm) ** 2
            total += (times[i + 2] - times[i + 1]) * square
        return math.sqrt(total)


@dataclass(frozen=True)
class Corruption:
    """What happened to one image; None where an artefact is absent. `wrap` is a mask, a fold-over or both."""

    noise: Noise | None = None
    spike: Spike | None = None
    blur: Blur | None = None
    mask: LineMask | None = None
    fold: FoldOver | None = None
    motion: Motion | None = None

    def present(self) -> tuple[bool, bool, bool, bool, bool]:
        """Which artefacts are in the image, in the order of `daemon.words.ARTEFACTS`."""
        wrap = self.mask is not None or self.fold is not None
        return (self.noise is not None, self.spike is not None, self.blur is not None, wrap, self.motion is not None)

    def only(self, artefact: str) -> Corruption:
        """The same draw with all other artefacts left out (method, S3)."""
        if artefact == "wrap":
            return Corruption(mask=self.mask, fold=self.fold)
        return replace(Corruption(), **{artefact: getattr(self, artefact)})

    def record(self) -> dict[str, Any]:
        """Plain data for a log; `from_record` reads it back."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @staticmethod
    def from_record(record: dict[str, Any]) -> Corruption:
        """Rebuild from `record()` (also after a trip through JSON).

        Raises:
            ValueError: an unknown artefact or field.
        """
        kinds = {"noise": Noise, "spike": Spike, "blur": Blur, "mask": LineMask, "fold": FoldOver, "motion": Motion}
        try:
            parts = {k: kinds[k](**{n: _tuples(v) for n, v in fields.items()}) for k, fields in record.items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a corruption record: {error}") from error
        return Corruption(**parts)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Physics


def apply(image: Tensor, corruption: Corruption, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Corrupt a clean magnitude volume.

    Args:
        image: (I, J, K) float32 >= 0, whole volume at its native spacing.
        corruption: what to do; `Corruption()` returns the image unchanged.
        spacing_mm: voxel size along the three axes; motion is in millimetres.

    Returns:
        float32 magnitude, same shape; a fold-over leaves zeros outside the smaller field of view (see `fold_bounds`).
    """
    if corruption == Corruption():
        return image
    x: Tensor = image
    if corruption.motion is not None:
        x = move(x, corruption.motion, spacing_mm)
    if corruption.fold is not None:
        x = fold_over(x, corruption.fold)
    if corruption.spike is not None:
        x = add_spike(x, corruption.spike)
    if corruption.noise is not None:
        x = add_noise(x, corruption.noise)
    if corruption.blur is not None:
        x = truncate(x, corruption.blur)
    if corruption.mask is not None:
        x = drop_lines(x, corruption.mask)
    x = magnitude(x)
    if corruption.fold is not None:
        low, high = fold_bounds(x.shape[corruption.fold.axis - 3], corruption.fold)
        keep = torch.zeros(x.shape[corruption.fold.axis - 3], device=x.device)
        keep[low:high] = 1.0
        x = x * _along(keep, corruption.fold.axis)
    return x


def magnitude(x: Tensor) -> Tensor:
    """What the scanner shows."""
    return x.abs().float()


def _along(line: Tensor, axis: int) -> Tensor:
    """Shape a vector so that it broadcasts along one volume axis."""
    shape = [1, 1, 1]
    shape[axis] = -1
    return line.reshape(shape)


def _gaussian(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Standard normal values from a seed, drawn on the CPU so that every device sees the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def add_noise(x: Tensor, noise: Noise) -> Tensor:
    """Add complex white noise; in image space, which by Parseval is the same as in k-space."""
    power = x.abs().square().mean() / 10.0 ** (noise.snr_db / 10.0)
    sigma = torch.sqrt(power / 2.0)
    real = _gaussian(x.shape, noise.seed, x.device)
    imaginary = _gaussian(x.shape, noise.seed + 1, x.device)
    return torch.complex(x.real + sigma * real, (x.imag if x.is_complex() else 0.0) + sigma * imaginary)


def add_spike(x: Tensor, spike: Spike) -> Tensor:
    """Add one sample of `magnitude * max|k|` to k-space: a plane wave across the image.

    max|k| is |k(0)| = |sum of the image| for a non-negative image, and is taken as such.
    """
    n = x.shape[-3:]
    waves = []
    for axis in range(3):
        index = torch.arange(n[axis], dtype=torch.float64, device=x.device) - n[axis] // 2
        waves.append(
            torch.polar(torch.ones_like(index), 2.0 * math.pi * spike.at[axis] / n[axis] * index).to(torch.complex64)
        )
    peak = x.sum(dim=AXES, keepdim=True).abs() / float(n[0] * n[1] * n[2])
    tone = complex(math.cos(spike.phase), math.sin(spike.phase)) * spike.magnitude
    wave = _along(waves[0], 0) * _along(waves[1], 1) * _along(waves[2], 2)
    return x + peak * tone * wave


def truncate(x: Tensor, blur: Blur) -> Tensor:
    """Zero all samples beyond n / ratio along each axis (hard window, zero-filled to the same matrix)."""
    for axis, ratio in enumerate(blur.ratios):
        if ratio > 1.0:
            low, high = kept_band(x.shape[axis - 3], ratio)
            keep = torch.zeros(x.shape[axis - 3], device=x.device)
            keep[low:high] = 1.0
            x = ifft1(fft1(x, axis) * _along(keep, axis), axis)
    return x


def kept_band(n: int, ratio: float) -> tuple[int, int]:
    """First and last-plus-one sample that a truncation by `ratio` keeps, centred on zero frequency at n // 2."""
    half = max(1, round(n / ratio / 2.0))
    return max(0, n // 2 - half), min(n, n // 2 + half)


def drop_lines(x: Tensor, mask: LineMask) -> Tensor:
    """Zero the lines of the pattern; the central line and its neighbours stay."""
    keep = line_pattern(x.shape[mask.axis - 3], mask).to(x.device)
    return ifft1(fft1(x, mask.axis) * _along(keep, mask.axis), mask.axis)


def line_pattern(n: int, mask: LineMask) -> Tensor:
    """(n,) float32, 1 where a line is kept."""
    keep = torch.ones(n)
    if mask.every > 1:
        keep[mask.offset % mask.every :: mask.every] = 0.0
    elif mask.fraction > 0.0:
        generator = torch.Generator().manual_seed(mask.seed)
        keep[torch.randperm(n, generator=generator)[: round(mask.fraction * n)]] = 0.0
    keep[n // 2 - 1 : n // 2 + 2] = 1.0
    return keep


def fold_bounds(n: int, fold: FoldOver) -> tuple[int, int]:
    """First and last-plus-one index of the smaller field of view, centred in the old one."""
    kept = max(8, round(n * (1.0 - fold.fraction)))
    low = (n - kept) // 2
    return low, low + kept


def fold_over(x: Tensor, fold: FoldOver) -> Tensor:
    """Add to each voxel of the smaller field of view what lies one field of view away on either side."""
    d = fold.axis - 3
    n = x.shape[d]
    low, high = fold_bounds(n, fold)
    kept = high - low
    inside = x.narrow(d, low, kept).clone()
    if low > 0:
        inside.narrow(d, kept - low, low).add_(x.narrow(d, 0, low))
    if high < n:
        inside.narrow(d, 0, n - high).add_(x.narrow(d, high, n - high))
    out = torch.zeros_like(x)
    out.narrow(d, low, kept).copy_(inside)
    return out


def move(x: Tensor, motion: Motion, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Fill k-space line by line while the head changes its pose; complex result, registered with the input.

    Each pose is one resampling for the rotation and exact phase ramps for the translation. Poses are demeaned: weighted
    by the share of low-frequency energy that each fills, their mean is taken out, then what shift is left is measured
    on the low frequencies and taken out too, so that Dice against the clean labels stays meaningful.
    """
    axis = motion.slow_axis
    n = x.shape[axis - 3]
    edges = [0, *(round(t * n) for t in motion.times), n]
    rotations = np.vstack([np.zeros(3), np.asarray(motion.rotations_deg, dtype=float)]) * math.pi / 180.0
    shifts = np.vstack([np.zeros(3), np.asarray(motion.translations_mm, dtype=float)])
    clean = fft3(x)
    weights = _low_band_weights(clean, axis, edges)
    matrices = demeaned_poses(rotations, shifts, weights)
    k = torch.zeros_like(clean)
    for i, matrix in enumerate(matrices):
        low, high = edges[i], edges[i + 1]
        if high > low:
            rotated = clean if _is_still(matrix[:3, :3]) else fft3(_rotate(x, matrix[:3, :3], spacing_mm))
            lines = rotated.narrow(axis - 3, low, high - low)
            k.narrow(axis - 3, low, high - low).copy_(_shift(lines, matrix[:3, 3], spacing_mm, x.shape, axis, low))
    residual = registration_shift(clean, k)
    return ifft3(_shift_voxels(k, [-float(r) for r in residual]))


def demeaned_poses(rotations: Any, shifts_mm: Any, weights: Any) -> list[Any]:
    """4x4 poses (mm, about the centre) whose weighted mean is the identity.

    The mean is taken in the log domain (rotation vectors; small angles), each pose is then composed with the inverse of
    the mean by a matrix product.
    """
    mean_rotation, mean_shift = (
        np.average(rotations, axis=0, weights=weights),
        np.average(shifts_mm, axis=0, weights=weights),
    )
    inverse = np.linalg.inv(_pose(mean_rotation, mean_shift))
    return [inverse @ _pose(r, t) for r, t in zip(rotations, shifts_mm, strict=True)]


def _pose(rotation: Any, shift: Any) -> Any:
    """4x4 matrix from a rotation vector in radians (Rodrigues) and a translation."""
    angle = float(np.linalg.norm(rotation))
    matrix = np.eye(4)
    if angle > 1e-12:
        a = np.asarray(rotation) / angle
        cross = np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]])
        matrix[:3, :3] += math.sin(angle) * cross + (1.0 - math.cos(angle)) * cross @ cross
    matrix[:3, 3] = shift
    return matrix


def _is_still(rotation: Any) -> bool:
    """A rotation below 0.01 degree moves no voxel of a head by 0.02 mm: not worth a resampling."""
    return bool(np.abs(rotation - np.eye(3)).max() < math.radians(0.01))


def _low_band_weights(k: Tensor, axis: int, edges: list[int]) -> Any:
    """Share of the energy in the central eighth of k-space that falls into each segment of lines; sums to 1."""
    others = tuple(a - 3 for a in range(3) if a != axis)
    energy = k.abs().square()
    for d in others:
        n = energy.shape[d]
        energy = energy.narrow(d, n // 2 - n // 16, max(1, n // 8))
    profile = energy.sum(dim=others).double().cpu().numpy()
    profile[np.abs(np.arange(len(profile)) - len(profile) // 2) > len(profile) // 16] = 0.0
    parts = np.array([profile[a:b].sum() for a, b in pairwise(edges)])
    return parts / parts.sum()


def _rotate(x: Tensor, rotation: Any, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Trilinear rotation about the centre of the volume ((n - 1) / 2), in millimetres, edges replicated."""
    n = np.array(x.shape[-3:], dtype=float)
    size = (n - 1) * np.asarray(spacing_mm) / 2.0  # half extent in mm; grid_sample's [-1, 1] with aligned corners
    inverse = np.linalg.inv(rotation)
    theta = inverse * size[None, :] / size[:, None]
    theta = theta[::-1, ::-1].copy()  # grid_sample wants (x, y, z) = (last, middle, first) axis
    matrix = torch.tensor(np.hstack([theta, np.zeros((3, 1))]), dtype=torch.float32, device=x.device)[None]
    grid = F.affine_grid(matrix, [1, 1, *x.shape[-3:]], align_corners=True)
    flat = x.reshape(1, -1, *x.shape[-3:])
    return F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=True).reshape(x.shape)


def _ramp(n: int, shift_voxels: float, start: int, count: int, device: torch.device) -> Tensor:
    """exp(-2 pi i f shift) over `count` samples from `start`; the Nyquist sample of even n is left alone."""
    f = (torch.arange(start, start + count, dtype=torch.float64, device=device) - n // 2) / n
    return torch.polar(torch.ones_like(f), -2.0 * math.pi * shift_voxels * f).to(torch.complex64)


def _shift(
    k: Tensor, shift_mm: Any, spacing_mm: tuple[float, float, float], shape: torch.Size, axis: int, low: int
) -> Tensor:
    """Translate by phase ramps; `k` holds lines `low` and on of the slow axis, all samples of the other two."""
    for a in range(3):
        start = low if a == axis else 0
        k = k * _along(_ramp(shape[a - 3], float(shift_mm[a]) / spacing_mm[a], start, k.shape[a - 3], k.device), a)
    return k


def _shift_voxels(k: Tensor, shift: list[float]) -> Tensor:
    for a in range(3):
        k = k * _along(_ramp(k.shape[a - 3], shift[a], 0, k.shape[a - 3], k.device), a)
    return k


def registration_shift(reference: Tensor, moved: Tensor, band: int = 8) -> Tensor:
    """Translation of `moved` against `reference` in voxels (3,), from the phase of their low frequencies.

    Least squares fit of a plane to the phase of the cross spectrum within +-band samples, weighted by its energy.
    """
    crop_r, crop_m = reference, moved
    grids = []
    for a in range(3):
        n = reference.shape[a - 3]
        low, count = max(0, n // 2 - band), min(n, 2 * band + 1)
        crop_r, crop_m = crop_r.narrow(a - 3, low, count), crop_m.narrow(a - 3, low, count)
        grids.append((torch.arange(low, low + count, device=reference.device, dtype=torch.float64) - n // 2) / n)
    cross = (crop_m * crop_r.conj()).to(torch.complex128)
    f = torch.stack(torch.meshgrid(*grids, indexing="ij"), dim=-1).reshape(-1, 3)
    weight, phase = cross.abs().reshape(-1), cross.angle().reshape(-1)
    design = -2.0 * math.pi * f * weight.sqrt()[:, None]
    shift: Tensor = torch.linalg.lstsq(design, (phase * weight.sqrt())[:, None]).solution.reshape(3)
    return shift


# ---------------------------------------------------------------------------------------------------------------------
# Draws


@dataclass(frozen=True)
class Ranges:
    """From which severities are drawn. `PAPER` as printed; `PRODUCT` from invisible to the paper's maximum."""

    noise_db: tuple[float, float]
    spike: tuple[float, float]
    spike_log: bool
    blur: tuple[float, float]
    fold: tuple[float, float]
    line_masks: float
    motion_scale: tuple[float, float]


PAPER = Ranges((-10.0, 20.0), (1.0, 10.0), False, (2.0, 12.0), (0.0, 0.0), 1.0, (1.0, 1.0))
PRODUCT = Ranges((-10.0, 40.0), (0.05, 10.0), True, (1.2, 12.0), (0.0, 0.45), 0.4, (0.05, 1.5))


def draw_noise(rng: Generator, ranges: Ranges) -> Noise:
    """SNR uniform in decibels (A5)."""
    return Noise(float(rng.uniform(*ranges.noise_db)), int(rng.integers(2**31)))


def draw_spike(rng: Generator, ranges: Ranges, shape: tuple[int, int, int]) -> Spike:
    """Anywhere in k-space but at zero frequency and its neighbours (A4)."""
    while True:
        at = tuple(int(rng.integers(-(n // 2), n - n // 2)) for n in shape)
        if max(abs(a) for a in at) > 1:
            break
    low, high = ranges.spike
    size = math.exp(rng.uniform(math.log(low), math.log(high))) if ranges.spike_log else rng.uniform(low, high)
    return Spike((at[0], at[1], at[2]), float(size), float(rng.uniform(0, 2 * math.pi)))


def draw_blur(rng: Generator, ranges: Ranges) -> Blur:
    """One to three axes, each with its own ratio, log-uniform so that mild ones are not rare (A6)."""
    ratios = [1.0, 1.0, 1.0]
    for axis in rng.permutation(3)[: rng.integers(1, 4)]:
        ratios[axis] = float(math.exp(rng.uniform(math.log(ranges.blur[0]), math.log(ranges.blur[1]))))
    return Blur((ratios[0], ratios[1], ratios[2]))


def draw_wrap(rng: Generator, ranges: Ranges) -> Corruption:
    """A line mask (the paper's) or a true fold-over (A7), as a `Corruption` with one of the two."""
    if rng.random() < ranges.line_masks:
        regular = bool(rng.random() < 0.5)
        every = int(rng.integers(2, 9)) if regular else 0
        mask = LineMask(
            int(rng.integers(3)), every, int(rng.integers(8)), float(rng.uniform(0.1, 0.5)), int(rng.integers(2**31))
        )
        return Corruption(mask=mask)
    # Phase encoding of a 3-D T1 runs front-back or left-right; along the head only for axial slabs.
    return Corruption(fold=FoldOver(int(rng.choice(3, p=[0.4, 0.5, 0.1])), float(rng.uniform(*ranges.fold))))


def draw_motion(rng: Generator, ranges: Ranges) -> Motion:
    """Two published parameter sets, half of the draws each (method, section 2), times a common severity factor."""
    low, high = (math.log(v) for v in ranges.motion_scale)
    factor = math.exp(float(rng.uniform(low, high)))
    if rng.random() < 0.5:
        large, small, window = int(rng.poisson(1)), min(int(rng.poisson(5)), 4), (0.0, 1.0)
        sizes = ((5.4, 3.0), (0.54, 0.3))
        if large + small == 0:
            large = 1
    else:
        large, small, window = min(int(rng.poisson(2)), 5), min(int(rng.poisson(3)), 3), (0.3, 0.7)
        sizes = ((10.0, 10.0), (3.0, 2.0))
        if large + small == 0:
            large = 1
    kinds = [sizes[0]] * large + [sizes[1]] * small
    rng.shuffle(kinds)
    times = np.sort(rng.uniform(*window, size=len(kinds)))
    pose = np.zeros(6)
    rotations, translations = [], []
    for degrees, millimetres in kinds:
        pose[:3] += rng.normal(0, degrees * factor / math.sqrt(3), 3)
        pose[3:] += rng.normal(0, millimetres * factor / math.sqrt(3), 3)
        rotations.append((float(pose[0]), float(pose[1]), float(pose[2])))
        translations.append((float(pose[3]), float(pose[4]), float(pose[5])))
    return Motion(
        int(rng.choice(3, p=[0.4, 0.4, 0.2])), tuple(float(t) for t in times), tuple(rotations), tuple(translations)
    )


def draw_restless(rng: Generator, ranges: Ranges) -> Motion:
    """A head that moves to and fro about its place of rest; each pose is drawn apart from the last.

    The published sets (`draw_motion`) are walks: a head that has moved does not come back, and its pose while the middle
    of k-space is filled seldom agrees with any other. Here, in half of the draws, it rests while the middle is filled:
    the anatomy stays sharp and in place under ghosts that cost the segmentation as much.
    """
    low, high = (math.log(v) for v in ranges.motion_scale)
    factor = math.exp(float(rng.uniform(low, high)))
    times = [float(t) for t in rng.uniform(0.0, 1.0, rng.integers(2, 9))]
    rest = None
    if rng.random() < 0.5:
        half = float(rng.uniform(0.03, 0.15))
        rest = 0.5 - half
        times = [t for t in times if abs(t - 0.5) > half] + [rest, 0.5 + half]
    times.sort()
    still = np.array([float(t != rest) for t in times])[:, None]
    rotations = still * rng.normal(0, 4.0 * factor / math.sqrt(3), (len(times), 3))
    translations = still * rng.normal(0, 3.0 * factor / math.sqrt(3), (len(times), 3))
    return Motion(
        int(rng.choice(3, p=[0.4, 0.4, 0.2])), tuple(times), _tuples(rotations.tolist()), _tuples(translations.tolist())
    )


def draw(rng: Generator, ranges: Ranges, shape: tuple[int, int, int], artefacts: tuple[str, ...]) -> Corruption:
    """Draw the named artefacts for a volume of this shape.

    Args:
        rng: NumPy generator; all randomness of the record comes from it.
        ranges: `PAPER` or `PRODUCT`.
        shape: of the volume that will be corrupted.
        artefacts: names from `daemon.words.ARTEFACTS`.
    """
    wrap = draw_wrap(rng, ranges) if "wrap" in artefacts else Corruption()
    return Corruption(
        noise=draw_noise(rng, ranges) if "noise" in artefacts else None,
        spike=draw_spike(rng, ranges, shape) if "spike" in artefacts else None,
        blur=draw_blur(rng, ranges) if "blur" in artefacts else None,
        mask=wrap.mask,
        fold=wrap.fold,
        motion=draw_motion(rng, ranges) if "motion" in artefacts else None,
    )
