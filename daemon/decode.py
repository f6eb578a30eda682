"""Pixels of one instance, decoded where and how they can do no harm.

Sizes are checked before anything is decoded: what the header announces, what the bytes hold, and what a compressed stream
says of itself must agree. The decoders are the maintained ones behind pydicom. This runs in the scorer process, never where
images are received; `limit_process` bounds its memory and `cpu_limit` its time.
"""

from __future__ import annotations

import contextlib
import io
import math
import resource
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from daemon.elements import PIXEL_DATA, PREAMBLE_BYTES, UNDEFINED, NotUnderstood, pick, split_file
from daemon.header import PARSE_FAILURES
from daemon.reasons import REASONS
from daemon.words import Refusal

TRANSFER_SYNTAXES: dict[str, str] = {
    str(uid): name
    for uid, name in {
        ImplicitVRLittleEndian: "Implicit VR Little Endian",
        ExplicitVRLittleEndian: "Explicit VR Little Endian",
        ExplicitVRBigEndian: "Explicit VR Big Endian",
        RLELossless: "RLE Lossless",
        JPEGLossless: "JPEG Lossless (process 14)",
        JPEGLosslessSV1: "JPEG Lossless (process 14, selection value 1)",
        JPEGLSLossless: "JPEG-LS Lossless",
        JPEGLSNearLossless: "JPEG-LS Near-lossless",
        JPEG2000Lossless: "JPEG 2000 Lossless",
        JPEG2000: "JPEG 2000",
        HTJ2KLossless: "High-Throughput JPEG 2000 Lossless",
        HTJ2KLosslessRPCL: "High-Throughput JPEG 2000 Lossless (RPCL)",
        HTJ2K: "High-Throughput JPEG 2000",
        JPEGBaseline8Bit: "JPEG Baseline (process 1)",
        JPEGExtended12Bit: "JPEG Extended (process 2 and 4)",
    }.items()
}
"""Encodings whose pixels are read. Deflate is not among them: it could unfold without bound."""

_UNCOMPRESSED = frozenset(map(str, (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)))
_J2K_FAMILY = frozenset(map(str, (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)))
_JPEG_FAMILY = frozenset(TRANSFER_SYNTAXES) - _UNCOMPRESSED - _J2K_FAMILY - {str(RLELossless)}

_PLUGINS = {str(RLELossless): "pydicom"}
"""Decoder to use where the fastest one will not do: pylibjpeg-rle 2.2 panics on damaged data, past every exception."""

MAX_SIDE = 4096
"""Rows or columns beyond this are no MR image of a head."""

MAX_INSTANCE_BYTES = 2 << 30
"""Decoded pixels of one instance."""

DECODE_FAILURES = (*PARSE_FAILURES, RuntimeError, AssertionError)
"""What pydicom and the decoders behind it raise on damaged pixels."""

_TAGS: list[BaseTag | int] = [
    Tag(keyword)
    for keyword in (
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "NumberOfFrames",
        "RescaleSlope",
        "RescaleIntercept",
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
        "PixelData",
        "ExtendedOffsetTable",
        "ExtendedOffsetTableLengths",
    )
]
_WANTED = frozenset(int(tag) for tag in _TAGS)


@dataclass(frozen=True)
class Pixels:
    """Decoded pixels of one instance.

    Attributes:
        stored: (frames, rows, columns) stored values.
        slopes, intercepts: per frame; value = stored * slope + intercept.
    """

    stored: NDArray[Any]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]

    def write_frame(self, number: int, out: NDArray[np.float32]) -> None:
        """Write the rescaled values of one frame (from 0) into a float32 array of (rows, columns)."""
        slope, intercept = self.slopes[number], self.intercepts[number]
        if slope == 1.0 and intercept == 0.0:
            out[...] = self.stored[number]
        else:
            out[...] = self.stored[number].astype(np.float64) * slope + intercept


def decode(data: bytes, transfer_syntax_uid: str) -> Pixels:
    """Decode the pixels of one instance.

    Args:
        data: the data set as received, or a whole DICOM file.
        transfer_syntax_uid: of the data set; a file's own meta information is believed instead.

    Returns:
        Stored values with their rescale, one slope for each frame.

    Raises:
        Refusal: `bad_pixels`, `too_large`, `unsupported_encoding` or `colour`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds, syntax, plain = parse(data, transfer_syntax_uid)
            if syntax not in TRANSFER_SYNTAXES:
                raise Refusal("unsupported_encoding", f"The transfer syntax {syntax[:64]} is not read.")
            frames = _check_size(ds, syntax, plain)
            stored = _decoded(ds, syntax, frames, plain)
            return Pixels(stored, *_rescale(ds, frames))
    except DECODE_FAILURES:
        raise Refusal("bad_pixels", REASONS["bad_pixels"]) from None


def parse(data: bytes, transfer_syntax_uid: str) -> tuple[Dataset, str, memoryview | None]:
    """The attributes that describe the pixels, and the pixels, from a data set or a file.

    Returns:
        The attributes, the transfer syntax, and the bytes of uncompressed pixels where they could be found without
        parsing; else None, and the pixels are among the attributes.
    """
    start, is_file = 0, data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == b"DICM"
    try:
        if is_file:
            transfer_syntax_uid, start = split_file(data)
        kept, at, length = pick(data, start, transfer_syntax_uid, _WANTED, PIXEL_DATA - 1)
        if transfer_syntax_uid in _UNCOMPRESSED and at and length != UNDEFINED:
            return _read(kept, transfer_syntax_uid), transfer_syntax_uid, memoryview(data)[at : at + length]
    except NotUnderstood:
        pass
    if is_file:
        ds: Dataset = dcmread(io.BytesIO(data), specific_tags=_TAGS)
        return ds, str(ds.file_meta.get("TransferSyntaxUID", transfer_syntax_uid)), None
    return _read(data, transfer_syntax_uid), transfer_syntax_uid, None


def _read(data: bytes, transfer_syntax_uid: str) -> Dataset:
    implicit, little = transfer_syntax_uid == ImplicitVRLittleEndian, transfer_syntax_uid != ExplicitVRBigEndian
    ds: Dataset = read_dataset(io.BytesIO(data), implicit, little, specific_tags=_TAGS)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    return ds


def _check_size(ds: Dataset, syntax: str, plain: memoryview | None) -> int:
    """Compare what is announced with what is there, before decoding.

    Returns:
        Number of frames.
    """
    rows, columns, frames = int(ds.Rows), int(ds.Columns), int(ds.get("NumberOfFrames") or 1)
    bits, samples = int(ds.BitsAllocated), int(ds.get("SamplesPerPixel") or 1)
    if samples != 1:
        raise Refusal("colour", REASONS["colour"])
    if not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE):
        raise Refusal("too_large", f"The image has {rows} by {columns} pixels; at most {MAX_SIDE} a side are read.")
    if bits not in (8, 16, 32) or frames < 1:
        raise Refusal("bad_pixels", f"The pixels have {bits} bits in {frames} frames; 8, 16 or 32 bits are read.")
    size_bytes = rows * columns * frames * bits // 8
    if size_bytes > MAX_INSTANCE_BYTES:
        raise Refusal("too_large", f"The pixels would take {size_bytes} bytes; at most {MAX_INSTANCE_BYTES} are read.")
    held = len(ds.PixelData) if plain is None else len(plain)
    if syntax in _UNCOMPRESSED and held < size_bytes:
        raise Refusal("bad_pixels", f"The pixel data is cut short: {held} of {size_bytes} bytes.")
    if syntax not in _UNCOMPRESSED:
        _check_streams(ds, syntax, frames, (rows, columns))
    return frames


def _check_streams(ds: Dataset, syntax: str, frames: int, shape: tuple[int, int]) -> None:
    """See that every compressed frame is there and as large as the header says."""
    found = 0
    for stream in generate_frames(ds.PixelData, number_of_frames=frames):
        found += 1
        size = _stream_size(stream, syntax)
        if size is not None and size != shape:
            raise Refusal("bad_pixels", f"A compressed frame has {size[0]} by {size[1]} pixels, the header {shape}.")
        if found > frames:
            break
    if found != frames:
        raise Refusal("bad_pixels", f"The header announces {frames} frames; the pixel data holds {found}.")


def _stream_size(stream: bytes, syntax: str) -> tuple[int, int] | None:
    """(rows, columns) that a compressed stream says of itself, None for RLE, which says none.

    Raises:
        Refusal: `bad_pixels`: it is not such a stream.
    """
    size = None
    if syntax in _J2K_FAMILY:
        at = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
        if at >= 0 and len(stream) >= at + 24:
            width, height, x0, y0 = struct.unpack(">4I", stream[at + 8 : at + 24])
            size = (height - y0, width - x0)
    elif syntax in _JPEG_FAMILY:
        size = _jpeg_size(stream)
    else:
        return None
    if size is None:
        raise Refusal("bad_pixels", "The compressed pixels do not begin as their transfer syntax says.")
    return size


_START_OF_FRAME = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}) | {0xF7}


def _jpeg_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the frame header of a JPEG or JPEG-LS stream (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2)."""
    if stream[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack(">2H", stream[at + 5 : at + 9])
            return height, width
        at += 1 if marker == 0xFF else 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
    return None


def _decoded(ds: Dataset, syntax: str, frames: int, plain: memoryview | None) -> NDArray[Any]:
    """(frames, rows, columns) stored values."""
    shape = (frames, int(ds.Rows), int(ds.Columns))
    if plain is not None:
        stored = _plain(ds, syntax, shape, plain)
        if stored is not None:
            return stored
        ds.PixelData = bytes(plain)
        ds["PixelData"].VR = "OW"
    stored, _ = get_decoder(UID(syntax)).as_array(ds, raw=True, decoding_plugin=_PLUGINS.get(syntax, ""))
    if stored.size != math.prod(shape):
        raise Refusal("bad_pixels", f"The decoder gave {stored.shape}; expected {shape}.")
    return np.asarray(stored).reshape(shape)


def _plain(ds: Dataset, syntax: str, shape: tuple[int, int, int], plain: memoryview) -> NDArray[Any] | None:
    """Words of 16 bits whose lower bits hold the value; None for anything else, which pydicom reads."""
    bits, stored, high = int(ds.BitsAllocated), int(ds.get("BitsStored") or 0), ds.get("HighBit")
    if bits != 16 or not 1 <= stored <= bits or high is None or int(high) != stored - 1:
        return None
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    values = np.frombuffer(plain, dtype=f"{order}u2", count=math.prod(shape)).reshape(shape)
    unused = bits - stored
    if int(ds.PixelRepresentation) == 1:
        # Shift the sign bit to the top and back, as pydicom does: what lies above it may be an overlay.
        return (values << unused).astype(np.uint16).view(np.int16) >> unused if unused else values.view(f"{order}i2")
    return values & ((1 << stored) - 1) if unused else values


def _rescale(ds: Dataset, frames: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Slope and intercept of each frame; where none is said, 1 and 0. A real-world map is never applied."""
    shared = _transformation(ds.get("SharedFunctionalGroupsSequence"), 0)
    pairs = []
    for number in range(frames):
        own = _transformation(ds.get("PerFrameFunctionalGroupsSequence"), number) or shared or ds
        slope, intercept = own.get("RescaleSlope"), own.get("RescaleIntercept")
        pairs.append((1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)))
    for slope, intercept in pairs:
        if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0.0:
            raise Refusal("bad_pixels", f"The rescale slope {slope:g} and intercept {intercept:g} cannot be used.")
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _transformation(groups: Any, number: int) -> Dataset | None:
    if groups is None or number >= len(groups):
        return None
    sequence = groups[number].get("PixelValueTransformationSequence")
    return sequence[0] if sequence else None


# --- Limits -----------------------------------------------------------------------------------------------------------


def limit_process(memory_bytes: int) -> None:
    """Bound the address space of this process and write no core files, which could hold pixels.

    Args:
        memory_bytes: what the process may map in all.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Let the kernel end this process (SIGXCPU) if the block computes for longer; the supervisor starts it again.

    Args:
        seconds: of this process, from now; rounded up to whole seconds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
