"""The training loop: it resumes exactly, and nothing that goes wrong costs a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")

from training import loop  # noqa: E402
from training.loss import combine  # noqa: E402
from training.network import NetworkConfig, UNet  # noqa: E402

CPU = torch.device("cpu")


def make_stage(steps: int = 6, fail_at: int | None = None, nan_at: int | None = None) -> loop.Stage:
    """A tiny task stage whose samples depend on the step number alone."""
    torch.manual_seed(0)
    network = UNet(NetworkConfig((2, 4), 1))

    def loss(step: int, eps: float, model):
        if step == fail_at:
            raise KeyboardInterrupt
        g = torch.Generator().manual_seed(step)
        image = torch.rand((1, 1, 8, 8, 8), generator=g)
        if step == nan_at:
            image = image * float("nan")
        logits, s = model(image)
        labels = (image[:, 0] > 0.5).long()
        return combine(logits, s, labels, torch.ones_like(image[:, 0]), None, eps, "faithful")

    return loop.Stage("task", network, loss, lambda n: {"converged": 1.0}, loop.Schedule(steps, 1e-3, 0.05, 2))


def test_interrupted_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped at any step and started again ends with the same weights."""
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = make_stage()
    loop.train(whole, tmp_path / "a", CPU, 3, {})
    with pytest.raises(KeyboardInterrupt):
        loop.train(make_stage(fail_at=4), tmp_path / "b", CPU, 3, {})
    resumed = make_stage()
    loop.train(resumed, tmp_path / "b", CPU, 3, {})
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_finished_stage_is_not_repeated(tmp_path: Path) -> None:
    """A second call reads the checkpoint and takes no step."""
    loop.train(make_stage(), tmp_path, CPU, 3, {"profile": "x"})
    again = loop.train(make_stage(fail_at=0), tmp_path, CPU, 3, {})
    assert again["profile"] == "x"
    assert (tmp_path / "task.curve.jsonl").read_text().count("\n") == 2


def test_half_precision_weights_restart_without_optimizer(tmp_path: Path) -> None:
    """A state of float16 weights alone continues where it stopped."""
    stage = make_stage()
    weights = {k: v.half() for k, v in stage.network.state_dict().items()}
    torch.save({"weights": weights, "step": 5}, tmp_path / "task.state")
    assert loop.train(stage, tmp_path, CPU, 3, {})["steps"] == 6


def test_not_a_number_stops_with_the_step(tmp_path: Path) -> None:
    """A loss that is not a number ends the stage and leaves no checkpoint of it."""
    with pytest.raises(loop.Diverged, match="step 2"):
        loop.train(make_stage(nan_at=2), tmp_path, CPU, 3, {})
    assert not (tmp_path / "task.pt").exists()


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be written leaves the one before it whole."""
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        loop.train(make_stage(fail_at=2), tmp_path, CPU, 3, {})
    before = (tmp_path / "task.state").read_bytes()

    def full(obj: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(make_stage(), tmp_path, CPU, 3, {})
    assert (tmp_path / "task.state").read_bytes() == before


def test_schedule_halves_rate_and_epsilon_together() -> None:
    """Both fall by half at the same steps."""
    schedule = loop.Schedule(400, 1e-3, 0.05, 4)
    values = [schedule.at(s) for s in (99, 100, 200, 399)]
    assert [v[0] / 1e-3 for v in values] == pytest.approx([1, 0.5, 0.25, 0.125])
    assert [v[1] / 0.05 for v in values] == pytest.approx([1, 0.5, 0.25, 0.125])
