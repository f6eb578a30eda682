"""Facts about synthetic heads: replayable, exactly labelled, and clear errors for bad data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")

from training import anatomy as an  # noqa: E402
from training.__main__ import split_data  # noqa: E402


@pytest.fixture
def subject() -> an.Subject:
    """A ball of white matter in a shell of cortex in scalp, 90 x 100 x 110 voxels."""
    i, j, k = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in (90, 100, 110)), indexing="ij")
    r = np.sqrt(i**2 + j**2 + k**2)
    labels = np.select([r < 0.6, r < 0.75, r < 1.0], [2, 3, 530], 0)
    return an.Subject("ball", an.encode_labels(labels, "ball"))


@pytest.fixture
def draw() -> an.HeadDraw:
    return replace(an.draw_head(np.random.default_rng(3)), spacing_mm=(1.0, 1.0, 1.0), fov_mm=(120.0, 130.0, 140.0))


def test_same_draw_same_head(subject: an.Subject, draw: an.HeadDraw) -> None:
    """A draw replays its head exactly."""
    a, b = an.synthesise(subject, draw), an.synthesise(subject, draw)
    assert np.array_equal(a.clean.voxels, b.clean.voxels)
    assert np.array_equal(a.grey.voxels, b.grey.voxels)


def test_labels_fit_the_image(subject: an.Subject, draw: an.HeadDraw) -> None:
    """Grey and white matter have the drawn means where the masks say they lie."""
    means = list(draw.means)
    rows = list(an.TISSUES)
    means[rows.index("white")], means[rows.index("cortex")] = 1.0, 0.6
    quiet = replace(draw, means=tuple(means), bias=0.0, noise=0.005, psf_mm=0.25, masked_air=False)
    head = an.synthesise(subject, quiet)
    assert float(head.clean.voxels[head.white.voxels > 0].mean()) == pytest.approx(1.0, abs=0.03)
    assert float(head.clean.voxels[head.grey.voxels > 0].mean()) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (1.0, 1.0, 1.6)])
def test_affines_agree_between_image_and_masks(subject: an.Subject, draw: an.HeadDraw, spacing: tuple) -> None:
    """The white matter's centre of mass in millimetres is the same in the image and in its mask."""
    head = an.synthesise(subject, replace(draw, spacing_mm=spacing, bias=0.0, noise=0.004))
    centre = []
    for volume, level in ((head.clean, 0.0), (head.white, 0.5)):
        voxels = volume.voxels if level else np.where(volume.voxels > 0.05, 1.0, 0.0)
        at = np.argwhere(voxels > 0.5).mean(axis=0)
        centre.append(volume.affine[:3, :3] @ at + volume.affine[:3, 3])
    assert np.abs(centre[0] - centre[1]).max() < 1.5


def test_packing_is_lossless(subject: an.Subject, tmp_path: Path) -> None:
    """What is packed is read back code for code."""
    an.save_packed({"a": subject.codes, "b": subject.codes[:20]}, tmp_path / "x.xz")
    again = an.load_packed(tmp_path / "x.xz")
    assert [s.name for s in again] == ["a", "b"]
    assert np.array_equal(again[0].codes, subject.codes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: str(d / "nothing.xz"), "no such file"),
        (lambda d: _write(d / "junk.xz", b"junk"), "junk.xz"),
        (lambda d: _write(d / "scans.csv", b"name,image,labels\na,a.nii,b.nii\n"), "a.nii is missing"),
        (lambda d: _write(d / "scans.csv", b"who,what\n1,2\n"), "expected the columns"),
        (lambda d: _write(d / "scans.csv", b"name,image,labels\n"), "lists no scan"),
        (str, "no \\*.nii.gz"),
    ],
)
def test_bad_data_is_named(make, message: str, tmp_path: Path) -> None:
    """Every bad data argument ends with a sentence that names it."""
    with pytest.raises(ValueError, match=message):
        an.load_subjects(make(tmp_path))


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_bad_scans_are_named(tmp_path: Path) -> None:
    """An unreadable scan, another shape and voxels that are not numbers end with the file's name."""
    nibabel = pytest.importorskip("nibabel")
    good = np.ones((8, 8, 8), np.float32)
    holes = good.copy()
    holes[2, 2, 2] = np.nan
    for name, array in (("good", good), ("holes", holes), ("other", good[:4])):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii")
    (tmp_path / "junk.nii").write_bytes(b"junk")

    def scan(image: str, labels: str) -> an.RealScan:
        return an.RealScan("x", tmp_path / image, tmp_path / labels)

    with pytest.raises(ValueError, match=r"junk\.nii"):
        an.read_real(scan("junk.nii", "good.nii"))
    with pytest.raises(ValueError, match=r"other\.nii"):
        an.read_real(scan("good.nii", "other.nii"))
    with pytest.raises(ValueError, match=r"holes\.nii: 1 voxels"):
        an.read_real(scan("holes.nii", "good.nii"))


def test_real_head_is_read(tmp_path: Path) -> None:
    """A real scan with FreeSurfer labels gives a head with its grey matter, parcels included."""
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((8, 8, 8), np.int32)
    labels[2], labels[3], labels[4] = 3, 1012, 2
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.float32), np.eye(4)), tmp_path / "t1.nii")
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "seg.nii")
    head = an.read_real(an.RealScan("x", tmp_path / "t1.nii", tmp_path / "seg.nii"))
    assert head.grey.voxels.sum() == 2 * 64
    assert head.white.voxels.sum() == 64


def test_sources_joined_by_plus_are_split_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source gives to every split; an unknown one of five heads is cut 3, 1, 0, 1."""
    monkeypatch.setattr(an, "load_subjects", lambda name: [SimpleNamespace(name=f"{name}{i}") for i in range(5)])
    groups = {split: [s.name for s in subjects] for split, subjects in split_data("a+b").items()}
    assert groups == {
        "train": ["a0", "a1", "a2", "b0", "b1", "b2"],
        "val": ["a3", "b3"],
        "calibrate": [],
        "test": ["a4", "b4"],
    }
