"""Volumes against dcm2niix, an oracle written by others, on every real series that can be scored."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from daemon.volume import volumes_from_path
from daemon.words import Volume
from tests.builders import build_classic_series, head_phantom, part10

SCORABLE = ("philips_mprage", "siemens_xa30_enhanced_a", "siemens_xa30_enhanced_b", "ge_mprage_grid_phantom")

pytestmark = pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix (Debian package) is not installed")


def dcm2niix(folder: Path, out: Path) -> Volume:
    """What dcm2niix makes of a folder with one series."""
    out.mkdir()
    # -p n: the values that the scanner displays, not Philips' floating point scale. -m n: one file per series.
    command = ["dcm2niix", "-b", "n", "-z", "n", "-p", "n", "-m", "n", "-f", "out", "-o", str(out), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (path,) = out.glob("*.nii")
    image = nib.load(path)
    return Volume(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine))


def ours(folder: Path) -> Volume:
    """What Rescan makes of it."""
    (found,) = volumes_from_path(folder)
    assert isinstance(found[1], Volume)
    return found[1]


def agree(one: Volume, other: Volume, off_mm: float) -> None:
    """The same voxels at the same places, whatever the order of storage."""
    mapping = np.linalg.inv(other.affine) @ one.affine
    axes = np.abs(np.rint(mapping[:3, :3])).astype(int)
    np.testing.assert_allclose(np.abs(mapping[:3, :3]), axes, atol=1e-3)
    order = [int(axes[:, i].argmax()) for i in range(3)]
    assert sorted(order) == [0, 1, 2]
    turned = np.transpose(other.voxels, order)
    for axis in range(3):
        if mapping[order[axis], axis] < 0:
            turned = np.flip(turned, axis)
    assert turned.shape == one.voxels.shape
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(one.voxels.shape) - 1)
    for corner in corners:
        there = mapping @ [*corner, 1.0]
        nearest = other.affine @ [*np.rint(there[:3]), 1.0]
        assert np.linalg.norm((one.affine @ [*corner, 1.0] - nearest)[:3]) < off_mm
    np.testing.assert_allclose(turned, one.voxels, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", SCORABLE)
def test_a_real_series_agrees_with_dcm2niix(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Affine to a hundredth of a millimetre at every corner, and every voxel."""
    folder = shared_data / "dicom" / name
    agree(ours(folder), dcm2niix(folder, tmp_path / "out"), 0.01)


def test_the_derived_series_agrees_with_dcm2niix(shared_data: Path, tmp_path: Path) -> None:
    """384 slices of 0.7 mm, Implicit VR."""
    with tarfile.open(shared_data / "dicom" / "derived_t1_defaced_0p7mm.tar.gz") as archive:
        archive.extractall(tmp_path / "in", filter="data")
    agree(ours(tmp_path / "in"), dcm2niix(tmp_path / "in", tmp_path / "out"), 0.02)


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
def test_a_made_up_series_agrees_with_dcm2niix(tmp_path: Path, plane: str) -> None:
    """What `rescan simulate` writes is read by others as it was meant."""
    folder = tmp_path / "in"
    folder.mkdir()
    images = build_classic_series(head_phantom((32, 28, 24), 8.0), (2.0, 2.25, 2.5), plane)
    for number, ds in enumerate(images):
        (folder / f"{number}.dcm").write_bytes(part10(ds))
    agree(ours(folder), dcm2niix(folder, tmp_path / "out"), 0.01)
