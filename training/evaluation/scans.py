"""Evaluation scans on disk: made once, prepared as they are served, read by every network that is evaluated.

A scan is one `.npz` (what the network sees, the masks, the labels) and one `.json` (what it is). The JSON is written last,
so a scan is there whole or not at all, and a run that was cut off continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.prepare import SPACING_MM, Box, Prepared, prepare, resample_to_box
from daemon.words import Array, Refusal, Volume

CLEAN = "clean"
VOXEL_ML = SPACING_MM**3 / 1000.0


@dataclass(frozen=True)
class Facts:
    """What a scan is.

    Attributes:
        group: the set it belongs to: `simulated`, `calibration`, `independent`, `real`, `ladder`, `clean`, `refusal`.
        name: unique in its set.
        anatomy: label map or person; intervals resample these first.
        head: one drawn head of an anatomy, or the person again; its clean scan has the name `<head>-clean`.
        artefact: `clean` or a name from `ARTEFACTS`; for the refusal set what the image is.
        kind: which process made it, e.g. `fold` or `lines` for `wrap`.
        level: 1 is the weakest; 0 for clean scans.
        strength: in the unit of the kind (see `severities.json`); 0.0 for clean scans.
        simulator: `own` (training.kspace), `independent` or `none`.
        record: replays the artefact.
        refused: reason code with which preparation refused the volume; empty where it did not.
        expected: for the refusal set: the verdicts allowed.
        gm_ml: volume of the reference's grey matter inside the acquired part of the box; 0.0 without a reference.
    """

    group: str
    name: str
    anatomy: str
    head: str
    artefact: str
    kind: str
    level: int
    strength: float
    simulator: str
    record: dict[str, Any]
    refused: str = ""
    expected: tuple[str, ...] = ()
    gm_ml: float = 0.0


@dataclass(frozen=True)
class Stored:
    """A scan as networks see it.

    Attributes:
        facts: what it is.
        prepared: input and masks.
        grey: (D, H, W) uint8, share of grey matter per cell in 1/255; None without a reference.
        white: (D, H, W) bool; None without a reference.
    """

    facts: Facts
    prepared: Prepared
    grey: NDArray[np.uint8] | None
    white: NDArray[np.bool_] | None

    def truth(self) -> NDArray[np.bool_]:
        """Reference grey matter inside the acquired field of view.

        Raises:
            ValueError: the scan has no reference.
        """
        if self.grey is None:
            raise ValueError(f"{self.facts.name}: this scan has no reference labels")
        truth: NDArray[np.bool_] = (self.grey > 127) & self.prepared.native_mask
        return truth

    def share(self) -> Array | None:
        """Share of grey matter per cell in [0, 1], None without a reference."""
        return None if self.grey is None else self.grey.astype(np.float32) / np.float32(255.0)


def exists(root: Path, group: str, name: str) -> bool:
    """Whether a scan is whole on disk."""
    return (root / group / f"{name}.json").exists()


def store(root: Path, facts: Facts, volume: Volume, grey: Volume | None, white: Volume | None) -> Facts:
    """Prepare a volume as the daemon does and write it; a refusal is a fact worth keeping, not an error.

    Returns:
        The facts with `refused` and `gm_ml` filled in.
    """
    folder = root / facts.group
    folder.mkdir(parents=True, exist_ok=True)
    try:
        prepared = prepare(volume)
    except Refusal as refusal:
        facts = _replace(facts, refused=refusal.reason.code)
    else:
        facts = _write(folder, facts, prepared, grey, white)
    part = folder / f"{facts.name}.part"
    part.write_text(json.dumps(asdict(facts)))
    part.replace(folder / f"{facts.name}.json")
    return facts


def _write(folder: Path, facts: Facts, prepared: Prepared, grey: Volume | None, white: Volume | None) -> Facts:
    arrays: dict[str, Any] = {
        "image": prepared.image.astype(np.float16),
        "native": np.packbits(prepared.native_mask),
        "head": np.packbits(prepared.head_mask),
        "affine": prepared.affine,
        "start_mm": np.array(prepared.box.start_mm),
        "scale": np.array(prepared.scale),
    }
    if grey is not None:
        share = np.clip(resample_to_box(grey, prepared.box), 0.0, 1.0)
        facts = _replace(facts, gm_ml=float(share[prepared.native_mask].sum(dtype=np.float64)) * VOXEL_ML)
        arrays["grey"] = np.round(share * 255.0).astype(np.uint8)
    if white is not None:
        arrays["white"] = np.packbits(resample_to_box(white, prepared.box) > 0.5)
    with (folder / f"{facts.name}.npz").open("wb") as file:
        np.savez(file, **arrays)
    return facts


def _replace(facts: Facts, **changes: Any) -> Facts:
    return Facts(**{**asdict(facts), **changes})


def read(root: Path, facts: Facts) -> Stored:
    """Read one scan.

    Raises:
        ValueError: it was refused by preparation, so there is nothing to read.
    """
    if facts.refused:
        raise ValueError(f"{facts.name}: preparation refused this scan ({facts.refused})")
    with np.load(root / facts.group / f"{facts.name}.npz") as data:
        image = data["image"].astype(np.float32)
        start = data["start_mm"]
        prepared = Prepared(
            image=image,
            native_mask=_bits(data["native"], image.shape),
            head_mask=_bits(data["head"], image.shape),
            affine=data["affine"],
            box=Box((float(start[0]), float(start[1]), float(start[2])), image.shape),
            scale=float(data["scale"]),
        )
        grey = data["grey"] if "grey" in data.files else None
        white = _bits(data["white"], image.shape) if "white" in data.files else None
    return Stored(facts, prepared, grey, white)


def _bits(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    count = int(np.prod(shape))
    return np.unpackbits(packed, count=count).astype(bool).reshape(shape)


def listed(root: Path, group: str) -> Iterator[Facts]:
    """The scans of a set that are on disk, in order of their names."""
    for path in sorted((root / group).glob("*.json")):
        raw = json.loads(path.read_text())
        yield Facts(**{**raw, "expected": tuple(raw.get("expected", ()))})
