"""A volume as the DICOM that a scanner would make of it: classic MR slices or one Enhanced MR image.

For the demo, the simulated sender and the tests. Everything follows from the arguments: the same volume and plan give the
same bytes, UIDs included. The patient is invented and says so.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite, write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    generate_uid,
)

from daemon import NOTICE
from daemon.words import Volume

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Plane -> the patient axis (R, A, S) along which its slices follow each other."""

_IN_PLANE = {
    "sagittal": ((1, 1), (2, -1)),
    "coronal": ((0, 1), (2, -1)),
    "axial": ((0, 1), (1, 1)),
}
"""Plane -> (patient axis, sign in LPS) of increasing column and of increasing row, as radiologists look at it."""

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
STORED_MAX = 4095
"""Largest stored value: 12 of 16 bits, as MR scanners write."""

Overrides = Mapping[str, Any]
"""DICOM keyword -> value, or a function of the slice's number (0, 1, ...) that gives the value; None leaves it out."""


@dataclass(frozen=True)
class Plan:
    """How a volume is turned into DICOM.

    Attributes:
        seed: every UID follows from it.
        plane: sagittal, coronal or axial: how the slices lie.
        description: SeriesDescription and ProtocolName.
        series_number: SeriesNumber.
        manufacturer: Manufacturer.
        transfer_syntax_uid: how the pixels are encoded; compressed ones need their encoder installed.
        reverse_rows: rows and columns both run backwards, as where the patient lies prone.
        slope: RescaleSlope; None leaves the rescale out, as Siemens does. The stored values are the same.
        signed: PixelRepresentation 1.
        overrides: attributes to replace, per series or per slice.
    """

    seed: str = "rescan"
    plane: str = "sagittal"
    description: str = "T1 MPRAGE sag 1mm"
    series_number: int = 2
    manufacturer: str = "RESCAN SIMULATOR"
    transfer_syntax_uid: str = ExplicitVRLittleEndian
    reverse_rows: bool = False
    slope: float | None = None
    signed: bool = False
    overrides: Overrides = field(default_factory=dict)

    def uid(self, *names: object) -> str:
        """A UID that follows from the seed and these names."""
        return str(generate_uid(entropy_srcs=[self.seed, *(str(name) for name in names)]))


@dataclass(frozen=True)
class Sliced:
    """A volume cut into planes.

    Attributes:
        stored: (slices, rows, columns) uint16, what the pixels hold.
        orientation: six direction cosines in LPS: along a row, along a column (ImageOrientationPatient).
        first_mm: (3,) centre of the first pixel of the first slice in LPS (ImagePositionPatient).
        step_mm: (3,) from a slice to the next, in LPS.
        pixel_spacing_mm: between rows, between columns (PixelSpacing).
    """

    stored: NDArray[np.uint16]
    orientation: tuple[float, ...]
    first_mm: NDArray[np.float64]
    step_mm: NDArray[np.float64]
    pixel_spacing_mm: tuple[float, float]

    def position(self, index: int) -> list[float]:
        """ImagePositionPatient of a slice."""
        return [round(float(x), 9) for x in self.first_mm + index * self.step_mm]

    @property
    def spacing_mm(self) -> float:
        """Distance between the centres of neighbouring slices."""
        return float(np.linalg.norm(self.step_mm))


def slice_volume(volume: Volume, plan: Plan) -> Sliced:
    """Cut a volume along a plane, by permuting its axes, never by resampling.

    Args:
        volume: voxels in [0, 4095] are stored as they are (rounded); larger ones are scaled down as a whole.
        plan: plane and direction.

    Raises:
        ValueError: an unknown plane or an affine that mixes axes evenly; the message shows it.
    """
    if plan.plane not in PLANES:
        raise ValueError(f"plane: got {plan.plane!r}; use one of {', '.join(PLANES)}")
    affine = np.asarray(volume.affine, dtype=np.float64)
    lps = RAS_TO_LPS @ affine[:3, :3]
    origin = RAS_TO_LPS @ affine[:3, 3]
    nearest = _axes_by_patient_direction(lps)
    turn = -1 if plan.reverse_rows else 1
    (column_axis, column_sign), (row_axis, row_sign) = _IN_PLANE[plan.plane]
    wanted = [(PLANES[plan.plane], 1), (row_axis, row_sign * turn), (column_axis, column_sign * turn)]
    voxels, steps = np.asarray(volume.voxels), []
    voxels = np.transpose(voxels, [nearest[axis] for axis, _ in wanted])
    for position, (axis, sign) in enumerate(wanted):
        step = lps[:, nearest[axis]]
        if step[axis] * sign < 0:
            voxels = np.flip(voxels, position)
            origin = origin + step * (voxels.shape[position] - 1)
            step = -step
        steps.append(step)
    along_slices, along_column, along_row = steps
    spacing = (float(np.linalg.norm(along_column)), float(np.linalg.norm(along_row)))
    cosines = [*(along_row / spacing[1]), *(along_column / spacing[0])]
    return Sliced(_to_stored(voxels), tuple(round(float(c), 12) for c in cosines), origin, along_slices, spacing)


def _axes_by_patient_direction(lps: NDArray[np.float64]) -> list[int]:
    """For each patient axis the voxel axis nearest to it."""
    share = np.abs(lps) / np.linalg.norm(lps, axis=0)
    nearest = [int(share[axis].argmax()) for axis in range(3)]
    if sorted(nearest) != [0, 1, 2]:
        raise ValueError(f"affine: its axes lie too far between the patient's to be sliced: {lps.tolist()}")
    return nearest


def _to_stored(voxels: NDArray[Any]) -> NDArray[np.uint16]:
    values = np.clip(np.nan_to_num(voxels.astype(np.float64)), 0.0, None)
    top = float(values.max(initial=0.0))
    if top > STORED_MAX:
        values = values * (STORED_MAX / top)
    return np.ascontiguousarray(np.rint(values).astype(np.uint16))


def classic_series(volume: Volume, plan: Plan | None = None) -> list[Dataset]:
    """Classic MR Image Storage: one dataset for each slice, in the order of position.

    Args:
        volume: in patient space.
        plan: how; None takes the defaults.

    Returns:
        Datasets with file meta information, ready for `part10` or a C-STORE.
    """
    plan = plan or Plan()
    sliced = slice_volume(volume, plan)
    return [_classic(sliced, plan, index) for index in range(len(sliced.stored))]


def _classic(sliced: Sliced, plan: Plan, index: int) -> Dataset:
    ds = _common(plan, MRImageStorage, plan.uid("instance", index))
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "NORM"]
    ds.ScanningSequence = ["GR", "IR"]
    ds.SequenceVariant = ["SK", "SP", "MP"]
    ds.ScanOptions = "IR"
    ds.RepetitionTime, ds.EchoTime, ds.InversionTime, ds.FlipAngle = "2300", "2.98", "900", "9"
    ds.EchoTrainLength, ds.EchoNumbers = "1", "1"
    ds.AngioFlag = "N"
    ds.SliceThickness = ds.SpacingBetweenSlices = _decimal(sliced.spacing_mm)
    ds.InstanceNumber = str(index + 1)
    ds.ImagePositionPatient = [_decimal(x) for x in sliced.position(index)]
    ds.ImageOrientationPatient = [_decimal(x) for x in sliced.orientation]
    ds.SliceLocation = _decimal(float(np.dot(sliced.position(index), sliced.step_mm) / sliced.spacing_mm))
    ds.PixelSpacing = [_decimal(x) for x in sliced.pixel_spacing_mm]
    if plan.slope is not None:
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", _decimal(plan.slope), "normalized"
    _put_pixels(ds, sliced.stored[index], plan)
    return _finish(ds, plan, index)


def enhanced_image(volume: Volume, plan: Plan | None = None, legacy: bool = False) -> Dataset:
    """Enhanced MR Image Storage: all slices of the volume as the frames of one dataset.

    Args:
        volume: in patient space.
        plan: how; None takes the defaults. Overrides apply to the top level.
        legacy: Legacy Converted Enhanced MR instead, which an archive makes of classic slices.
    """
    plan = plan or Plan()
    sliced = slice_volume(volume, plan)
    ds = _common(
        plan, LegacyConvertedEnhancedMRImageStorage if legacy else EnhancedMRImageStorage, plan.uid("enhanced")
    )
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    ds.VolumetricProperties, ds.ComplexImageComponent, ds.AcquisitionContrast = "VOLUME", "MAGNITUDE", "T1"
    ds.PixelPresentation, ds.VolumeBasedCalculationTechnique = "MONOCHROME", "NONE"
    ds.EchoPulseSequence, ds.EchoPlanarPulseSequence, ds.SteadyStatePulseSequence = "GRADIENT", "NO", "NONE"
    ds.PulseSequenceName = "*tfl3d1_16ns"
    ds.InstanceNumber = "1"
    ds.SharedFunctionalGroupsSequence = Sequence([_shared_groups(sliced, plan)])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [_frame_groups(sliced, index) for index in range(len(sliced.stored))]
    )
    _put_pixels(ds, sliced.stored, plan)
    return _finish(ds, plan, 0)


def _shared_groups(sliced: Sliced, plan: Plan) -> Dataset:
    timing = _dataset(RepetitionTime="2300", FlipAngle="9", EchoTrainLength="1")
    modifier = _dataset(InversionRecovery="YES", InversionTimes=[900.0], Spoiling="RF")
    thickness, spacing = _decimal(sliced.spacing_mm), [_decimal(x) for x in sliced.pixel_spacing_mm]
    groups = Dataset()
    groups.MRTimingAndRelatedParametersSequence = Sequence([timing])
    groups.MRModifierSequence = Sequence([modifier])
    groups.MREchoSequence = Sequence([_dataset(EffectiveEchoTime=2.98)])
    groups.PixelMeasuresSequence = Sequence(
        [_dataset(SliceThickness=thickness, SpacingBetweenSlices=thickness, PixelSpacing=spacing)]
    )
    cosines = [_decimal(x) for x in sliced.orientation]
    groups.PlaneOrientationSequence = Sequence([_dataset(ImageOrientationPatient=cosines)])
    kind = _dataset(FrameType=["ORIGINAL", "PRIMARY", "M", "NONE"], ComplexImageComponent="MAGNITUDE")
    groups.MRImageFrameTypeSequence = Sequence([kind])
    if plan.slope is not None:
        rescale = _dataset(RescaleIntercept="0", RescaleSlope=_decimal(plan.slope), RescaleType="US")
        groups.PixelValueTransformationSequence = Sequence([rescale])
    return groups


def _frame_groups(sliced: Sliced, index: int) -> Dataset:
    groups = Dataset()
    content = _dataset(StackID="1", InStackPositionNumber=index + 1, TemporalPositionIndex=1)
    content.DimensionIndexValues = [1, index + 1]
    groups.FrameContentSequence = Sequence([content])
    position = [_decimal(x) for x in sliced.position(index)]
    groups.PlanePositionSequence = Sequence([_dataset(ImagePositionPatient=position)])
    return groups


def _common(plan: Plan, sop_class_uid: UID, sop_instance_uid: str) -> Dataset:
    """What every image of a series says."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, sop_instance_uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID = plan.uid("study"), plan.uid("series", plan.series_number)
    ds.FrameOfReferenceUID = plan.uid("frame of reference")
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "MR", plan.manufacturer, "Made-up scanner"
    ds.PatientName, ds.PatientID = "Simulated^Head", "SIMULATED"
    ds.PatientBirthDate = ds.PatientSex = ds.StudyID = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.SeriesNumber, ds.AcquisitionNumber = str(plan.series_number), "1"
    ds.SeriesDescription = ds.ProtocolName = plan.description
    ds.ImageComments = NOTICE[:1024]
    ds.BodyPartExamined, ds.PatientPosition, ds.PositionReferenceIndicator = "HEAD", "HFS", ""
    ds.MRAcquisitionType, ds.MagneticFieldStrength, ds.ImagedNucleus = "3D", "3", "1H"
    return ds


def _dataset(**values: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters, as DS allows."""
    for digits in range(12, 0, -1):
        text = f"{value + 0.0:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"no decimal string of 16 characters for {value!r}")


def _put_pixels(ds: Dataset, stored: NDArray[np.uint16], plan: Plan) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        ds.NumberOfFrames = str(len(stored))
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    if plan.signed:
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 15, 1
    order = ">u2" if plan.transfer_syntax_uid == ExplicitVRBigEndian else "<u2"
    ds.PixelData = stored.astype(order).tobytes()
    ds["PixelData"].VR = "OW"


def _finish(ds: Dataset, plan: Plan, index: int) -> Dataset:
    """Apply the overrides and encode."""
    for keyword, value in plan.overrides.items():
        given = value(index) if callable(value) else value
        if given is None:
            if keyword in ds:
                del ds[keyword]
        else:
            setattr(ds, keyword, given)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = UID(plan.transfer_syntax_uid)
    ds.file_meta = meta
    if meta.TransferSyntaxUID.is_compressed:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(UID(plan.transfer_syntax_uid), generate_instance_uid=False)
    return ds


def part10(ds: Dataset) -> bytes:
    """The dataset as a DICOM file: zero preamble, file meta information, data."""
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def dataset_bytes(ds: Dataset) -> bytes:
    """The dataset alone, in its transfer syntax, as it travels in a C-STORE."""
    syntax = ds.file_meta.TransferSyntaxUID
    file = DicomBytesIO()
    file.is_little_endian = syntax.is_little_endian
    file.is_implicit_VR = syntax == ImplicitVRLittleEndian
    write_dataset(file, ds)
    data: bytes = file.getvalue()
    return data
