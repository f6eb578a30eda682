"""Damaged DICOM: how images are mutated, and what must hold of whatever becomes of them."""

from __future__ import annotations

import functools
import hashlib
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from daemon.dicom_write import Plan, part10
from daemon.header import Header, read_header
from daemon.rules import match_rule
from daemon.series import stacks_of
from daemon.spool import StoredInstance
from daemon.stack import Stack
from daemon.volume import build_volume
from daemon.words import Refusal, Volume
from tests.builders import build_classic_series, build_enhanced

SLICES = 10
SYNTAXES = tuple(
    map(str, (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless))
)
CASE_LIMIT_S = 60.0
"""No case may take so long, on the slowest machine; a hang would."""


class Hang(AssertionError):
    """A case ran into its limit."""


@functools.cache
def originals(syntax: str, enhanced: bool) -> tuple[bytes, ...]:
    """An undamaged series as files."""
    values = np.random.default_rng(4).integers(0, 3000, (64, 64, SLICES)).astype(np.uint16)
    plan = Plan(transfer_syntax_uid=syntax, slope=1.5)
    if enhanced:
        return (part10(build_enhanced(values, (2.5, 2.5, 2.5), plan=plan)),)
    return tuple(part10(ds) for ds in build_classic_series(values, (2.5, 2.5, 2.5), plan=plan))


@functools.cache
def _header(data: bytes) -> Header | Refusal:
    try:
        return read_header(data)
    except Refusal as refusal:
        return refusal


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage a file in one of the ways in which files are damaged, or attacked."""
    how = rng.randrange(9)
    at = rng.randrange(132, len(data))
    near = rng.randrange(132, min(len(data), 3000))
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + data[at + rng.randrange(1, 64) :]
    if how == 2:
        return data[:near] + rng.randbytes(rng.randrange(1, 32)) + data[near:]
    if how == 3:
        return _overwrite(data, near, b"\xff" * rng.choice((2, 4, 8)))
    if how == 4:
        return _overwrite(data, near, b"\x00" * rng.choice((2, 4, 8)))
    if how == 5:
        return _overwrite(
            data, near, rng.choice((b"nan", b"1e308", b"-1", b"9999999999", b"\\\\", b"../..", b"\xfe\xff\x00\xe0"))
        )
    if how == 6:
        return _overwrite(data, at, rng.randbytes(rng.randrange(1, 16)))
    if how == 7:
        return data + rng.randbytes(rng.randrange(1, 200))
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 40)):
        place = rng.randrange(132, len(data)) if rng.random() < 0.5 else rng.randrange(132, min(len(data), 3000))
        flipped[place] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _overwrite(data: bytes, at: int, what: bytes) -> bytes:
    return (data[:at] + what + data[at + len(what) :])[: len(data)]


def run_case(seed: int) -> list[str]:
    """Damage a series and follow it to its end.

    Args:
        seed: of everything.

    Returns:
        What became of each stack: "volume" or a refusal's code.

    Raises:
        AssertionError: a volume that contradicts its header, or a hang.
        Any other exception is a crash.
    """
    rng = random.Random(seed)
    files = list(originals(rng.choice(SYNTAXES), rng.random() < 0.25))
    for _ in range(rng.choice((1, 1, 2, 4))):
        victim = rng.randrange(len(files))
        files[victim] = mutate(files[victim], rng)
    with time_limit(CASE_LIMIT_S):
        instances = [(_stored(data, number), _header(data)) for number, data in enumerate(files)]
        by_hash = {stored.sha256: data for (stored, _), data in zip(instances, files, strict=True)}
        return [_follow(stack, by_hash) for stack in stacks_of(instances)]


def _follow(stack: Stack, by_hash: dict[str, bytes]) -> str:
    assert match_rule(stack, ()) is not None
    try:
        volume = build_volume(stack, lambda stored: by_hash[stored.sha256])
    except Refusal as refusal:
        return refusal.reason.code
    check(volume, stack)
    return "volume"


def check(volume: Volume, stack: Stack) -> None:
    """What must hold of every volume, however its bytes came about."""
    header = stack.representative
    assert volume.voxels.shape == (header.columns, header.rows, len(stack.planes))
    assert np.isfinite(volume.voxels).all()
    assert np.isfinite(volume.affine).all()
    axes = volume.affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    unit = axes / spacing
    assert np.all(spacing > 0.005)
    assert abs(unit.T @ unit - np.eye(3)).max() < 0.03
    lps = np.diag([-1.0, -1.0, 1.0])
    for k, plane in enumerate(stack.planes):
        assert plane.facts.position_mm is not None
        off = lps @ (volume.affine @ [0, 0, k, 1])[:3] - plane.facts.position_mm
        assert np.linalg.norm(off) <= max(0.02, 0.05 * spacing[2]) + 1e-6


def _stored(data: bytes, number: int) -> StoredInstance:
    sha256 = hashlib.sha256(data).hexdigest()
    return StoredInstance(number, 0, 0, len(data), sha256, "", sha256, str(ExplicitVRLittleEndian), "mr1", 1, 0.0)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the main thread when the block takes too long."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
