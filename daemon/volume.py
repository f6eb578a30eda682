"""Stack -> volume in patient space; or a refusal with its reason.

Slices are decoded and rescaled one by one before they are stacked. Files (a DICOM folder or file, NIfTI, MGZ) come in by
the same door, for `rescan score` and `rescan explain`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.uid import ExplicitVRLittleEndian

from daemon.decode import decode
from daemon.dicom_file import as_part10
from daemon.elements import NotUnderstood, split_file
from daemon.geometry import Geometry
from daemon.header import Header, read_header
from daemon.prepare import MAX_VOXELS
from daemon.reasons import REASONS
from daemon.series import stacks_of
from daemon.spool import StoredInstance
from daemon.stack import Stack
from daemon.words import Array, Refusal, Volume

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")

_PROVENANCE = ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "MagneticFieldStrength", "PatientPosition")
"""Attributes worth keeping with a result. None tells who, where or when."""


def build_volume(stack: Stack, read: Callable[[StoredInstance], bytes]) -> Volume:
    """Decode a stack into a volume.

    Args:
        stack: from `series`, its planes in the order of position.
        read: gives the bytes of an instance, as a data set or as a file.

    Returns:
        The volume: voxels (columns, rows, slices), affine in RAS+ millimetres.

    Raises:
        Refusal: what the geometry lacks, or `too_large`, `colour`, `bad_pixels`, `unsupported_encoding`.
    """
    if not isinstance(stack.geometry, Geometry):
        raise Refusal(stack.geometry.code, stack.geometry.text)
    header = stack.representative
    shape = (len(stack.planes), header.rows, header.columns)
    if int(np.prod([float(n) for n in shape])) > MAX_VOXELS:
        raise Refusal("too_large", f"The volume has {shape} voxels; at most {MAX_VOXELS} are read.")
    slices = np.empty(shape, dtype=np.float32)
    places: dict[int, list[tuple[int, int]]] = {}
    for place, plane in enumerate(stack.planes):
        places.setdefault(plane.instance, []).append((place, plane.frame))
    for number, stored in enumerate(stack.instances):
        pixels = decode(read(stored), stored.transfer_syntax_uid)
        for place, frame in places[number]:
            if frame >= len(pixels.stored) or pixels.stored.shape[1:] != shape[1:]:
                raise Refusal("bad_pixels", f"The pixels have the shape {pixels.stored.shape}; expected {shape[1:]}.")
            pixels.write_frame(frame, slices[place])
    return Volume(_checked(slices).transpose(2, 1, 0), stack.geometry.affine_ras(), provenance(stack))


def _checked(slices: Array) -> Array:
    if not np.isfinite(slices).all():
        raise Refusal("bad_pixels", "The image holds values that are not numbers.")
    if float(slices.max()) <= float(slices.min()):
        raise Refusal("no_signal", "The image is empty: all its pixels have one value.")
    return slices


def provenance(stack: Stack) -> dict[str, Any]:
    """Facts of the acquisition worth keeping with the result; nothing that tells who, where or when."""
    header, geometry = stack.representative, stack.geometry
    facts: dict[str, Any] = {name: header.attributes[name] for name in _PROVENANCE if name in header.attributes}
    facts["encoding"] = stack.instances[0].transfer_syntax_uid
    if isinstance(geometry, Geometry):
        facts |= {
            "plane": geometry.plane,
            "oblique_deg": round(geometry.oblique_deg, 2),
            "spacing_mm": [round(s, 4) for s in geometry.spacing_mm],
            "matrix": [header.columns, header.rows, geometry.slices],
        }
    return facts


# --- Files ------------------------------------------------------------------------------------------------------------

Found = tuple[Stack | None, Volume | Refusal, str]
"""A stack (None for NIfTI), its volume or why there is none, and where it came from."""


def volumes_from_path(path: Path) -> Iterator[Found]:
    """Every volume in a file or folder, one at a time.

    Args:
        path: a DICOM file or folder (with its subfolders), or a NIfTI or MGZ file or a folder of them.

    Yields:
        Stacks in the order of their first file's name; files that are neither image nor DICOM are left out.
    """
    files = sorted(find_files(path))
    for file in files:
        if is_nifti(file):
            yield None, read_nifti(file), str(file)
    for stack, paths in stacks_from_files([file for file in files if not is_nifti(file)]):
        yield stack, _volume_or_refusal(stack, paths), str(path)


def _volume_or_refusal(stack: Stack, paths: dict[str, Path]) -> Volume | Refusal:
    try:
        return build_volume(stack, lambda stored: read_dicom(paths[stored.sha256]))
    except Refusal as refusal:
        return refusal


def read_dicom(path: Path) -> bytes:
    """A DICOM file with its preamble, whether it lies there with one or not."""
    data = path.read_bytes()
    return as_part10(data) or data


def find_files(path: Path) -> Iterator[Path]:
    """The file, or every file in the folder and its subfolders, hidden ones and DICOMDIR aside."""
    if path.is_file():
        yield path
        return
    for folder, _, names in os.walk(path):
        for name in names:
            if not name.startswith(".") and name != "DICOMDIR":
                yield Path(folder) / name


def stacks_from_files(files: list[Path]) -> list[tuple[Stack, dict[str, Path]]]:
    """Stacks in DICOM files, each with the path of every instance by its hash."""
    paths: dict[str, Path] = {}
    instances: list[tuple[StoredInstance, Header | Refusal]] = []
    for position, file in enumerate(files, 1):
        data = as_part10(file.read_bytes())
        if data is None:
            continue
        header: Header | Refusal
        try:
            header = read_header(data)
        except Refusal as refusal:
            header = refusal
        stored = _stored(data, position, header)
        paths.setdefault(stored.sha256, file)
        instances.append((stored, header))
    return [(stack, paths) for stack in stacks_of(instances)]


def _stored(data: bytes, position: int, header: Header | Refusal) -> StoredInstance:
    """The record that the spool would keep of a file."""
    sha256 = hashlib.sha256(data).hexdigest()
    found = header if isinstance(header, Header) else Header(sop_instance_uid=sha256)
    return StoredInstance(
        position=position,
        segment=0,
        offset=0,
        size_bytes=len(data),
        sha256=sha256,
        sop_class_uid=found.sop_class_uid,
        sop_instance_uid=found.sop_instance_uid,
        transfer_syntax_uid=_syntax(data),
        scanner="unknown",
        association=0,
        received_at=0.0,
    )


def _syntax(data: bytes) -> str:
    try:
        return split_file(data)[0]
    except NotUnderstood:
        return str(ExplicitVRLittleEndian)


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI or FreeSurfer volume."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def read_nifti(path: Path) -> Volume | Refusal:
    """A NIfTI or MGZ file as a volume; of a 4D file the first volume. It has no header to be matched."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, SpatialImage

    try:
        image = nib.load(path)
        if not isinstance(image, SpatialImage) or len(image.shape) < 3:
            return Refusal("no_geometry", f"The file holds no volume: its shape is {getattr(image, 'shape', ())}.")
        if int(np.prod([float(n) for n in image.shape[:3]])) > MAX_VOXELS:
            return Refusal("too_large", f"The volume has {image.shape} voxels; at most {MAX_VOXELS} are read.")
        first = image.dataobj[(..., *[0] * (len(image.shape) - 3))]
        voxels = np.asarray(first, dtype=np.float32)
        affine = np.asarray(image.affine, dtype=np.float64)
    except (ImageFileError, HeaderDataError, OSError, ValueError, EOFError, MemoryError, TypeError):
        return Refusal("bad_pixels", REASONS["bad_pixels"])
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        return Refusal("no_geometry", REASONS["no_geometry"])
    try:
        return Volume(_checked(voxels), affine, {"source": path.name.rsplit(".", 1)[-1].lower()})
    except Refusal as refusal:
        return refusal
