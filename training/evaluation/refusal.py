"""Images that must be refused from the image alone, and heads that must be judged.

Every header is gone (DICOM files are read as bare stacks). The made images come from the test subjects: other contrasts,
parts of heads, geometric bodies, noise.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from daemon.words import Volume
from training.anatomy import TISSUES, HeadDraw, Subject, draw_head, synthesise
from training.evaluation.blank import read_stacks
from training.evaluation.plan import STREAMS, Anatomy, drawn_heads
from training.evaluation.real import read_nifti
from training.evaluation.scans import Facts, exists, store

REFUSE = ("CANNOT_JUDGE",)
JUDGE = ("PASS", "REVIEW")
BAD = ("RESCAN",)

# Mean intensity per tissue of contrasts that are not T1, white matter first; what is not named takes `soft`.
CONTRASTS: dict[str, dict[str, float]] = {
    "t2": {"white": 0.35, "cortex": 0.55, "csf": 1.0, "fat": 0.6, "scalp": 0.6, "muscle": 0.25, "soft": 0.45},
    "flair": {"white": 0.55, "cortex": 0.75, "csf": 0.08, "fat": 0.7, "scalp": 0.7, "muscle": 0.4, "soft": 0.6},
    "pd": {"white": 0.7, "cortex": 0.85, "csf": 0.95, "fat": 0.9, "scalp": 0.9, "muscle": 0.6, "soft": 0.75},
    "inverted": {"white": 0.3, "cortex": 0.65, "csf": 1.0, "fat": 0.2, "scalp": 0.2, "muscle": 0.7, "soft": 0.4},
}
_LIKE = {
    "cerebellar_white": "white",
    "brainstem": "white",
    "ventral_dc": "white",
    "pallidum": "white",
    "cerebellar_cortex": "cortex",
    "thalamus": "cortex",
    "putamen": "cortex",
    "lesion": "csf",
    "choroid": "csf",
    "marrow": "fat",
}
_DARK = {"air": 0.0, "bone": 0.08, "cavity": 0.1, "hollow": 0.05}


@dataclass(frozen=True)
class Item:
    """One image with the verdicts allowed for it."""

    name: str
    kind: str
    expected: tuple[str, ...]
    volume: Callable[[], Volume]


def make_refusal(root: Path, group: str, subjects: list[Any], shared: Path | None, seed: int, draws: int) -> int:
    """Make the images that are missing.

    Args:
        root: folder of the scans.
        group: `refusal` (test subjects, public files) or `negatives` (calibration subjects, for the gates).
        subjects: whose heads are painted in other contrasts.
        shared: public files; None leaves them out.
        seed: of every draw; the two sets must differ in it.
        draws: of each kind and subject.

    Returns:
        How many were made.
    """
    made = 0
    items = [*made_items(subjects, seed, draws)]
    if shared is not None:
        items += [*public_items(shared)]
    for item in items:
        if not exists(root, group, item.name):
            facts = Facts(group, item.name, item.name, item.name, item.kind, item.kind, 0, 0.0, "none", {})
            store(root, replace(facts, expected=item.expected), item.volume(), None, None)
            made += 1
    return made


def public_items(shared: Path) -> Iterator[Item]:
    """The public files, bare; a folder that is not there is left out."""
    dicom = shared / "dicom"
    folders = {
        "ge_mprage_grid_phantom": REFUSE,
        "acr_ge": REFUSE,
        "acr_siemens": REFUSE,
        "philips_1901": REFUSE,
        "philips_2001": REFUSE,
        "siemens_2d_t1_hfs": REFUSE,
        "siemens_2d_t1_hfp": REFUSE,
        "transfer_syntaxes": REFUSE,
        "philips_mprage": JUDGE,
        "siemens_xa30_enhanced_a": JUDGE,
        "siemens_xa30_enhanced_b": JUDGE,
    }
    for name, expected in folders.items():
        if (dicom / name).is_dir():
            kind = "whole head" if expected == JUDGE else name
            yield Item(name, kind, expected, partial(_largest, dicom / name))
    packed = dicom / "derived_t1_defaced_0p7mm.tar.gz"
    if packed.exists():
        yield Item("derived_t1_defaced", "whole head", JUDGE, partial(_unpacked, packed))
    bare = shared / "t1_skullstripped_gm_probability" / "T1.nii.gz"
    if bare.exists():
        yield Item("skullstripped", "skullstripped", ("CANNOT_JUDGE", "REVIEW"), partial(read_nifti, bare))


def _largest(folder: Path) -> Volume:
    return read_stacks(folder)[0]


def _unpacked(packed: Path) -> Volume:
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(packed) as archive:
        archive.extractall(scratch, filter="data")
        return _largest(Path(scratch))


def made_items(subjects: list[Any], seed: int, draws: int = 1) -> Iterator[Item]:
    """Made images; one generator per image, so any of them can be made alone."""
    for i, subject in enumerate(s for s in subjects if isinstance(s, Subject)):
        for d in range(draws):
            for k, contrast in enumerate((*CONTRASTS, "epi")):
                words = (seed, STREAMS["refusal"], i, d, k)
                yield Item(f"{contrast}-{i}-{d}", contrast, REFUSE, _maker(subject, words, contrast))
    for i, _, _, maker in drawn_heads(subjects, "refusal", 1, seed):
        for half in ("upper", "left"):
            yield Item(f"half-{half}-{i}", "half head", REFUSE, partial(_half, maker, half))
        allowed = REFUSE + BAD
        yield Item(f"drowned-{i}", "head in noise at -40 dB", allowed, partial(_drowned, maker, i))
    bodies: dict[str, Callable[[Generator], Volume]] = {
        "sphere": sphere,
        "box": box_body,
        "cylinder": cylinder,
        "pure noise": noise,
    }
    for i in range(max(3, draws)):
        for k, (kind, body) in enumerate(bodies.items()):
            rng = np.random.default_rng((seed, STREAMS["refusal"], 50, i, k))
            yield Item(f"{kind.replace(' ', '-')}-{i}", kind, REFUSE, partial(body, rng))


def _maker(subject: Subject, words: tuple[int, ...], contrast: str) -> Callable[[], Volume]:
    if contrast == "epi":
        return partial(epi, subject, words)
    return partial(other_contrast, subject, words, contrast)


def contrast_draw(rng: Generator, contrast: str) -> HeadDraw:
    """A head's draw with the mean intensities of another contrast."""
    levels = CONTRASTS[contrast]
    draw = draw_head(rng, 0.0)
    means = []
    for name in TISSUES:
        level = _DARK.get(name, levels.get(_LIKE.get(name, name), levels["soft"]))
        means.append(max(0.0, level * float(rng.normal(1.0, 0.05))))
    return replace(draw, means=tuple(means))


def other_contrast(subject: Subject, words: tuple[int, ...], contrast: str) -> Volume:
    """A test head in a contrast that is not T1."""
    return synthesise(subject, contrast_draw(np.random.default_rng(words), contrast)).clean


def epi(subject: Subject, words: tuple[int, ...]) -> Volume:
    """Like a gradient-echo EPI: T2* contrast, 3 mm, no fat, the front of the head torn by susceptibility."""
    rng = np.random.default_rng(words)
    draw = contrast_draw(rng, "t2")
    rows = list(TISSUES)
    means = [0.05 if n in ("fat", "scalp", "marrow", "skin") else m for n, m in zip(rows, draw.means, strict=True)]
    clean = synthesise(subject, replace(draw, means=tuple(means), spacing_mm=(3.0, 3.0, 3.0))).clean
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in clean.voxels.shape), indexing="ij")
    hole = np.exp(-((x / 0.35) ** 2 + ((y - 0.6) / 0.3) ** 2 + ((z + 0.2) / 0.25) ** 2))
    return replace(clean, voxels=(clean.voxels * (1.0 - 0.95 * hole)).astype(np.float32))


def _half(maker: Callable[[], Anatomy], half: str) -> Volume:
    """The upper 90 mm below the top of the volume, or the left half (RAS+ axes)."""
    clean = maker().clean
    spacing = np.linalg.norm(clean.affine[:3, :3], axis=0)
    affine = clean.affine.copy()
    if half == "left":
        return Volume(np.ascontiguousarray(clean.voxels[: clean.voxels.shape[0] // 2]), affine)
    keep = round(90.0 / spacing[2])
    affine[:3, 3] += affine[:3, 2] * (clean.voxels.shape[2] - keep)
    return Volume(np.ascontiguousarray(clean.voxels[:, :, -keep:]), affine)


def _drowned(maker: Callable[[], Anatomy], number: int) -> Volume:
    """A head of which nothing is left: complex noise a hundred times stronger than it."""
    clean = maker().clean
    rng = np.random.default_rng((number, 40))
    sigma = 100.0 * float(np.sqrt(np.mean(clean.voxels**2)) / np.sqrt(2.0))
    real = clean.voxels + sigma * rng.standard_normal(clean.voxels.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(clean.voxels.shape, dtype=np.float32)
    return replace(clean, voxels=np.hypot(real, imaginary).astype(np.float32))


def _grid(rng: Generator) -> tuple[Any, Any, Any, Volume]:
    shape = tuple(int(n) for n in rng.integers(90, 120, 3))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    x, y, z = np.meshgrid(*(2.0 * (np.arange(n) - n / 2) for n in shape), indexing="ij")
    return x, y, z, Volume(np.zeros(shape, dtype=np.float32), affine)


def _body(inside: Any, volume: Volume, rng: Generator) -> Volume:
    image = inside * (1.0 + 0.02 * rng.standard_normal(inside.shape)) + 0.01 * np.abs(rng.standard_normal(inside.shape))
    return replace(volume, voxels=ndimage.gaussian_filter(image, 0.5).astype(np.float32))


def sphere(rng: Generator) -> Volume:
    """A ball of the size of a head."""
    x, y, z, volume = _grid(rng)
    return _body((x**2 + y**2 + z**2 < float(rng.uniform(75, 88)) ** 2).astype(float), volume, rng)


def box_body(rng: Generator) -> Volume:
    """A box of the size of a head."""
    x, y, z, volume = _grid(rng)
    inside = (np.abs(x) < rng.uniform(60, 75)) & (np.abs(y) < rng.uniform(70, 85)) & (np.abs(z) < rng.uniform(65, 80))
    return _body(inside.astype(float), volume, rng)


def cylinder(rng: Generator) -> Volume:
    """A bottle of the size of a head, a quality phantom's usual shape."""
    x, y, z, volume = _grid(rng)
    inside = (np.hypot(x, y) < rng.uniform(70, 85)) & (np.abs(z) < rng.uniform(65, 80))
    return _body(inside.astype(float), volume, rng)


def noise(rng: Generator) -> Volume:
    """Nothing but noise."""
    volume = _grid(rng)[3]
    real, imaginary = rng.standard_normal((2, *volume.voxels.shape))
    return replace(volume, voxels=np.hypot(real, imaginary).astype(np.float32))
