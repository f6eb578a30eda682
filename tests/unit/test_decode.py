"""Pixels: every encoding gives the same values, and what is damaged or too large is refused before it can harm."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from daemon import decode as decoding
from daemon.decode import TRANSFER_SYNTAXES, cpu_limit, decode, limit_process
from daemon.dicom_write import Plan, dataset_bytes, part10
from daemon.words import Refusal
from tests.builders import build_classic_series, build_enhanced

SIDE = 64
"""Large enough for the wavelet levels of the JPEG 2000 encoder."""

ENCODABLE = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)


def image(syntax: str = ExplicitVRLittleEndian, **overrides: object) -> Dataset:
    """One slice of noise and a ramp."""
    values = np.random.default_rng(2).integers(0, 1000, (SIDE, SIDE, 1)) + np.arange(SIDE)[:, None, None] * 40
    plan = Plan(transfer_syntax_uid=str(syntax))
    return build_classic_series(values.astype(np.uint16), (2.5, 2.5, 2.5), plan=plan, **overrides)[0]


def code(data: bytes, syntax: str = ExplicitVRLittleEndian) -> str:
    with pytest.raises(Refusal) as refused:
        decode(data, str(syntax))
    return refused.value.reason.code


@pytest.mark.parametrize("syntax", ENCODABLE, ids=lambda uid: uid.keyword)
def test_every_encoding_gives_the_same_values(syntax: str) -> None:
    """As a data set and as a file, bit for bit."""
    ds = image(syntax)
    expected = image().pixel_array
    for data in (dataset_bytes(ds), part10(ds)):
        np.testing.assert_array_equal(decode(data, str(syntax)).stored[0], expected)


def test_jpeg_lossless_as_dcmtk_writes_it(tmp_path: Path) -> None:
    """JPEG lossless, process 14 and its selection value 1; DCMTK's encoder is the oracle."""
    part = tmp_path / "plain.dcm"
    part.write_bytes(part10(image()))
    for flag, name in (("+el", "14"), ("+e1", "sv1")):
        coded = tmp_path / f"{name}.dcm"
        try:
            subprocess.run(["dcmcjpeg", flag, part, coded], check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("dcmcjpeg (Debian package dcmtk) is not installed")
        found = decode(coded.read_bytes(), "1.2.840.10008.1.2.4.70")
        np.testing.assert_array_equal(found.stored[0], image().pixel_array)


def test_the_nine_encodings_of_one_real_image_agree(shared_data: Path) -> None:
    """Implicit, explicit, big endian, RLE, JPEG lossless, JPEG-LS and JPEG 2000 of one Siemens image."""
    values = []
    for path in sorted((shared_data / "dicom" / "transfer_syntaxes").iterdir()):
        data = path.read_bytes()
        assert str(dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID) in TRANSFER_SYNTAXES
        values.append(decode(data, str(ExplicitVRLittleEndian)).stored)
    assert len(values) == 9
    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(("stored", "signed"), [(12, False), (16, False), (12, True), (16, True), (10, True)])
def test_signed_and_partly_stored_words(syntax: str, stored: int, signed: bool) -> None:
    """Fewer bits stored than allocated, an overlay in the bits above, signed or not: as pydicom reads them."""
    ds = image(syntax)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    words = np.random.default_rng(stored).integers(0, 65536, (SIDE, 1)).astype(np.uint16)
    ds.Rows, ds.Columns = words.shape
    ds.PixelData = words.astype(f"{order}u2").tobytes()
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = stored, stored - 1, int(signed)
    expected = words.astype(np.int64) & ((1 << stored) - 1)
    if signed:
        expected = np.where(expected >= 1 << (stored - 1), expected - (1 << stored), expected)
    np.testing.assert_array_equal(decode(dataset_bytes(ds), str(syntax)).stored[0], expected)


def test_eight_and_thirty_two_bits() -> None:
    """Words of other sizes go through pydicom."""
    for bits, kind in ((8, "<u1"), (32, "<u4")):
        ds = image()
        values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 200
        ds.Rows = ds.Columns = SIDE
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit = bits - 1
        ds.PixelData = values.astype(kind).tobytes()
        ds["PixelData"].VR = "OB" if bits == 8 else "OW"
        np.testing.assert_array_equal(decode(dataset_bytes(ds), str(ExplicitVRLittleEndian)).stored[0], values)


def test_each_frame_has_its_own_rescale() -> None:
    """PixelValueTransformation of the frame, else of the shared groups, else 1 and 0."""
    ds = build_enhanced(np.full((8, 8, 8), 3, np.uint16), plan=Plan(slope=2.0))
    own = Dataset()
    own.RescaleSlope, own.RescaleIntercept = "5", "-1"
    ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence = [own]
    pixels = decode(dataset_bytes(ds), str(ExplicitVRLittleEndian))
    assert pixels.slopes == (2.0, 2.0, 5.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    out = np.zeros((8, 8), np.float32)
    pixels.write_frame(2, out)
    assert np.all(out == 14.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"Rows": 5000}, "too_large"),
        ({"Rows": 0}, "too_large"),
        ({"NumberOfFrames": "2000000"}, "too_large"),
        ({"NumberOfFrames": "-3"}, "bad_pixels"),
        ({"NumberOfFrames": "2"}, "bad_pixels"),
        ({"BitsAllocated": 12}, "bad_pixels"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"RescaleSlope": "0"}, "bad_pixels"),
        ({"PixelData": None}, "bad_pixels"),
        ({"Rows": None}, "bad_pixels"),
    ],
)
def test_what_the_header_announces_is_checked_first(values: dict[str, object], expected: str) -> None:
    """Absurd sizes, missing pixels, colour: refused before anything is decoded."""
    assert code(dataset_bytes(image(**values))) == expected


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_damaged_streams_are_refused(syntax: str) -> None:
    """Cut short, or with bytes overwritten: no crash, no wrong size."""
    ds = image(syntax)
    whole = dataset_bytes(ds)
    assert code(whole[: len(whole) // 2], syntax) == "bad_pixels"
    ds.PixelData = encapsulate([b"\x00" * 100])
    assert code(dataset_bytes(ds), syntax) == "bad_pixels"


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_a_stream_that_says_another_size_is_refused_before_decoding(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bomb: the header says 64 by 64, the compressed stream 30,000 by 30,000."""
    ds = image(syntax)
    data = bytearray(dataset_bytes(ds))
    if syntax == JPEG2000Lossless:
        at = data.find(b"\xff\x4f\xff\x51") + 8
        data[at : at + 8] = struct.pack(">2I", 30000, 30000)
    else:
        at = data.find(b"\xff\xf7") + 5
        data[at : at + 4] = struct.pack(">2H", 30000, 30000)
    monkeypatch.setattr(decoding, "get_decoder", lambda uid: pytest.fail("the decoder was asked"))
    assert code(bytes(data), syntax) == "bad_pixels"


def test_deflate_is_not_read() -> None:
    """It could unfold without bound."""
    assert str(DeflatedExplicitVRLittleEndian) not in TRANSFER_SYNTAXES
    assert code(dataset_bytes(image()), DeflatedExplicitVRLittleEndian) == "unsupported_encoding"


def test_limits_end_the_process_and_not_the_machine() -> None:
    """Memory beyond the limit is a MemoryError, time beyond it the end of the process by SIGXCPU."""
    program = "from daemon.decode import {0}\n{1}"
    memory = program.format(
        "limit_process", "limit_process(1 << 30)\ntry:\n    bytearray(4 << 30)\nexcept MemoryError:\n    print('kept')"
    )
    done = subprocess.run([sys.executable, "-c", memory], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "kept"
    spin = program.format("cpu_limit", "with cpu_limit(0.2):\n    while True: pass")
    done = subprocess.run([sys.executable, "-c", spin], capture_output=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -24


def test_a_time_limit_is_lifted_afterwards() -> None:
    """The limit holds for its block alone."""
    before = resource.getrlimit(resource.RLIMIT_CPU)
    with cpu_limit(100.0):
        assert resource.getrlimit(resource.RLIMIT_CPU) != before
    assert resource.getrlimit(resource.RLIMIT_CPU) == before
    assert callable(limit_process)
