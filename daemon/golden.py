"""The golden case: a small volume inside the model file whose scores every engine must reproduce.

Stored as base64 of zlib of a JSON line (shape, affine, intensity step) followed by one byte per voxel.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass

import numpy as np

from daemon.card import MAX_GOLDEN_BYTES, CardError, Golden
from daemon.words import Volume

MAX_GOLDEN_VOXELS = 8_000_000
ABSOLUTE_FLOOR = 1e-6
"""Scores below this are compared absolutely: a relative difference of nothing means nothing."""


def encode_volume(volume: Volume) -> str:
    """Pack a volume, rounded to 255 steps between 0 and its maximum.

    Raises:
        ValueError: it packs to more than `MAX_GOLDEN_BYTES`.
    """
    step = float(volume.voxels.max()) / 255.0 or 1.0
    codes = np.clip(np.rint(volume.voxels / step), 0, 255).astype(np.uint8)
    header = {
        "shape": list(codes.shape),
        "affine": np.asarray(volume.affine).tolist(),
        "step": step,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(header).encode() + b"\n" + codes.tobytes(), 9)).decode()
    if len(packed) > MAX_GOLDEN_BYTES:
        raise ValueError(f"golden case: {len(packed)} bytes packed, at most {MAX_GOLDEN_BYTES}; use a smaller volume")
    return packed


def decode_volume(packed: str) -> Volume:
    """Unpack what `encode_volume` packed.

    Raises:
        CardError: it is not that.
    """
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(packed, validate=True), MAX_GOLDEN_VOXELS + 4096)
        head, _, body = raw.partition(b"\n")
        header = json.loads(head)
        codes = np.frombuffer(body, dtype=np.uint8).reshape(header["shape"])
        affine = np.asarray(header["affine"], dtype=np.float64).reshape(4, 4)
        return Volume(codes.astype(np.float32) * np.float32(header["step"]), affine)
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise CardError(f"golden case: cannot be unpacked ({error}); export the model again") from None


def golden_sha256(packed: str) -> str:
    """Hash of the packed case."""
    return hashlib.sha256(packed.encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """One score of the golden case that came out differently.

    Attributes:
        name: of the score.
        expected, got: its values.
        relative: difference over the expected value.
    """

    name: str
    expected: float
    got: float
    relative: float


def largest_difference(golden: Golden, scores: dict[str, float]) -> Difference:
    """The score that differs most; a score that is missing differs by infinity."""
    found = []
    for name, expected in golden.scores.items():
        got = scores.get(name, float("inf"))
        found.append(
            Difference(
                name,
                expected,
                got,
                abs(got - expected) / max(abs(expected), ABSOLUTE_FLOOR),
            )
        )
    return max(found, key=lambda d: d.relative)
