"""Facts about the network that preparation, training and export rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training tests need the training extra")

from training import network as net  # noqa: E402

SMALL = net.NetworkConfig((4, 6, 8), 6)


@pytest.mark.parametrize("form", ["transpose", "stencil"])
def test_upsampling_forms_are_one_function(form: str) -> None:
    """Every form equals trilinear resizing, edges included."""
    x = torch.randn((1, 3, 5, 4, 6), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net.upsample(x, form), net.upsample(x, "resize"), atol=1e-5)


def test_unknown_form_is_named() -> None:
    """An unknown form is an error that shows it."""
    with pytest.raises(ValueError, match="cubic"):
        net.upsample(torch.zeros(1, 1, 2, 2, 2), "cubic")


def test_signal_keeps_its_scale_at_the_start() -> None:
    """Untrained features neither vanish nor explode through the levels."""
    torch.manual_seed(0)
    network = net.UNet(net.NetworkConfig((8, 12, 16, 16), 6))
    with torch.no_grad():
        features = network.features(torch.randn(1, 1, 32, 32, 32))
    assert 0.1 < float(features.std()) < 10.0


def test_air_around_the_head_changes_nothing_inside() -> None:
    """No spatial statistics: 32 more voxels of air leave the centre as it was."""
    torch.manual_seed(0)
    network = net.UNet(SMALL).eval()
    image = torch.rand(1, 1, 32, 32, 32)
    image[..., :12] = 0.0
    image[..., -12:] = 0.0
    wide = torch.nn.functional.pad(image, (0, 32))
    with torch.no_grad():
        a, b = network(image)[0], network(wide)[0][..., :32]
    assert torch.allclose(a[..., 8:20], b[..., 8:20], atol=1e-4)


def test_log_variance_is_clamped() -> None:
    """exp(s) always is a normal float16 number."""
    network = net.UNet(SMALL)
    network.log_variance.bias.data[:] = torch.tensor([-50.0, 50, 0, 0, 0, 0])
    s = network(torch.zeros(1, 1, 16, 16, 16))[1].detach()
    assert float(s[:, 0].max()) == pytest.approx(net.LOG_VARIANCE_MIN)
    assert float(s[:, 1].min()) == pytest.approx(net.LOG_VARIANCE_MAX)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    """What is saved is read back, also from half precision; foreign files are refused by name."""
    network = net.UNet(SMALL)
    net.save_network(network, tmp_path / "a.pt", stage="student")
    again, checkpoint = net.load_network(tmp_path / "a.pt")
    assert checkpoint["stage"] == "student"
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.eval()(x)[0], again(x)[0])
    torch.save({"foreign": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt"):
        net.load_network(tmp_path / "b.pt")


def test_teacher_starts_from_the_task() -> None:
    """A warm start copies trunk, segmentation and the task's variance, and adds a channel."""
    task, teacher = net.UNet(net.NetworkConfig(SMALL.widths, 1)), net.UNet(net.NetworkConfig(SMALL.widths, 2))
    net.warm_start(teacher, task.state_dict())
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        (a, s), (b, t) = task.eval()(x), teacher.eval()(x)
    assert torch.equal(a, b)
    assert torch.allclose(s, t[:, :1])
