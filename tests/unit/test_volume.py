"""Volumes: the voxels and the affine that were sliced, from classic and Enhanced images, DICOM files and NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from daemon.dicom_write import PLANES, Plan, part10
from daemon.elements import split_file
from daemon.geometry import Geometry
from daemon.rules import match_rule
from daemon.volume import build_volume, read_nifti, volumes_from_path
from daemon.words import Array, Reason, Refusal, Volume
from tests.builders import build, build_classic_series, build_enhanced, little_stack, stacks_in, volume_of

SHAPE, SPACING = (14, 12, 10), (2.0, 2.25, 2.5)
HEAD = np.random.default_rng(11).integers(1, 2000, SHAPE).astype(np.uint16)


def world(volume: Volume) -> dict[tuple[float, float, float], float]:
    """Millimetres -> value of every voxel: what must not change however a volume is stored."""
    found = {}
    for index in np.ndindex(volume.voxels.shape):
        place = volume.affine @ [*index, 1.0]
        found[round(place[0], 3), round(place[1], 3), round(place[2], 3)] = float(volume.voxels[index])
    return found


TRUTH = world(volume_of(HEAD, SPACING))


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("reverse", [False, True], ids=["supine", "prone"])
def test_every_orientation_gives_the_same_voxels_in_patient_space(plane: str, reverse: bool) -> None:
    """Sagittal, coronal and axial, rows and columns either way: each voxel stays where it was."""
    images = build_classic_series(HEAD, SPACING, plane, plan=Plan(reverse_rows=reverse))
    (stack,) = stacks_in(images)
    assert isinstance(stack.geometry, Geometry)
    assert stack.geometry.plane == plane
    assert world(build(stack, images)) == TRUTH


@pytest.mark.parametrize("legacy", [False, True], ids=["Enhanced", "Legacy Converted"])
@pytest.mark.parametrize("plane", list(PLANES))
def test_classic_and_enhanced_give_the_same_volume_bit_for_bit(plane: str, legacy: bool) -> None:
    """The same head sent slice by slice and as one multi-frame image."""
    images = build_classic_series(HEAD, SPACING, plane, plan=Plan(slope=1.75))
    many = build_enhanced(HEAD, SPACING, plane, plan=Plan(slope=1.75), legacy=legacy)
    classic, enhanced = build(stacks_in(images)[0], images), build(stacks_in([many])[0], [many])
    np.testing.assert_array_equal(classic.voxels, enhanced.voxels)
    np.testing.assert_array_equal(classic.affine, enhanced.affine)


def test_highdicom_reads_the_same_enhanced_volume() -> None:
    """An oracle written by others: highdicom's own volume of the same Enhanced image."""
    import highdicom as hd

    ds = build_enhanced(HEAD, SPACING, "coronal")
    (stack,) = stacks_in([ds])
    ours = build(stack, [ds])
    theirs = hd.Image.from_dataset(ds).get_volume(
        apply_real_world_transform=False, apply_modality_transform=None, apply_voi_transform=False, dtype=np.float32
    )
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    assert world(ours) == world(Volume(np.asarray(theirs.array, np.float32), lps @ theirs.affine))


def test_legacy_conversion_by_highdicom_is_read() -> None:
    """A Legacy Converted image that an archive would make of the classic slices."""
    import highdicom as hd

    images = build_classic_series(HEAD, SPACING, "axial")
    many = hd.legacy.LegacyConvertedEnhancedMRImage(
        images, hd.UID(), 7, hd.UID(), 1, transfer_syntax_uid="1.2.840.10008.1.2.1"
    )
    (stack,) = stacks_in([many])
    assert world(build(stack, [many])) == TRUTH


def test_a_wrong_shape_in_one_image_is_refused() -> None:
    """Pixels that do not have the size of the others never enter a volume."""
    images = little_stack()
    (stack,) = stacks_in(images)
    small = part10(little_stack(side=6)[0])
    with pytest.raises(Refusal, match="bad_pixels"):
        build_volume(stack, lambda stored: small)


def test_an_empty_image_is_refused() -> None:
    """All pixels one value."""
    images = build_classic_series(np.full((8, 8, 12), 7, np.uint16), (2.5, 2.5, 2.5))
    with pytest.raises(Refusal, match="no_signal"):
        build(stacks_in(images)[0], images)


def test_a_volume_that_is_too_large_is_refused_before_it_is_read() -> None:
    """Rows and columns of the header are multiplied before memory is asked for."""
    images = little_stack(12, Rows=60000, Columns=60000)
    (stack,) = stacks_in(images)
    with pytest.raises(Refusal, match="too_large"):
        build_volume(stack, lambda stored: pytest.fail("read"))


def test_provenance_tells_no_one() -> None:
    """Facts of the acquisition are kept; names, dates, places and UIDs are not."""
    images = little_stack(StationName="CANARY", InstitutionName="CANARY", PatientName="CANARY", StudyDate="19990909")
    told = repr(build(stacks_in(images)[0], images).provenance)
    assert "CANARY" not in told
    assert "19990909" not in told
    assert str(images[0].SeriesInstanceUID) not in told
    assert "sagittal" in told


def test_a_folder_holds_stacks_nifti_and_things_to_leave_out(tmp_path: Path) -> None:
    """DICOM in subfolders, NIfTI beside it, text, DICOMDIR and hidden files."""
    (tmp_path / "sub").mkdir()
    for number, ds in enumerate(little_stack()):
        (tmp_path / "sub" / f"{number}").write_bytes(part10(ds))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / ".hidden").write_bytes(b"\0" * 128 + b"DICM")
    nib.save(nib.Nifti1Image(HEAD.astype(np.int16), np.diag([2, 2, 2, 1])), tmp_path / "a.nii.gz")
    nifti, dicom = volumes_from_path(tmp_path)
    assert nifti[0] is None
    assert isinstance(nifti[1], Volume)
    assert nifti[1].voxels.shape == SHAPE
    assert isinstance(dicom[1], Volume)
    assert dicom[1].voxels.shape == (8, 8, 12)
    assert dicom[2] == str(tmp_path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("left", ["the data set alone", "from the file meta information on", "from the prefix on"])
def test_files_without_their_beginning_are_read(tmp_path: Path, syntax: UID, left: str) -> None:
    """Preamble, prefix and file meta information missing, in each encoding: the same volume as from whole files."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    for folder in (whole, bare):
        folder.mkdir()
    for number, ds in enumerate(little_stack(plan=Plan(transfer_syntax_uid=str(syntax)))):
        data = part10(ds)
        start = {"the data set alone": split_file(data)[1], "from the prefix on": 128}.get(left, 132)
        (whole / f"{number}").write_bytes(data)
        (bare / f"{number}").write_bytes(data[start:])
    ((_, expected, _),), ((_, found, _),) = volumes_from_path(whole), volumes_from_path(bare)
    assert isinstance(found, Volume)
    assert isinstance(expected, Volume)
    assert np.array_equal(found.voxels, expected.voxels)
    assert np.allclose(found.affine, expected.affine)


@pytest.mark.parametrize(
    "data", [b"", b"\x08\0", b"\x08\0\x05\0CS\x0a\0ISO_IR 100", b"\x08\0" + bytes(600), b"MZ" + bytes(300)]
)
def test_what_only_looks_like_a_data_set_is_left_out(tmp_path: Path, data: bytes) -> None:
    """Nothing that names no image is taken for one."""
    (tmp_path / "file").write_bytes(data)
    assert list(volumes_from_path(tmp_path)) == []


def test_nothing_comes_from_an_empty_folder(tmp_path: Path) -> None:
    """No image, no stack."""
    assert list(volumes_from_path(tmp_path)) == []


@pytest.mark.parametrize(
    ("shape", "affine", "expected"),
    [
        ((4, 4), np.eye(4), "no_geometry"),
        ((4, 4, 4), np.diag([0.0, 1, 1, 1]), "no_geometry"),
        ((4, 4, 4, 3), np.eye(4), (4, 4, 4)),
    ],
)
def test_nifti_of_odd_shapes(tmp_path: Path, shape: tuple[int, ...], affine: Array, expected: object) -> None:
    """A plane is no volume; of a 4D file the first volume counts."""
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    image = nib.Nifti1Image(values, None)
    image.header.set_sform(affine, code=1)
    nib.save(image, tmp_path / "x.nii")
    found = read_nifti(tmp_path / "x.nii")
    assert (found.voxels.shape if isinstance(found, Volume) else found.reason.code) == expected


def test_a_file_that_only_looks_like_nifti_is_refused(tmp_path: Path) -> None:
    """No traceback, a reason."""
    for name in ("a.nii", "b.nii.gz", "c.mgz"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 30)
        found = read_nifti(tmp_path / name)
        assert isinstance(found, Refusal), name


def test_real_folders_give_what_is_allowed(shared_data: Path) -> None:
    """Every real series ends as the rule that admits it, or as its refusal."""
    expected = {
        "acr_ge": {"two_dimensional"},
        "acr_siemens": {"two_dimensional"},
        "ge_mprage_grid_phantom": {"t1_head_3d"},
        "philips_1901": {"no_rule"},
        "philips_2001": {"phase", "thick_slices"},
        "philips_mprage": {"t1_head_3d"},
        "siemens_2d_t1_hfp": {"two_dimensional"},
        "siemens_2d_t1_hfs": {"two_dimensional"},
        "siemens_xa30_enhanced_a": {"t1_head_3d"},
        "siemens_xa30_enhanced_b": {"t1_head_3d"},
        "transfer_syntaxes": {"mosaic"},
    }
    from daemon.volume import find_files, stacks_from_files

    for name, wanted in expected.items():
        stacks = [stack for stack, _ in stacks_from_files(sorted(find_files(shared_data / "dicom" / name)))]
        found = [match_rule(stack, ()) for stack in stacks]
        assert {f.code if isinstance(f, Reason) else f.name for f in found} == wanted, name


@pytest.mark.parametrize(
    ("plane", "reverse", "enhanced"),
    [("sagittal", False, False), ("coronal", True, False), ("axial", False, False), ("axial", True, True)],
)
def test_the_network_sees_the_same_head_however_it_was_sliced_and_stored(
    plane: str, reverse: bool, enhanced: bool
) -> None:
    """Slicing, prone or supine, classic or Enhanced: the prepared image differs by rounding alone, so the scores do too."""
    from daemon.prepare import prepare
    from tests.builders import head_phantom

    head = head_phantom((102, 90, 77), 2.5)
    spacing = (2.5, 2.5, 2.5)
    plan = Plan(reverse_rows=reverse)
    images = (
        [build_enhanced(head, spacing, plane, plan=plan)]
        if enhanced
        else build_classic_series(head, spacing, plane, plan=plan)
    )
    seen = prepare(build(stacks_in(images)[0], images))
    truth = prepare(volume_of(head, spacing))
    assert seen.box.shape == truth.box.shape
    np.testing.assert_allclose(seen.image, truth.image, rtol=1e-4, atol=1e-4)
