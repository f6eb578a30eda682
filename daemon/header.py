"""The facts of one instance that selection and assembly need, read without its pixels.

Tolerant of what scanners write: what is absent or unreadable is None, and whoever needs it refuses with its reason. Classic
and Enhanced MR give the same facts. Only public attributes tell positions; of private ones a few are read where a vendor
has no public place for the fact.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)

from daemon.elements import NotUnderstood, pick, split_file
from daemon.reasons import REASONS
from daemon.words import Refusal

T = TypeVar("T")

CLASSIC, ENHANCED, LEGACY = map(str, (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage))
MULTI_FRAME = (ENHANCED, LEGACY)
SUPPORTED = (CLASSIC, *MULTI_FRAME)
"""SOP classes that are judged; every other storage class is stored and refused."""

MAX_FRAMES = 2048
"""Frames of one instance whose facts are read; a 3D head has a few hundred, a functional run tens of thousands, which
would hold up the headers behind it for seconds."""

PARSE_FAILURES = (
    InvalidDicomError,
    BytesLengthException,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    RecursionError,
    MemoryError,
    EOFError,
    OSError,
    struct.error,
    zlib.error,
)
"""What pydicom raises on damaged data, by fuzzing; anything else is our own mistake and must be seen."""

_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class Frame:
    """Geometry and contrast of one image plane; None where the header does not tell.

    Attributes:
        position_mm: ImagePositionPatient: centre of the first pixel, LPS.
        orientation: ImageOrientationPatient: six direction cosines, along a row and along a column, LPS.
        pixel_spacing_mm: between rows, between columns.
        thickness_mm: SliceThickness.
        image_type: ImageType or FrameType, upper case; vendors' additions appended.
        component: M, P, R, I, or another letter's word where the header names one; "" where it does not tell.
        echo_time_ms, inversion_time_ms, b_value: of this plane.
        echo_number: EchoNumbers, or an order of echoes.
        coil: the receive coil or coil element, as the header names it.
        order: what sorts repeated planes at one position into volumes: temporal index, acquisition, time, number.
    """

    position_mm: tuple[float, float, float] | None = None
    orientation: tuple[float, ...] | None = None
    pixel_spacing_mm: tuple[float, float] | None = None
    thickness_mm: float | None = None
    image_type: tuple[str, ...] = ()
    component: str = ""
    echo_time_ms: float | None = None
    inversion_time_ms: float | None = None
    b_value: float | None = None
    echo_number: int | None = None
    coil: str = ""
    order: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Header:
    """Plain facts of one instance.

    Attributes:
        sop_class_uid, sop_instance_uid, series_uid, study_uid, frame_of_reference_uid: as in the data set; "" if absent.
        rows, columns, bits_allocated, samples_per_pixel, photometric: of the pixels.
        number_of_frames: as announced; 1 for a classic image.
        frames: one for each plane that the header describes; none of an instance with more than `MAX_FRAMES`.
        series_number, acquisition_number, instance_number: None if absent.
        expected_images: images that the header announces for the acquisition (ImagesInAcquisition).
        expected_slices: slices that a vendor's private attribute announces for one volume.
        acquisition_type: MRAcquisitionType, upper case.
        scanning: words of ScanningSequence (SE, IR, GR, EP, RM), or what the Enhanced attributes say in these words.
        variant: words of SequenceVariant, likewise.
        repetition_time_ms, flip_angle_deg: None if absent.
        acquired_at: AcquisitionDateTime, or AcquisitionDate and AcquisitionTime, as written; never told to anyone.
        attributes: DICOM keyword -> text or number, for selection rules.
    """

    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    series_uid: str = ""
    study_uid: str = ""
    frame_of_reference_uid: str = ""
    rows: int = 0
    columns: int = 0
    bits_allocated: int = 0
    samples_per_pixel: int = 1
    photometric: str = ""
    number_of_frames: int = 1
    frames: tuple[Frame, ...] = ()
    series_number: int | None = None
    acquisition_number: int | None = None
    instance_number: int | None = None
    expected_images: int | None = None
    expected_slices: int | None = None
    acquisition_type: str = ""
    scanning: frozenset[str] = frozenset()
    variant: frozenset[str] = frozenset()
    repetition_time_ms: float | None = None
    flip_angle_deg: float | None = None
    acquired_at: str = ""
    attributes: dict[str, str | float] = field(default_factory=dict)


MATCHABLE = (
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "SoftwareVersions",
    "StationName",
    "InstitutionName",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "SequenceName",
    "PulseSequenceName",
    "BodyPartExamined",
    "PatientPosition",
    "ScanOptions",
    "AngioFlag",
    "ContrastBolusAgent",
    "AcquisitionContrast",
    "MagneticFieldStrength",
    "EchoTrainLength",
    "PixelBandwidth",
    "PercentSampling",
    "NumberOfAverages",
    "SliceThickness",
    "SpacingBetweenSlices",
    "Laterality",
    "TimeOfFlightContrast",
    "EchoPlanarPulseSequence",
    "ReceiveCoilName",
    "AcquisitionDuration",
)
"""Keywords of attributes that a selection rule may match beside those that have a key of their own. None tells who."""

_NUMERIC = frozenset(
    [
        "MagneticFieldStrength",
        "EchoTrainLength",
        "PixelBandwidth",
        "PercentSampling",
        "NumberOfAverages",
        "SliceThickness",
        "SpacingBetweenSlices",
        "AcquisitionDuration",
    ]
)

_PLAIN = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "BitsAllocated",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "SeriesNumber",
    "AcquisitionNumber",
    "InstanceNumber",
    "ImagesInAcquisition",
    "MRAcquisitionType",
    "ScanningSequence",
    "SequenceVariant",
    "RepetitionTime",
    "FlipAngle",
    "ImageType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "EchoTime",
    "EffectiveEchoTime",
    "InversionTime",
    "DiffusionBValue",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "ContentTime",
    "AcquisitionTime",
    "AcquisitionDate",
    "AcquisitionDateTime",
    "ComplexImageComponent",
    "EchoPulseSequence",
    "SteadyStatePulseSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "SpecificCharacterSet",
]

_PHILIPS_SLICES, _PHILIPS = (0x2001, 0x18), "Philips Imaging DD 001"
_GE_KIND, _GE_PARAMETERS = (0x0043, 0x2F), "GEMS_PARM_01"
_GE_PLANE_TYPE, _GE_ACQUISITION = (0x0019, 0x17), "GEMS_ACQU_01"
_GE_RUN = (0x0019, 0xA2)
_SIEMENS_COIL, _SIEMENS_HEADER = (0x0051, 0x0F), "SIEMENS MR HEADER"
_SIEMENS_TYPE, _SIEMENS_XA = (0x0021, 0x75), "SIEMENS MR SDI 02"
_PRIVATE = (
    (_PHILIPS_SLICES, _PHILIPS),
    (_GE_KIND, _GE_PARAMETERS),
    (_GE_PLANE_TYPE, _GE_ACQUISITION),
    (_GE_RUN, _GE_ACQUISITION),
    (_SIEMENS_COIL, _SIEMENS_HEADER),
    (_SIEMENS_TYPE, _SIEMENS_XA),
)
_BLOCKS = range(0x10, 0x14)
"""Private blocks in which the attributes above are looked for."""

_GE_COMPONENTS = {0: "M", 1: "P", 2: "R", 3: "I"}
_COMPONENT_WORDS = {
    "M": "M",
    "MAGNITUDE": "M",
    "P": "P",
    "PHASE": "P",
    "PHASE MAP": "P",
    "R": "R",
    "REAL": "R",
    "I": "I",
    "IMAGINARY": "I",
    "VELOCITY": "P",
    "VELOCITY MAP": "P",
    "MIXED": "MIXED",
}


def _wanted_tags() -> list[BaseTag]:
    tags = [Tag(keyword) for keyword in (*_PLAIN, *MATCHABLE)]
    for (group, element), _ in _PRIVATE:
        for block in _BLOCKS:
            tags += [Tag(group, block), Tag(group, (block << 8) | element)]
    return tags


_TAGS = _wanted_tags()
_WANTED = frozenset(int(tag) for tag in _TAGS)
_PER_FRAME = int(Tag("PerFrameFunctionalGroupsSequence"))


def read_header(data: bytes) -> Header:
    """Read the facts of one instance.

    Args:
        data: a DICOM file in memory (Part 10); what follows the header is not looked at.

    Returns:
        The facts. Whether they suffice is for `series` and `rules` to say.

    Raises:
        Refusal: `bad_header`: not DICOM, damaged, or without a SeriesInstanceUID.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return header_of(_wanted_part(data))
    except PARSE_FAILURES:
        raise Refusal("bad_header", REASONS["bad_header"]) from None


def _wanted_part(data: bytes) -> Dataset:
    """The attributes that matter, parsed; the rest is skipped by its length where that can be done."""
    try:
        syntax, start = split_file(data)
        ds = _pick(data, start, syntax, _WANTED - {_PER_FRAME})
        if 0 < (_int(ds, "NumberOfFrames") or 0) <= MAX_FRAMES:
            ds.update(_pick(data, start, syntax, {_PER_FRAME}))
    except NotUnderstood:
        ds = dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=_TAGS)
    return ds


def _pick(data: bytes, start: int, syntax: str, wanted: frozenset[int] | set[int]) -> Dataset:
    kept, _, _ = pick(data, start, syntax, wanted, max(wanted))
    ds: Dataset = read_dataset(io.BytesIO(kept), syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    return ds


def header_of(ds: Dataset) -> Header:
    """The facts of a parsed data set.

    Raises:
        Refusal: `bad_header`: no SeriesInstanceUID.
        One of `PARSE_FAILURES`: damaged sequences.
    """
    series_uid = _uid(ds, "SeriesInstanceUID")
    if not series_uid:
        raise Refusal("bad_header", "The header names no series (SeriesInstanceUID).")
    shared = _first_item(ds.get("SharedFunctionalGroupsSequence"))
    timing = _item(shared, "MRTimingAndRelatedParametersSequence")
    scanning, variant = _sequence_words(ds, shared)
    sop_class_uid = _uid(ds, "SOPClassUID")
    return Header(
        sop_class_uid=sop_class_uid,
        sop_instance_uid=_uid(ds, "SOPInstanceUID"),
        series_uid=series_uid,
        study_uid=_uid(ds, "StudyInstanceUID"),
        frame_of_reference_uid=_uid(ds, "FrameOfReferenceUID"),
        rows=_int(ds, "Rows") or 0,
        columns=_int(ds, "Columns") or 0,
        bits_allocated=_int(ds, "BitsAllocated") or 0,
        samples_per_pixel=_int(ds, "SamplesPerPixel") or 1,
        photometric=_text(ds, "PhotometricInterpretation").upper(),
        number_of_frames=_int(ds, "NumberOfFrames") or 1,
        frames=_frames(ds, shared) if sop_class_uid in MULTI_FRAME else (_classic_frame(ds),),
        series_number=_int(ds, "SeriesNumber"),
        acquisition_number=_int(ds, "AcquisitionNumber"),
        instance_number=_int(ds, "InstanceNumber"),
        expected_images=_positive(_int(ds, "ImagesInAcquisition")),
        expected_slices=_positive(_as_int(_private(ds, _PHILIPS_SLICES, _PHILIPS))),
        acquisition_type=_text(ds, "MRAcquisitionType").upper(),
        scanning=scanning,
        variant=variant,
        repetition_time_ms=_first_number(_number(ds, "RepetitionTime"), _number(timing, "RepetitionTime")),
        flip_angle_deg=_first_number(_number(ds, "FlipAngle"), _number(timing, "FlipAngle")),
        acquired_at=_text(ds, "AcquisitionDateTime") or _text(ds, "AcquisitionDate") + _text(ds, "AcquisitionTime"),
        attributes=_attributes(ds),
    )


# --- Planes ------------------------------------------------------------------------------------------------------------


def _classic_frame(ds: Dataset) -> Frame:
    image_type = _words(ds, "ImageType") + _siemens_type(ds)
    return Frame(
        position_mm=_floats(ds, "ImagePositionPatient", 3),
        orientation=_floats(ds, "ImageOrientationPatient", 6),
        pixel_spacing_mm=_floats(ds, "PixelSpacing", 2),
        thickness_mm=_number(ds, "SliceThickness"),
        image_type=_with_plane_type(ds, image_type),
        component=_component(ds, image_type),
        echo_time_ms=_number(ds, "EchoTime"),
        inversion_time_ms=_positive(_number(ds, "InversionTime")),
        b_value=_number(ds, "DiffusionBValue"),
        echo_number=_int(ds, "EchoNumbers"),
        coil=_text(ds, "ReceiveCoilName") or str(_private(ds, _SIEMENS_COIL, _SIEMENS_HEADER) or "")[:64],
        order=(
            _number(ds, "TemporalPositionIdentifier") or _number(ds, "TemporalPositionIndex") or 0.0,
            _as_float(_private(ds, _GE_RUN, _GE_ACQUISITION)) or _number(ds, "AcquisitionNumber") or 0.0,
            _number(ds, "ContentTime") or _number(ds, "AcquisitionTime") or 0.0,
            _number(ds, "InstanceNumber") or 0.0,
        ),
    )


def _frames(ds: Dataset, shared: Dataset | None) -> tuple[Frame, ...]:
    """The frame table of an Enhanced image: what a frame does not say, the shared groups say."""
    items = (ds.get("PerFrameFunctionalGroupsSequence") or ())[:MAX_FRAMES]
    top = _words(ds, "ImageType")
    top_component = _text(ds, "ComplexImageComponent")
    instance = _number(ds, "InstanceNumber") or 0.0
    common = _frame_facts(shared, {}) if shared is not None else {}
    frames = []
    for number, item in enumerate(items):
        facts = _frame_facts(item, common)
        image_type = facts.pop("image_type") or top
        component = facts.pop("component") or top_component
        temporal = facts.pop("temporal")
        frames.append(
            Frame(
                **facts,
                image_type=image_type,
                component=_COMPONENT_WORDS.get(component, component) or _component(ds, image_type),
                order=(temporal, 0.0, instance, float(number)),
            )
        )
    return tuple(frames)


_FRAME_FACTS: dict[str, tuple[str, Callable[[Dataset], Any]]] = {
    "position_mm": ("PlanePositionSequence", lambda ds: _floats(ds, "ImagePositionPatient", 3)),
    "orientation": ("PlaneOrientationSequence", lambda ds: _floats(ds, "ImageOrientationPatient", 6)),
    "pixel_spacing_mm": ("PixelMeasuresSequence", lambda ds: _floats(ds, "PixelSpacing", 2)),
    "thickness_mm": ("PixelMeasuresSequence", lambda ds: _number(ds, "SliceThickness")),
    "image_type": ("MRImageFrameTypeSequence", lambda ds: _words(ds, "FrameType")),
    "component": ("MRImageFrameTypeSequence", lambda ds: _text(ds, "ComplexImageComponent").upper()),
    "echo_time_ms": ("MREchoSequence", lambda ds: _number(ds, "EffectiveEchoTime")),
    "inversion_time_ms": ("MRModifierSequence", lambda ds: _positive(_number(ds, "InversionTimes"))),
    "b_value": ("MRDiffusionSequence", lambda ds: _number(ds, "DiffusionBValue")),
    "coil": ("MRReceiveCoilSequence", lambda ds: _text(ds, "ReceiveCoilName")),
    "temporal": ("FrameContentSequence", lambda ds: _number(ds, "TemporalPositionIndex")),
}
"""Fact -> the functional group that holds it, and how it is read there."""

_ABSENT: dict[str, Any] = {"image_type": (), "component": "", "coil": "", "temporal": 0.0}


def _frame_facts(item: Dataset, common: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, (group, read) in _FRAME_FACTS.items():
        holder = _item(item, group)
        value = read(holder) if holder is not None else None
        facts[name] = value if value not in (None, (), "") else common.get(name, _ABSENT.get(name))
    return facts


def _component(ds: Dataset, image_type: Iterable[str]) -> str:
    """Magnitude, phase, real or imaginary, from the first place that tells."""
    said = _text(ds, "ComplexImageComponent").upper()
    if said in _COMPONENT_WORDS:
        return _COMPONENT_WORDS[said]
    ge = _as_int(_private(ds, _GE_KIND, _GE_PARAMETERS))
    if ge in _GE_COMPONENTS:
        return _GE_COMPONENTS[ge]
    for word in list(image_type)[2:]:
        if word in _COMPONENT_WORDS:
            return _COMPONENT_WORDS[word]
    return ""


def _siemens_type(ds: Dataset) -> tuple[str, ...]:
    """ImageTypeText of XA software, which tells the distortion correction that ImageType leaves out."""
    value = _private(ds, _SIEMENS_TYPE, _SIEMENS_XA)
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else list(value)
    return tuple(w for w in (str(word).strip().upper()[:32] for word in words[:16]) if w.startswith(("DIS", "ND")))


def _with_plane_type(ds: Dataset, image_type: tuple[str, ...]) -> tuple[str, ...]:
    """GE tells a three-plane localizer in a private attribute alone."""
    if _as_int(_private(ds, _GE_PLANE_TYPE, _GE_ACQUISITION)) == 256 and "LOCALIZER" not in image_type:
        return (*image_type, "LOCALIZER")
    return image_type


def _sequence_words(ds: Dataset, shared: Dataset | None) -> tuple[frozenset[str], frozenset[str]]:
    """ScanningSequence and SequenceVariant; for Enhanced images what their attributes say, in the same words."""
    scanning, variant = set(_words(ds, "ScanningSequence")), set(_words(ds, "SequenceVariant"))
    echo = _text(ds, "EchoPulseSequence").upper()
    scanning |= {"GRADIENT": {"GR"}, "SPIN": {"SE"}, "BOTH": {"SE", "GR"}}.get(echo, set())
    if _text(ds, "EchoPlanarPulseSequence").upper() == "YES":
        scanning.add("EP")
    modifier = _item(shared, "MRModifierSequence")
    if _text(modifier, "InversionRecovery").upper() == "YES":
        scanning.add("IR")
    if _text(modifier, "Spoiling").upper() not in ("", "NONE"):
        variant.add("SP")
    return frozenset(scanning), frozenset(variant)


def _attributes(ds: Dataset) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for keyword in MATCHABLE:
        value = _number(ds, keyword) if keyword in _NUMERIC else _text(ds, keyword)
        if value not in (None, ""):
            found[keyword] = value
    return found


# --- Values: what cannot be read is absent ----------------------------------------------------------------------------


def _value(ds: Dataset | None, keyword: str) -> Any:
    if ds is None:
        return None
    try:
        return ds.get(keyword)
    except PARSE_FAILURES:
        return None


def _private(ds: Dataset, tag: tuple[int, int], creator: str) -> Any:
    """The value of a private attribute, found by its creator."""
    group, element = tag
    for block in _BLOCKS:
        try:
            owner = ds.get(Tag(group, block))
            if owner is not None and str(owner.value).strip() == creator:
                found = ds.get(Tag(group, (block << 8) | element))
                return None if found is None else found.value
        except PARSE_FAILURES:
            return None
    return None


def _text(ds: Dataset | None, keyword: str) -> str:
    value = _value(ds, keyword)
    if value is None:
        return ""
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        return "\\".join(str(each) for each in list(value)[:32]).strip()[:1024]
    return str(value).strip()[:1024]


def _words(ds: Dataset | None, keyword: str) -> tuple[str, ...]:
    text = _text(ds, keyword).upper()
    return tuple(word.strip() for word in text.split("\\")) if text else ()


def _uid(ds: Dataset, keyword: str) -> str:
    text = _text(ds, keyword)
    return text if _UID.fullmatch(text) else ""


def _number(ds: Dataset | None, keyword: str) -> float | None:
    value = _value(ds, keyword)
    if value is not None and not isinstance(value, str | int | float) and hasattr(value, "__iter__"):
        value = next(iter(value), None)
    return _as_float(value)


def _as_float(value: Any) -> float | None:
    if isinstance(value, bytes):
        return None
    if not isinstance(value, str | int | float) and hasattr(value, "__iter__"):
        value = next(iter(value), None)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _int(ds: Dataset, keyword: str) -> int | None:
    return _as_int(_value(ds, keyword))


def _as_int(value: Any) -> int | None:
    number = _as_float(value)
    return None if number is None or abs(number) > 2**53 else int(number)


def _positive(value: T | None) -> T | None:
    return value if value is not None and value > 0 else None  # type: ignore[operator]


def _first_number(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _floats(ds: Dataset, keyword: str, count: int) -> Any:
    """Exactly `count` finite numbers as a tuple, else None."""
    value = _value(ds, keyword)
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
        return None
    numbers = tuple(_as_float(each) for each in value)
    return None if None in numbers else numbers


def _first_item(sequence: Any) -> Dataset | None:
    return sequence[0] if sequence is not None and hasattr(sequence, "__len__") and len(sequence) > 0 else None


def _item(ds: Dataset | None, keyword: str) -> Dataset | None:
    """The first item of a sequence, None where absent."""
    found = _first_item(_value(ds, keyword))
    return found if isinstance(found, Dataset) else None
