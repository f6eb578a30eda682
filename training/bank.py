"""A bank of prepared heads on disk: synthesis is slow, so it is done once, in the background, and read many times.

One *case* is one synthetic head: its clean image, two draws of each single artefact, two composites that share the
draws of the first set, and its tissue labels, all on one prepared grid. Cases are written atomically and named by their
number, so a bank can grow while training reads it, and a rerun continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daemon.prepare import INTENSITY_MAX, SPACING_MM, Box, prepare, resample_to_box, tissue_level
from daemon.words import ARTEFACTS, Array, Refusal, Volume
from training import kspace
from training.anatomy import Head, Source, make_head

IMAGES = ("clean", *(f"{a}_a" for a in ARTEFACTS), *(f"{a}_b" for a in ARTEFACTS), "composite_a", "composite_b")
"""The images of a case, in the order of its first axis."""

IN_BAND = ("motion",) * 4 + ("spike",) * 3 + ("restless",) * 5 + ("low spike",) * 4 + ("noise", "blur", "wrap") * 2
"""Artefacts drawn again on the prepared grid. At native resolution seven spikes in eight lie outside the band that 2 mm
keeps, and so do most moments at which the head moves: the network would see few of those that matter. Half of what is left
lies near the edge of the band, where a spike's stripes are as fine as noise; a low spike lies in its inner half."""

IN_BAND_RANGES = kspace.Ranges((-10.0, 25.0), (0.1, 10.0), True, (1.2, 6.0), (0.0, 0.0), 1.0, (0.3, 1.5))
"""The visible part of the product's ranges; without fold-over, which a grid cut to the head cannot show."""

OUTSIDE = -1.0
"""Marks cells outside the field of view in the stored images."""

GREY, WHITE = 1, 2
"""Bits of the stored labels."""


@dataclass(frozen=True)
class Case:
    """One head of the bank.

    Attributes:
        images: (n, D, H, W) float16, memory-mapped; `IMAGES`, then one for each of `IN_BAND`; `OUTSIDE` outside the field
            of view.
        labels: (D, H, W) uint8, bits `GREY` and `WHITE`.
        present: (n, 5) bool: which artefacts each image holds.
        folder: where it lies.
    """

    images: NDArray[np.float16]
    labels: NDArray[np.uint8]
    present: NDArray[np.bool_]
    folder: Path


def make_case(source: Source, seed: Sequence[int], ranges: kspace.Ranges, free_contrast: float) -> dict[str, Any]:
    """Synthesise one head and its artefacts.

    Args:
        source: a label map, or a real scan with labels.
        seed: of every draw, derived from identity (split, case number): the same seed gives the same case.
        ranges: severities.
        free_contrast: share of heads with freely drawn contrast.

    Returns:
        `images`, `labels`, `present` as in `Case`, and `record`, plain data that replays the case.

    Raises:
        Refusal: the drawn head does not fit preparation (a field of view that cuts the vertex, say).
    """
    rng = np.random.default_rng(seed)
    head = make_head(source, rng, free_contrast)
    shape = (head.clean.voxels.shape[0], head.clean.voxels.shape[1], head.clean.voxels.shape[2])
    box = _jitter(prepare(head.clean).box, head, rng)
    first = kspace.draw(rng, ranges, shape, ARTEFACTS)
    second = kspace.draw(rng, ranges, shape, ARTEFACTS)
    corruptions = [kspace.Corruption()]
    corruptions += [first.only(a) for a in ARTEFACTS] + [second.only(a) for a in ARTEFACTS]
    corruptions += [_composite(first, rng) for _ in range(2)]
    native = [prepared_image(head.clean, c, box) for c in corruptions]
    in_band, drawn = in_band_images(native[0], rng)
    corruptions += drawn
    labels = GREY * (resample_to_box(head.grey, box) > 0.5) + WHITE * (resample_to_box(head.white, box) > 0.5)
    record = {
        "subject": source.name,
        "seed": [int(s) for s in seed],
        "draw": asdict(head.draw) if head.draw else None,
        "box": asdict(box),
        "corruptions": [c.record() for c in corruptions],
    }
    present = np.array([c.present() for c in corruptions])
    images = np.stack([*native, *in_band])
    return {"images": images, "labels": labels.astype(np.uint8), "present": present, "record": record}


def corrupted_volume(clean: Volume, corruption: kspace.Corruption) -> Volume:
    """A clean volume with artefacts, as the scanner would store it: a fold-over leaves a smaller matrix."""
    spacing = np.linalg.norm(clean.affine[:3, :3], axis=0)
    image = torch.from_numpy(np.ascontiguousarray(clean.voxels))
    voxels = kspace.apply(image, corruption, (float(spacing[0]), float(spacing[1]), float(spacing[2]))).numpy()
    affine = clean.affine.copy()
    if corruption.fold is not None:
        axis = corruption.fold.axis
        low, high = kspace.fold_bounds(voxels.shape[axis], corruption.fold)
        voxels = np.take(voxels, range(low, high), axis=axis)
        affine[:3, 3] += affine[:3, axis] * low
    return Volume(np.ascontiguousarray(voxels), affine)


def prepared_image(clean: Volume, corruption: kspace.Corruption, box: Box) -> NDArray[np.float16]:
    """Corrupt at native resolution, prepare on the given box; (D, H, W) float16 with `OUTSIDE` marked."""
    prepared = prepare(corrupted_volume(clean, corruption), box)
    out: NDArray[np.float16] = np.where(prepared.native_mask, prepared.image, OUTSIDE).astype(np.float16)
    return out


def in_band_images(
    clean: NDArray[np.float16], rng: np.random.Generator
) -> tuple[list[NDArray[np.float16]], list[kspace.Corruption]]:
    """The artefacts of `IN_BAND`, drawn for and applied to a prepared image, as a scan of that resolution would have them.

    Args:
        clean: (D, H, W) prepared, `OUTSIDE` marked.
        rng: of the draws.
    """
    image, inside = to_input(clean)
    shape = (image.shape[0], image.shape[1], image.shape[2])
    images, corruptions = [], []
    for kind in IN_BAND:
        corruption = _in_band_draw(kind, rng, shape)
        voxels = kspace.apply(torch.from_numpy(image), corruption, (SPACING_MM,) * 3).numpy()
        level = tissue_level(voxels, inside)
        scaled = np.clip(voxels / level, 0.0, INTENSITY_MAX)
        images.append(np.where(inside, scaled, OUTSIDE).astype(np.float16))
        corruptions.append(corruption)
    return images, corruptions


def _in_band_draw(kind: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> kspace.Corruption:
    """One of the kinds of `IN_BAND`."""
    if kind == "restless":
        return kspace.Corruption(motion=kspace.draw_restless(rng, IN_BAND_RANGES))
    if kind == "low spike":
        inner = (shape[0] // 2, shape[1] // 2, shape[2] // 2)
        return kspace.Corruption(spike=kspace.draw_spike(rng, IN_BAND_RANGES, inner))
    return kspace.draw(rng, IN_BAND_RANGES, shape, (kind,))


def _composite(draws: kspace.Corruption, rng: np.random.Generator) -> kspace.Corruption:
    """Two or three of the artefacts of one draw together."""
    names = [ARTEFACTS[i] for i in rng.permutation(5)[: rng.integers(2, 4)]]
    out = kspace.Corruption()
    for name in names:
        only = draws.only(name)
        out = kspace.Corruption(**{k: getattr(only, k) or getattr(out, k) for k in vars(out)})
    return out


def _jitter(box: Box, head: Head, rng: np.random.Generator) -> Box:
    """Move the box by up to 6 mm: on a corrupted scan the head finder is off by as much."""
    spacing = np.linalg.norm(head.clean.affine[:3, :3], axis=0)
    start = [s + v * round(float(rng.uniform(-6, 6)) / v) for s, v in zip(box.start_mm, spacing, strict=True)]
    return Box((float(start[0]), float(start[1]), float(start[2])), box.shape)


def write_case(folder: Path, case: dict[str, Any]) -> None:
    """Write a case so that a reader never sees half of it."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    np.save(part / "images.npy", case["images"])
    np.save(part / "labels.npy", case["labels"])
    (part / "record.json").write_text(json.dumps({**case["record"], "present": case["present"].tolist()}))
    part.rename(folder)


def read_case(folder: Path) -> Case:
    """Open a case; images stay on disk until a crop of them is read.

    Raises:
        ValueError: the folder is no case; the message names it.
    """
    try:
        record = json.loads((folder / "record.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder.name}: not a case of a bank ({error}); delete it and run rescan-train bank again"
        ) from error
    return Case(images, labels, np.array(record["present"]), folder)


def list_cases(folder: Path) -> list[Path]:
    """Finished cases, in order of their number."""
    return sorted(p for p in folder.glob("case_*") if p.suffix != ".part" and p.is_dir())


def grow(
    folder: Path,
    subjects: Sequence[Source],
    cases: int,
    split: int,
    ranges: kspace.Ranges = kspace.PRODUCT,
    free_contrast: float = 0.05,
    start: int = 0,
    step: int = 1,
    progress: Any = iter,
) -> None:
    """Make the cases that are missing from a bank.

    Args:
        folder: of the bank.
        subjects: label maps of one split; case n uses subject n mod len(subjects).
        cases: how many the bank shall hold.
        split: number of the split, part of each case's seed: two splits never share a draw.
        ranges: severities.
        free_contrast: share of heads with freely drawn contrast.
        start: first case of this worker.
        step: workers beside each other make every step-th case.
        progress: wraps the iterable, for a progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in progress(range(start, cases, step)):
        target = folder / f"case_{number:05d}"
        attempt = 0
        while not target.exists():
            try:
                seed = (20261, split, number, attempt)
                write_case(target, make_case(subjects[number % len(subjects)], seed, ranges, free_contrast))
            except Refusal:
                attempt += 1  # a draw that preparation refuses is no sample; take the next


def to_input(stored: NDArray[np.float16]) -> tuple[Array, NDArray[np.bool_]]:
    """Stored image -> network input (outside becomes 0) and native mask."""
    image = np.asarray(stored, dtype=np.float32)
    return np.maximum(image, 0.0), image >= 0.0
