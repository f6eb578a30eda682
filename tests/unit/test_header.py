"""Headers: the facts of an instance, read without its pixels, and refused where they cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from daemon import header as headers
from daemon.dicom_write import Plan, part10
from daemon.elements import NotUnderstood, pick, split_file
from daemon.header import MATCHABLE, read_header
from daemon.words import Refusal
from tests.builders import build_enhanced, head_phantom, little_stack


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_picking_elements_gives_the_facts_that_a_whole_parse_gives(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk by lengths and pydicom's own reading agree, nested and private elements included."""
    ds = little_stack(plan=Plan(transfer_syntax_uid=str(syntax)))[3]
    inner = Dataset()
    inner.ImagePositionPatient, inner.SeriesDescription = [1, 2, 3], "not this one"
    inner.ReferencedImageSequence = Sequence([Dataset()])
    ds.ReferencedImageSequence = Sequence([inner, inner])
    ds["ReferencedImageSequence"].is_undefined_length = True
    ds.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x18, "SL", 33)
    data = part10(ds)
    picked = read_header(data)

    def refuse(*args: object) -> None:
        raise NotUnderstood

    monkeypatch.setattr(headers, "pick", refuse)
    assert read_header(data) == picked
    assert picked.expected_slices == 33 or syntax == ImplicitVRLittleEndian
    assert picked.frames[0].position_mm == tuple(float(x) for x in ds.ImagePositionPatient)


def test_classic_and_enhanced_tell_the_same_facts() -> None:
    """Position, orientation, spacing, echo, inversion, sequence: in the same words."""
    classic = [read_header(part10(ds)) for ds in little_stack(8)]
    volume = head_phantom((8, 8, 8))
    enhanced = read_header(part10(build_enhanced(volume, (2.5, 2.5, 2.5))))
    assert len(enhanced.frames) == enhanced.number_of_frames == 8
    for one, many in zip(classic, enhanced.frames, strict=True):
        plane = one.frames[0]
        assert (plane.position_mm, plane.orientation, plane.pixel_spacing_mm) == (
            many.position_mm,
            many.orientation,
            many.pixel_spacing_mm,
        )
        assert (plane.echo_time_ms, plane.inversion_time_ms, plane.component) == (2.98, 900.0, "M")
        assert (many.echo_time_ms, many.inversion_time_ms, many.component) == (2.98, 900.0, "M")
    for header in (classic[0], enhanced):
        assert {"GR", "IR"} <= header.scanning
        assert (header.repetition_time_ms, header.flip_angle_deg, header.acquisition_type) == (2300.0, 9.0, "3D")


def test_absent_and_unreadable_values_are_none() -> None:
    """No sentinel stands for what the header does not tell."""
    ds = little_stack(1, EchoTime=None, InversionTime=None, PixelSpacing=None, SliceThickness=None)[0]
    header = read_header(part10(ds))
    frame = header.frames[0]
    assert (frame.echo_time_ms, frame.inversion_time_ms, frame.pixel_spacing_mm, frame.thickness_mm) == (None,) * 4
    assert header.expected_images is None
    assert header.expected_slices is None


def test_values_that_are_no_numbers_are_none() -> None:
    """A DS that holds words, or not a number, tells nothing."""
    data = part10(little_stack(1)[0])
    at = data.find(b"2.98")
    assert read_header(data[:at] + b"nan " + data[at + 4 :]).frames[0].echo_time_ms is None
    assert read_header(data[:at] + b"a\\b " + data[at + 4 :]).frames[0].echo_time_ms is None


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 132, b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 500, b"not DICOM at all" * 20],
    ids=["empty", "no magic", "nothing behind", "garbage", "text"],
)
def test_what_is_no_dicom_is_refused(data: bytes) -> None:
    """As a bad header, never as an exception of the parser."""
    with pytest.raises(Refusal) as refused:
        read_header(data)
    assert refused.value.reason.code == "bad_header"


def test_an_instance_without_a_series_is_refused() -> None:
    """Nothing could be assembled from it."""
    with pytest.raises(Refusal, match="names no series"):
        read_header(part10(little_stack(1, SeriesInstanceUID=None)[0]))


def test_deeply_nested_sequences_are_refused_or_read() -> None:
    """Hundreds of levels end as a header or a refusal, not as a crash."""
    inner = Dataset()
    inner.PatientID = "x"
    for _ in range(200):
        outer = Dataset()
        outer.SharedFunctionalGroupsSequence = Sequence([inner])
        inner = outer
    ds = little_stack(1)[0]
    ds.SharedFunctionalGroupsSequence = inner.SharedFunctionalGroupsSequence
    data = part10(ds)
    told = ""
    try:
        told = read_header(data).series_uid
    except Refusal as refusal:
        told = refusal.reason.code
    assert told in (str(ds.SeriesInstanceUID), "bad_header")


def test_rules_cannot_match_on_who_the_patient_is() -> None:
    """No attribute that identifies a person is read, so none can reach a log."""
    for keyword in MATCHABLE:
        assert (
            not keyword.startswith(("Patient", "OtherPatient", "Referring", "Operator")) or keyword == "PatientPosition"
        )


def test_the_walk_leaves_what_it_does_not_understand_to_pydicom() -> None:
    """A length beyond the end, letters that are no representation, a missing preamble."""
    data = part10(little_stack(1)[0])
    syntax, start = split_file(data)
    with pytest.raises(NotUnderstood):
        pick(data[: len(data) // 2], start, syntax, {0x7FE00010}, 0xFFFFFFFF)
    with pytest.raises(NotUnderstood):
        pick(data, start + 1, syntax, {0x7FE00010}, 0xFFFFFFFF)
    with pytest.raises(NotUnderstood):
        split_file(data[1:])


def test_real_headers_read_as_pydicom_reads_them(shared_data: Path) -> None:
    """Of every vendor: the picked facts equal those of a whole parse."""
    for folder in sorted((shared_data / "dicom").iterdir()):
        if folder.is_dir():
            path = min(folder.iterdir())
            assert read_header(path.read_bytes()) == headers.header_of(dcmread(path, stop_before_pixels=True)), (
                folder.name
            )
