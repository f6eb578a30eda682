"""Laws of the artefact physics: what must hold for any image."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")

from daemon.words import ARTEFACTS  # noqa: E402
from training import kspace as ks  # noqa: E402

ONE_MM = (1.0, 1.0, 1.0)


@pytest.fixture
def head() -> torch.Tensor:
    """A smooth body with inner structure, 48 x 56 x 40, float32 in 0..1."""
    i, j, k = torch.meshgrid(*(torch.linspace(-1.2, 1.2, n) for n in (48, 56, 40)), indexing="ij")
    body = (i**2 + j**2 + k**2 < 1.0).float()
    inner = ((i - 0.2) ** 2 + (j + 0.1) ** 2 + k**2 < 0.2).float()
    return body * (0.6 + 0.1 * torch.sin(9 * i)) + 0.3 * inner


def test_transform_round_trip(head: torch.Tensor) -> None:
    """The inverse transform gives the image back, and a centred delta is flat."""
    assert torch.allclose(ks.ifft3(ks.fft3(head)).real, head, atol=1e-5)
    delta = torch.zeros(8, 9, 10)
    delta[4, 4, 5] = 1.0
    assert torch.allclose(ks.fft3(delta), torch.ones(8, 9, 10, dtype=torch.complex64), atol=1e-5)


def test_parseval(head: torch.Tensor) -> None:
    """Energy in k-space is the number of voxels times the energy in the image."""
    assert float(ks.fft3(head).abs().square().sum()) == pytest.approx(
        head.numel() * float(head.square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_axis_transform_agrees_with_numpy(head: torch.Tensor, axis: int) -> None:
    """The centred transform along one axis is NumPy's, shifted."""
    shifted = np.fft.ifftshift(head.numpy(), axes=axis)
    expected = np.fft.fftshift(np.fft.fft(shifted, axis=axis), axes=axis)
    assert np.allclose(ks.fft1(head, axis).numpy(), expected, atol=1e-3)


def test_nothing_drawn_changes_nothing(head: torch.Tensor) -> None:
    """No artefact is the identity."""
    assert torch.equal(ks.apply(head, ks.Corruption(), ONE_MM), head)


@pytest.mark.parametrize(
    "corruption",
    [
        ks.Corruption(noise=ks.Noise(200.0, 1)),
        ks.Corruption(spike=ks.Spike((5, 3, 2), 0.0, 1.0)),
        ks.Corruption(blur=ks.Blur((1.0, 1.0, 1.0))),
        ks.Corruption(mask=ks.LineMask(1, 0, 0, 0.0, 1)),
        ks.Corruption(fold=ks.FoldOver(1, 0.0)),
        ks.Corruption(motion=ks.Motion(1, (0.4,), ((0.0, 0.0, 0.0),), ((0.0, 0.0, 0.0),))),
    ],
    ids=["noise", "spike", "blur", "mask", "fold", "motion"],
)
def test_zero_strength_is_identity(head: torch.Tensor, corruption: ks.Corruption) -> None:
    """An artefact of strength zero leaves the image as it was."""
    assert torch.allclose(ks.apply(head, corruption, ONE_MM), head, atol=2e-5)


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 20.0, 40.0])
def test_noise_has_the_asked_snr(head: torch.Tensor, snr_db: float) -> None:
    """Signal power over noise power, measured in k-space, is within 0.1 dB of what was asked."""
    noise = ks.add_noise(head, ks.Noise(snr_db, 3)) - head
    measured = 10 * torch.log10(ks.fft3(head).abs().square().mean() / ks.fft3(noise).abs().square().mean())
    assert abs(float(measured) - snr_db) < 0.1


def test_spike_lies_at_the_asked_frequency(head: torch.Tensor) -> None:
    """The difference in k-space is one sample, of the asked size and phase, at the asked place."""
    spike = ks.Spike((7, -11, 4), 0.5, 0.8)
    difference = ks.fft3(ks.add_spike(head, spike)) - ks.fft3(head.to(torch.complex64))
    at = tuple(n // 2 + a for n, a in zip(head.shape, spike.at, strict=True))
    peak = difference[at].clone()
    assert float(peak.abs()) == pytest.approx(0.5 * float(head.sum()), rel=1e-3)
    assert float(peak.angle()) == pytest.approx(0.8, abs=1e-3)
    difference[at] = 0
    assert float(difference.abs().max()) < 1e-3 * float(peak.abs())


def test_blur_removes_exactly_the_asked_band(head: torch.Tensor) -> None:
    """Samples inside n / ratio stay, all others become zero."""
    k = ks.fft3(ks.truncate(head, ks.Blur((2.0, 1.0, 4.0))))
    full = ks.fft3(head)
    inside = torch.zeros(head.shape, dtype=torch.bool)
    (a, b), (e, f) = ks.kept_band(48, 2.0), ks.kept_band(40, 4.0)
    assert (b - a, f - e) == (24, 10)
    inside[a:b, :, e:f] = True
    assert torch.allclose(k[inside], full[inside], atol=1e-2)
    assert float(k[~inside].abs().max()) < 1e-2


def test_dropped_lines_are_zero_and_the_centre_stays(head: torch.Tensor) -> None:
    """Each n-th line is gone, but never the centre and its neighbours."""
    keep = ks.line_pattern(56, ks.LineMask(1, 4, 0, 0.0, 1))
    assert keep[27:30].tolist() == [1, 1, 1]
    assert keep[:5].tolist() == [0, 1, 1, 1, 0]
    k = ks.fft1(ks.drop_lines(head, ks.LineMask(1, 4, 0, 0.0, 1)), 1)
    assert float(k[:, keep == 0].abs().max()) < 1e-4


def test_fold_over_moves_by_the_field_of_view() -> None:
    """A point outside the smaller field of view appears one field of view away."""
    image = torch.zeros(8, 40, 8)
    image[4, 2, 4] = 1.0
    fold = ks.FoldOver(1, 0.25)
    low, high = ks.fold_bounds(40, fold)
    assert (low, high) == (5, 35)
    out = ks.fold_over(image, fold)
    assert float(out[4, 2 + (high - low), 4]) == 1.0
    assert float(out.sum()) == 1.0


def test_translation_is_exact() -> None:
    """A pose held during the whole acquisition is demeaned away; the pose itself is an exact circular shift."""
    image = torch.rand(16, 16, 16)
    k = ks._shift_voxels(ks.fft3(image), [3.0, -2.0, 0.0])
    assert torch.allclose(ks.ifft3(k).real, torch.roll(image, (3, -2), (0, 1)), atol=1e-5)


def test_poses_compose_to_an_identity_mean() -> None:
    """The weighted mean of demeaned small poses is no motion."""
    rotations = np.array([[0, 0, 0], [0.02, 0, -0.01], [0.01, 0.03, 0]])
    shifts = np.array([[0, 0, 0], [2.0, 0, 0], [0, -1.0, 3.0]])
    poses = ks.demeaned_poses(rotations, shifts, np.array([0.2, 0.5, 0.3]))
    mean = np.average([p[:3, 3] for p in poses], axis=0, weights=[0.2, 0.5, 0.3])
    assert np.abs(mean).max() < 0.05
    for pose in poses:
        assert np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_moved_volume_stays_registered(head: torch.Tensor, seed: int) -> None:
    """After demeaning, the corrupted volume lies within half a voxel of the clean one."""
    motion = ks.draw_motion(np.random.default_rng(seed), ks.PRODUCT)
    moved = ks.move(head, motion, ONE_MM)
    shift = ks.registration_shift(ks.fft3(head), ks.fft3(moved))
    assert float(shift.abs().max()) < 0.5


def pose_at(motion: ks.Motion, moment: float) -> tuple[float, ...]:
    """Rotation and translation that hold at a moment of the acquisition; none before the first change."""
    last = sum(t <= moment for t in motion.times) - 1
    return (*motion.rotations_deg[last], *motion.translations_mm[last]) if last >= 0 else (0.0,) * 6


def test_a_restless_head_often_rests_while_the_middle_is_filled() -> None:
    """Half of the draws leave the middle of k-space alone, and move before and after; the same record replays."""
    draws = [ks.draw_restless(np.random.default_rng(seed), ks.PRODUCT) for seed in range(200)]
    at_rest = [d for d in draws if not any(pose_at(d, 0.5))]
    assert 80 <= len(at_rest) <= 125
    for motion in at_rest:
        assert any(pose_at(motion, 0.999))
        assert list(motion.times) == sorted(motion.times)
    record = json.loads(json.dumps(ks.Corruption(motion=draws[0]).record()))
    assert ks.Corruption.from_record(record).motion == draws[0]


def test_ghosts_of_a_restless_head_leave_it_in_place(head: torch.Tensor) -> None:
    """The middle of k-space, filled at rest, is that of the clean head; what was filled in other poses is not."""
    motion = ks.Motion(1, (0.2, 0.4, 0.6), ((4.0, 0, 0), (0, 0, 0), (0, 5.0, 0)), ((3.0, 0, 0), (0, 0, 0), (0, 2.0, 0)))
    clean, moved = ks.fft3(head), ks.fft3(ks.move(head, motion, ONE_MM))
    change = ((moved - clean).abs().square().sum((0, 2)) / clean.abs().square().sum((0, 2))).numpy()
    middle = len(change) // 2
    assert change[middle - 2 : middle + 3].max() < 0.02
    assert change[:8].min() > 0.1


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_same_record_same_volume(head: torch.Tensor, artefact: str) -> None:
    """A record replays its sample exactly, also after a trip through JSON."""
    shape = (head.shape[0], head.shape[1], head.shape[2])
    draw = ks.draw(np.random.default_rng(5), ks.PRODUCT, shape, (artefact,))
    again = ks.Corruption.from_record(json.loads(json.dumps(draw.record())))
    assert again == draw
    assert torch.equal(ks.apply(head, draw, ONE_MM), ks.apply(head, again, ONE_MM))


def _error(head: torch.Tensor, corruption: ks.Corruption) -> float:
    return float((ks.apply(head, corruption, ONE_MM) - head).abs().mean())


@pytest.mark.parametrize(
    ("mild", "severe"),
    [
        (ks.Corruption(noise=ks.Noise(30, 1)), ks.Corruption(noise=ks.Noise(5, 1))),
        (ks.Corruption(spike=ks.Spike((5, 3, 2), 0.1, 1)), ks.Corruption(spike=ks.Spike((5, 3, 2), 2.0, 1))),
        (ks.Corruption(blur=ks.Blur((1.2, 1, 1))), ks.Corruption(blur=ks.Blur((6.0, 1, 1)))),
        (ks.Corruption(fold=ks.FoldOver(0, 0.1)), ks.Corruption(fold=ks.FoldOver(0, 0.4))),
        (
            ks.Corruption(motion=ks.Motion(1, (0.45,), ((0.5, 0, 0),), ((0.3, 0, 0),))),
            ks.Corruption(motion=ks.Motion(1, (0.45,), ((8.0, 0, 0),), ((5.0, 0, 0),))),
        ),
    ],
    ids=["noise", "spike", "blur", "fold", "motion"],
)
def test_stronger_is_worse(head: torch.Tensor, mild: ks.Corruption, severe: ks.Corruption) -> None:
    """More of an artefact leaves a larger error."""
    assert _error(head, severe) > 1.5 * _error(head, mild)


@pytest.mark.gpu
@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_cpu_equals_gpu(head: torch.Tensor, artefact: str) -> None:
    """The same record gives the same volume on CPU and GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU half of this law cannot be shown here")
    draw = ks.draw(np.random.default_rng(5), ks.PRODUCT, (48, 56, 40), (artefact,))
    on_gpu = ks.apply(head.cuda(), draw, ONE_MM).cpu()
    assert torch.allclose(ks.apply(head, draw, ONE_MM), on_gpu, atol=1e-3)


def test_unknown_record_is_refused() -> None:
    """A record with an artefact that does not exist ends with its name."""
    with pytest.raises(ValueError, match="glow"):
        ks.Corruption.from_record({"glow": {}})
