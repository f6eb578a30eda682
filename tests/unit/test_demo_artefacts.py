"""The demo's artefacts are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import default_rng
from scipy import ndimage

from daemon.demo.artefacts import NODS, Pose, mean_displacement_mm, with_motion, with_spike
from daemon.words import Volume


@pytest.fixture(scope="module")
def volume() -> Volume:
    image = np.zeros((20, 32, 32), np.float32)
    image[4:16, 6:26, 8:28] = 100.0
    image += default_rng(0).uniform(0, 5, image.shape).astype(np.float32)
    return Volume(np.asarray(ndimage.gaussian_filter(image, 1.0)), np.eye(4))


def test_a_patient_who_lies_still(volume: Volume) -> None:
    """Poses that do not differ from none change nothing."""
    still = with_motion(volume, (Pose(0.0, 0.0, 0.0, 0.0), Pose(0.5, 0.0, 0.0, 0.0)))
    np.testing.assert_allclose(still.voxels, volume.voxels, atol=1e-3)


def test_a_shift_held_throughout(volume: Volume) -> None:
    """One pose for the whole scan is a rigid shift, forward and up."""
    moved = with_motion(volume, (Pose(0.0, 0.0, 2.0, 1.0),)).voxels
    expected = np.roll(volume.voxels, (2, 1), axis=(1, 2))
    np.testing.assert_allclose(moved[:, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], atol=1e-3)


def test_a_nod_turns_the_nose_up(volume: Volume) -> None:
    """A positive nod moves what lies in front upwards, about the middle."""
    moved = with_motion(volume, (Pose(0.0, 10.0, 0.0, 0.0),)).voxels
    rows = np.arange(32)
    front = [
        (image[:, 19:22].sum(axis=(0, 1)) * rows).sum() / image[:, 19:22].sum() for image in (volume.voxels, moved)
    ]
    assert front[1] > front[0] + 0.5


def test_motion_ghosts_along_the_phase_direction(volume: Volume) -> None:
    """Motion leaves signal outside the head, in front and behind; never to the sides of it."""
    change = np.abs(with_motion(volume, NODS).voxels - volume.voxels)
    assert change[6:14, :3].mean() > 5 * change[:2, 10:22].mean()


def test_mean_displacement() -> None:
    """A shift is its own displacement; a turn moves points on a sphere by the root of 2/3 of angle times radius.

    The demo's own lies in the middle of the published trajectories, whose median is 6.4 mm.
    """
    assert mean_displacement_mm((Pose(0.0, 0.0, 3.0, 4.0),)) == pytest.approx(5.0)
    turn = mean_displacement_mm((Pose(0.0, 2.0, 0.0, 0.0),))
    assert turn == pytest.approx(np.sqrt(2 / 3) * np.deg2rad(2.0) * 64.0)
    assert 5.8 < mean_displacement_mm() < 7.0


def test_spike_is_one_sample(volume: Volume) -> None:
    """Before the magnitude, a spike is one sample of k-space; in the magnitude image its frequency still stands out."""
    spiked = with_spike(volume, 0.2, 0.25).voxels
    spectrum = np.abs(np.fft.fftn(spiked - volume.voxels))
    spectrum[0, 0, 0] = 0.0
    peak = np.unravel_index(int(spectrum.argmax()), spectrum.shape)
    n = np.asarray(spiked.shape)
    place = np.round(0.25 * n / 2).astype(int)
    assert tuple(peak) in {tuple(place), tuple((n - place) % n)}


def test_stronger_spike_is_worse(volume: Volume) -> None:
    """The stripes grow with the spike; no spike, no stripes."""
    errors = [float(np.abs(with_spike(volume, size).voxels - volume.voxels).mean()) for size in (0.0, 0.1, 0.5, 1.0)]
    assert errors[0] == pytest.approx(0.0, abs=1e-4)
    assert errors == sorted(errors)
