"""Where heads come from: label maps -> synthetic T1 heads with exactly known grey matter.

A head is drawn in two parts. `draw_head` fixes every number in a record; `synthesise` turns labels and record into a
clean magnitude volume at its native spacing, a grey and a white matter mask at 1 mm, and their affines.
"""

from __future__ import annotations

import io
import lzma
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from daemon.prepare import overlap_weights
from daemon.words import Volume

GREY_IDS = (3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54, 26, 58, 28, 60)
"""FreeSurfer ids of grey matter: cerebral and cerebellar cortex and the deep nuclei."""

WHITE_IDS = (2, 41, 7, 46)
CSF_IDS = (4, 5, 14, 15, 24, 43, 44, 72)

# Mean T1 intensity of a tissue, its spread between heads, and the spread inside one head (WM = 1.0). From the T1 priors
# of the SynthSeg label maps (Apache-2.0), rounded. Label ids that no row names count as other soft tissue.
TISSUES: dict[str, tuple[tuple[int, ...], float, float, float]] = {
    "air": ((0,), 0.0, 0.0, 0.0),
    "csf": ((4, 5, 14, 15, 24, 43, 44, 72), 0.28, 0.07, 0.06),
    "white": ((2, 41, 85), 1.0, 0.06, 0.04),
    "cortex": ((3, 42, 11, 50, 17, 53, 18, 54, 26, 58), 0.62, 0.055, 0.045),
    "cerebellar_white": ((7, 46), 0.92, 0.07, 0.04),
    "cerebellar_cortex": ((8, 47), 0.58, 0.06, 0.05),
    "thalamus": ((10, 49), 0.80, 0.06, 0.04),
    "putamen": ((12, 51), 0.74, 0.055, 0.04),
    "pallidum": ((13, 52), 0.92, 0.06, 0.04),
    "brainstem": ((16,), 0.86, 0.07, 0.05),
    "ventral_dc": ((28, 60), 0.86, 0.06, 0.04),
    "lesion": ((25, 57), 0.70, 0.09, 0.08),
    "vessel": ((30, 62), 0.52, 0.12, 0.08),
    "choroid": ((136, 137, 163, 164), 0.45, 0.12, 0.08),
    "soft": ((502,), 0.79, 0.30, 0.15),
    "bone": ((506,), 0.12, 0.08, 0.04),
    "eye": ((507,), 0.45, 0.20, 0.06),
    "fat": ((508,), 0.90, 0.35, 0.10),
    "muscle": ((509,), 0.45, 0.15, 0.07),
    "mucosa": ((511,), 0.70, 0.35, 0.10),
    "skin": ((512,), 0.55, 0.25, 0.10),
    "cavity": ((514,), 0.30, 0.15, 0.08),
    "hollow": ((515,), 0.18, 0.12, 0.06),
    "marrow": ((516,), 0.60, 0.30, 0.15),
    "scalp": ((530,), 0.95, 0.35, 0.10),
}


@dataclass(frozen=True)
class Subject:
    """One label map: (I, J, K) uint8 of tissue rows (see `CODES`), 1 mm, RAS+, plus masks derived from ids.

    Attributes:
        name: stable name; splits are by it.
        codes: (I, J, K) uint8, index into `CODES`.
    """

    name: str
    codes: NDArray[np.uint8]


CODES: tuple[int, ...] = tuple(sorted({i for ids, *_ in TISSUES.values() for i in ids}))
"""Label ids in the order of the packed codes: code = index."""


def pack(folder: Path, out: Path) -> int:
    """Pack a folder of label maps (NIfTI, FreeSurfer ids) into one small file that needs no nibabel to read.

    Returns:
        How many maps were packed.

    Raises:
        ValueError: a file that cannot be read or is no 3-D map of whole numbers; the message names it.
    """
    import nibabel

    files = sorted(folder.glob("*.nii.gz"))
    if not files:
        raise ValueError(f"{folder}: no *.nii.gz label map found; give the folder that holds them")
    packed = {}
    for file in files:
        try:
            image: Any = nibabel.as_closest_canonical(nibabel.load(file))  # type: ignore[no-untyped-call]
            labels = np.asarray(image.dataobj)
        except Exception as error:
            raise ValueError(f"{file.name}: cannot be read as NIfTI ({error})") from error
        packed[file.name.removesuffix(".nii.gz")] = encode_labels(labels, file.name)
    save_packed(packed, out)
    return len(packed)


def encode_labels(labels: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Label ids -> codes, cropped to the head with a margin of 4 voxels; unknown ids become other soft tissue."""
    if labels.ndim != 3 or not np.all(np.isfinite(labels)):
        raise ValueError(f"{name}: expected a 3-D map of whole numbers, got shape {labels.shape}")
    labels = labels.astype(np.int64)
    table = np.full(max(int(labels.max()), *CODES) + 1, CODES.index(502), dtype=np.uint8)
    table[list(CODES)] = np.arange(len(CODES), dtype=np.uint8)
    codes = table[labels]
    where = np.argwhere(codes > 0)
    low, high = np.maximum(where.min(0) - 4, 0), where.max(0) + 5
    return np.ascontiguousarray(codes[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])


def save_packed(maps: dict[str, NDArray[np.uint8]], out: Path) -> None:
    """Write named uint8 maps into one LZMA-compressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **maps)  # type: ignore[arg-type]
    out.write_bytes(lzma.compress(buffer.getvalue(), preset=6))


def load_packed(path: Path) -> list[Subject]:
    """Read what `pack` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as archive:
            return [Subject(name, archive[name]) for name in sorted(archive.files)]
    except (lzma.LZMAError, OSError, ValueError) as error:
        raise ValueError(
            f"{path.name}: not a packed anatomy file ({error}); make one with rescan-train pack"
        ) from error


@dataclass(frozen=True)
class HeadDraw:
    """Every number of one synthetic head; the same draw and subject give the same head.

    Attributes:
        seed: of the fields (deformation, texture, bias, noise).
        rotation_deg: about the R, A, S axes.  scale: per axis.
        bend_mm: standard deviation of the smooth deformation.
        means: mean intensity per tissue row.  spreads: spread inside the head per tissue row.
        spacing_mm: native voxel size.  fov_mm: field of view.  above_vertex_mm: air above the head.
        psf_mm: standard deviation of the point spread.  bias: strength of the bias field (log units).
        noise: standard deviation of the receiver's noise per channel, WM = 1.
        masked_air: background set to zero, as some scanners do.
    """

    seed: int
    rotation_deg: tuple[float, float, float]
    scale: tuple[float, float, float]
    bend_mm: float
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    spacing_mm: tuple[float, float, float]
    fov_mm: tuple[float, float, float]
    above_vertex_mm: float
    psf_mm: float
    bias: float
    noise: float
    masked_air: bool


@dataclass(frozen=True)
class Head:
    """A head: the clean volume at native spacing, its tissue masks, and the draw if it is a synthetic one."""

    clean: Volume
    grey: Volume
    white: Volume
    draw: HeadDraw | None


def draw_head(rng: Generator, free_contrast: float = 0.05) -> HeadDraw:
    """Draw a head around T1 priors; a share `free_contrast` gets freely drawn brain intensities."""
    rows = list(TISSUES.values())
    wide = float(rng.uniform(0.5, 1.5))
    means = [max(0.0, m + s * wide * float(rng.normal())) for _, m, s, _ in rows]
    if rng.random() < free_contrast:
        means = [0.0] + [float(rng.uniform(0.1, 1.2)) for _ in rows[1:]]
    spreads = [s * float(rng.uniform(0.2, 1.0)) for _, _, _, s in rows]
    spacing = draw_spacing(rng)
    coarse = max(spacing)
    return HeadDraw(
        seed=int(rng.integers(2**31)),
        rotation_deg=_three(rng.normal(0, 6.0, 3)),
        scale=_three(rng.uniform(0.9, 1.1, 3) * rng.uniform(0.94, 1.06)),
        bend_mm=float(rng.uniform(0.5, 3.0)),
        means=tuple(means),
        spreads=tuple(spreads),
        spacing_mm=spacing,
        fov_mm=(float(rng.uniform(160, 200)), float(rng.uniform(215, 256)), float(rng.uniform(175, 250))),
        above_vertex_mm=float(rng.uniform(4, 25)),
        psf_mm=float(rng.uniform(0.25, 0.6)) if coarse < 1.6 else 0.4,
        bias=float(rng.uniform(0.0, 0.3)),
        noise=float(math.exp(rng.uniform(math.log(0.004), math.log(0.05)))),
        masked_air=bool(rng.random() < 0.25),
    )


def draw_spacing(rng: Generator) -> tuple[float, float, float]:
    """Native voxel sizes as sites use them: mostly 1 mm, sometimes finer, with thicker partitions, or 2 mm."""
    kind = rng.random()
    if kind < 0.45:
        return (1.0, 1.0, 1.0)
    if kind < 0.60:
        s = float(rng.uniform(0.85, 1.2))
        return (s, s, s)
    if kind < 0.75:
        spacing = [float(rng.uniform(0.9, 1.1))] * 3
        spacing[int(rng.integers(3))] = float(rng.uniform(1.2, 2.0))
        return (spacing[0], spacing[1], spacing[2])
    if kind < 0.85:
        s = float(rng.uniform(1.4, 1.8))
        return (s, s, s)
    return (2.0, 2.0, 2.0)


def _three(values: Any) -> tuple[float, float, float]:
    return (float(values[0]), float(values[1]), float(values[2]))


def synthesise(subject: Subject, draw: HeadDraw) -> Head:
    """Make the head of one draw.

    Returns:
        `clean`: float32 magnitude, WM about 1.0 before the bias field, at `draw.spacing_mm`;
        `grey` and `white`: float32, 0 or 1, at 1 mm on the same field of view.
    """
    generator = torch.Generator().manual_seed(draw.seed)
    codes, affine = _warp(subject, draw, generator)
    image = _paint(codes, draw, generator)
    image = _gaussian_blur(image, draw.psf_mm) * _bias_field(image.shape, draw.bias, generator)
    image = _to_spacing(image, draw.spacing_mm)
    image = _receiver_noise(image, draw, generator)
    native = affine.copy()
    native[:3, :3] = np.diag(draw.spacing_mm)
    native[:3, 3] = affine[:3, 3] - 0.5 + 0.5 * np.asarray(draw.spacing_mm)
    grey = torch.isin(codes, torch.tensor([CODES.index(i) for i in GREY_IDS], dtype=torch.uint8))
    white = torch.isin(codes, torch.tensor([CODES.index(i) for i in WHITE_IDS], dtype=torch.uint8))
    return Head(
        clean=Volume(image.numpy(), native),
        grey=Volume(grey.float().numpy(), affine),
        white=Volume(white.float().numpy(), affine),
        draw=draw,
    )


def _warp(subject: Subject, draw: HeadDraw, generator: torch.Generator) -> tuple[Tensor, NDArray[np.float64]]:
    """Labels on a 1 mm grid of the drawn field of view after affine and smooth deformation; nearest neighbour."""
    shape = tuple(round(f) for f in draw.fov_mm)
    size = np.array(subject.codes.shape, dtype=float)
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2.0 for n in shape]
    # The field of view hangs on the vertex, which lies 4 voxels (the packing margin) below the top of the map.
    vertex = (size[2] / 2.0 - 4.0) * draw.scale[2]
    axes[2] = axes[2] + (vertex + draw.above_vertex_mm - draw.fov_mm[2] / 2.0)
    inverse = np.linalg.inv(_rotation(draw.rotation_deg) @ np.diag(draw.scale))
    m = torch.tensor(inverse, dtype=torch.float32)
    bend = _smooth_field((3, *shape), 32.0, generator) * draw.bend_mm
    grid = torch.empty(*shape, 3)
    for a in range(3):  # position in the label map along axis a, scaled to [-1, 1]
        p = m[a, 0] * axes[0][:, None, None] + m[a, 1] * axes[1][None, :, None] + m[a, 2] * axes[2][None, None, :]
        grid[..., 2 - a] = (p + bend[a]) * (2.0 / size[a])
    source = torch.from_numpy(subject.codes).float()[None, None]
    warped = F.grid_sample(source, grid[None], mode="nearest", padding_mode="zeros", align_corners=False)[0, 0]
    affine = np.eye(4)
    affine[:3, 3] = [float(a[0]) for a in axes]
    return warped.round().to(torch.uint8), affine


def _rotation(degrees: tuple[float, float, float]) -> NDArray[np.float64]:
    x, y, z = (math.radians(d) for d in degrees)
    rx = np.array([[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]])
    ry = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    rz = np.array([[math.cos(z), -math.sin(z), 0], [math.sin(z), math.cos(z), 0], [0, 0, 1]])
    out: NDArray[np.float64] = rz @ ry @ rx
    return out


def _smooth_field(shape: tuple[int, ...], scale_mm: float, generator: torch.Generator) -> Tensor:
    """Standard normal field that varies over about `scale_mm` (voxels of 1 mm), shape (C, I, J, K)."""
    coarse = [max(3, round(n / scale_mm) + 2) for n in shape[1:]]
    knots = torch.randn((1, shape[0], *coarse), generator=generator)
    return F.interpolate(knots, size=shape[1:], mode="trilinear", align_corners=True)[0]


def _paint(codes: Tensor, draw: HeadDraw, generator: torch.Generator) -> Tensor:
    """Intensity of each voxel: the tissue's mean plus fine and patchy texture."""
    mean, spread = torch.zeros(len(CODES)), torch.zeros(len(CODES))
    for row, (ids, *_) in enumerate(TISSUES.values()):
        for i in ids:
            mean[CODES.index(i)], spread[CODES.index(i)] = draw.means[row], draw.spreads[row]
    index = codes.long()
    shape = tuple(codes.shape)
    patchy = _smooth_field((1, *shape), 6.0, generator)[0]
    fine = torch.randn(shape, generator=generator)
    return (mean[index] + spread[index] * (0.6 * patchy + 0.8 * fine)).clamp_min(0.0)


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian, sigma in voxels, edges replicated."""
    radius = max(1, math.ceil(3.0 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma) ** 2)
    line = line / line.sum()
    x = image[None, None]
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = -1
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        x = F.conv3d(F.pad(x, pad, mode="replicate"), line.reshape(1, 1, *shape))
    return x[0, 0]


def _bias_field(shape: torch.Size, strength: float, generator: torch.Generator) -> Tensor:
    """Smooth multiplicative field exp(strength * g), g varying over about 100 mm (A9)."""
    return torch.exp(strength * _smooth_field((1, *shape), 100.0, generator)[0])


def _to_spacing(image: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Average 1 mm voxels into native voxels; the field of view starts at the same outer edge."""
    for axis, spacing in enumerate(spacing_mm):
        if spacing != 1.0:
            n = image.shape[axis]
            cells = math.floor(n / spacing)
            weights = torch.from_numpy(overlap_weights(0.0, 1.0, n, 0.0, cells, spacing))
            image = torch.movedim(torch.tensordot(weights, image, dims=([1], [axis])), 0, axis)
    return image.contiguous()


def _receiver_noise(image: Tensor, draw: HeadDraw, generator: torch.Generator) -> Tensor:
    """Rician noise of a clean scan; optionally the background masked to zero."""
    # Larger voxels carry proportionally more signal; the draw is for 1 mm^3, floored so that 2 mm scans show noise too.
    sigma = draw.noise / math.sqrt(max(1.0, math.prod(draw.spacing_mm) / 2.0))
    real = image + sigma * torch.randn(image.shape, generator=generator)
    noisy = torch.sqrt(real**2 + (sigma * torch.randn(image.shape, generator=generator)) ** 2)
    return torch.where(image < 0.02, torch.zeros(()), noisy) if draw.masked_air else noisy


@dataclass(frozen=True)
class RealScan:
    """A real T1 with its label map (FreeSurfer ids), NIfTI or MGZ, on the same grid.

    Attributes:
        name: stable name; splits are by it.
        image, labels: the two files.
    """

    name: str
    image: Path
    labels: Path


def read_real(scan: RealScan) -> Head:
    """Read a real scan.

    Raises:
        ValueError: unreadable, another shape, or voxels that are not numbers; the message names the file.
    """
    import nibabel

    arrays = []
    for file in (scan.image, scan.labels):
        try:
            loaded: Any = nibabel.load(file)
            arrays.append((np.asarray(loaded.dataobj, dtype=np.float32), np.asarray(loaded.affine, dtype=np.float64)))
        except Exception as error:
            raise ValueError(f"{file.name}: cannot be read as NIfTI or MGZ ({error})") from error
    (image, affine), (labels, label_affine) = arrays
    if image.ndim != 3 or image.shape != labels.shape or not np.allclose(affine, label_affine, atol=1e-3):
        raise ValueError(f"{scan.labels.name}: shape {labels.shape} or position differs from the scan's {image.shape}")
    if not np.all(np.isfinite(image)):
        bad = int((~np.isfinite(image)).sum())
        raise ValueError(f"{scan.image.name}: {bad} voxels are not numbers; mend or leave out the scan")
    ids = labels.astype(np.int64)
    # FreeSurfer's aparc ids 1000 to 2999 are parcels of the cerebral cortex.
    grey = np.isin(ids, GREY_IDS) | ((ids >= 1000) & (ids < 3000))
    return Head(Volume(image, affine), _mask(grey, affine), _mask(np.isin(ids, WHITE_IDS), affine), None)


def _mask(values: NDArray[np.bool_], affine: NDArray[np.float64]) -> Volume:
    return Volume(values.astype(np.float32), affine)


Source = Subject | RealScan


def make_head(source: Source, rng: Generator, free_contrast: float) -> Head:
    """A head from any source: drawn and synthesised from a label map, or read."""
    if isinstance(source, RealScan):
        return read_real(source)
    return synthesise(source, draw_head(rng, free_contrast))


def load_subjects(data: str) -> list[Source]:
    """Read what `--data` names.

    Args:
        data: `builtin` (the MNI152 head of the `demo` extra), a packed file, a folder of label maps, or a CSV manifest
            with the columns name, image, labels (paths relative to it).

    Raises:
        ValueError: none of these, or a file in it that is missing; the message names it.
    """
    if data == "builtin":
        return builtin_subjects()
    path = Path(data)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ValueError(f"--data {data}: no such file or folder")
    return _load_manifest(path) if path.suffix == ".csv" else list(load_packed(path))


def _load_folder(folder: Path) -> list[Source]:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "labels.xz"
        pack(folder, packed)
        return list(load_packed(packed))


def _load_manifest(path: Path) -> list[Source]:
    import csv

    with path.open(newline="") as table:
        rows = list(csv.DictReader(table))
    scans: list[Source] = []
    for number, row in enumerate(rows, start=2):
        if not {"name", "image", "labels"} <= row.keys():
            raise ValueError(f"{path.name}: expected the columns name, image, labels, got {', '.join(row)}")
        scan = RealScan(row["name"], path.parent / row["image"], path.parent / row["labels"])
        for file in (scan.image, scan.labels):
            if not file.is_file():
                raise ValueError(f"{path.name} line {number}: {file.name} is missing")
        scans.append(scan)
    if not scans:
        raise ValueError(f"{path.name}: lists no scan")
    return scans


BUILTIN_HEADS = 5
"""How many heads are made from the template: enough for a split into four."""


def builtin_subjects() -> list[Source]:
    """Heads that need no data: label maps drawn from the MNI152 template (see `daemon.demo.anatomy`).

    Raises:
        ValueError: the template's package is not installed.
    """
    from daemon.demo.anatomy import AnatomyMissing, Stream, draw_head, head_seed

    try:
        heads = [draw_head(head_seed(Stream.TRAINING, i)) for i in range(BUILTIN_HEADS)]
    except AnatomyMissing as error:
        raise ValueError(f"--data builtin: {error}") from error
    return [Subject(f"mni152_{i}", encode_labels(head.labels, "mni152")) for i, head in enumerate(heads)]
