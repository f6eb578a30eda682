"""The 3D U-Net with two heads (Shaw 2021, section 6; NiftyNet's "no new net").

Departure: no instance normalisation. Its statistics depend on how much air is around the head and on the crop, so
weights trained on one size fail on another (docs/decisions/0010). Convolutions are weight-standardised instead: each
filter has zero mean and unit variance by construction, which keeps the signal's scale without looking at the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.02
"""Negative slope of the leaky ReLU in NiftyNet."""

LOG_VARIANCE_MIN, LOG_VARIANCE_MAX = -9.7, 11.0
"""Range of s = log sigma^2 in which exp(s) is a normal float16 number (ln 2^-14, ln 65504)."""


@dataclass(frozen=True)
class NetworkConfig:
    """Size of the network.

    Attributes:
        widths: channels per level, finest first; the input must be divisible by 2 ** (len(widths) - 1).
        variances: number of log-variance channels: 1 (task), 2 (teacher: task, its artefact), 6 (student).
        up: form of the trilinear x2 upsampling, `resize`, `transpose` or `stencil`; all three are the same function.
    """

    widths: tuple[int, ...] = (8, 24, 48, 96, 96)
    variances: int = 6
    up: str = "resize"


class StandardConv(nn.Module):
    """3x3x3 convolution whose filters are standardised (zero mean, unit variance) times a learnt gain."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        # He's scale for a leaky ReLU over the fan-in: keeps the variance of the features from layer to layer.
        self.scale = math.sqrt(2.0 / (1.0 + LEAK**2)) / math.sqrt(cin * 27)
        # The length of a filter does not matter to the output, but Adam's step is absolute: short filters turn quickly.
        self.weight = nn.Parameter(torch.randn(cout, cin, 3, 3, 3) * self.scale)
        self.gain = nn.Parameter(torch.ones(cout))
        self.bias = nn.Parameter(torch.zeros(cout))

    def folded(self) -> Tensor:
        """The plain convolution weight, (cout, cin, 3, 3, 3)."""
        w = self.weight
        mean = w.mean(dim=(1, 2, 3, 4), keepdim=True)
        std = (w - mean).square().mean(dim=(1, 2, 3, 4), keepdim=True).add(1e-8).sqrt()
        return (w - mean) / std * (self.gain * self.scale)[:, None, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, D, H, W) -> (N, cout, D, H, W)."""
        return F.conv3d(x, self.folded(), self.bias, padding=1)


class Block(nn.Module):
    """conv3-leaky-conv3-leaky."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.first = StandardConv(cin, cout)
        self.second = StandardConv(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, D, H, W) -> (N, cout, D, H, W)."""
        return F.leaky_relu(self.second(F.leaky_relu(self.first(x), LEAK)), LEAK)


class UNet(nn.Module):
    """Encoder, decoder with skips, two 1x1x1 heads.

    Forward takes an image (N, 1, D, H, W) and returns logits (N, 2, D, H, W) and log-variances (N, V, D, H, W), both
    float32, the latter clamped to [LOG_VARIANCE_MIN, LOG_VARIANCE_MAX].
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        w = config.widths
        self.down = nn.ModuleList(Block(1 if i == 0 else w[i - 1], w[i]) for i in range(len(w)))
        self.squeeze = nn.ModuleList(nn.Conv3d(w[i + 1], w[i], 1) for i in range(len(w) - 1))
        self.upward = nn.ModuleList(Block(2 * w[i], w[i]) for i in range(len(w) - 1))
        self.logits = nn.Conv3d(w[0], 2, 1)
        self.log_variance = nn.Conv3d(w[0], config.variances, 1)
        nn.init.zeros_(self.log_variance.weight)
        # About 0.5 each: exp(s) passes gradients on in proportion to itself, so a channel that starts small stays small.
        self.log_variance.bias = nn.Parameter(torch.full((config.variances,), -0.7))

    def features(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> (N, widths[0], D, H, W): what both heads see."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool3d(x, 2))
            skips.append(x)
        for i in reversed(range(len(self.upward))):
            # Channels are reduced before upsampling, as in NiftyNet: the same result, an eighth of the work.
            x = upsample(self.squeeze[i](x), self.config.up)
            x = self.upward[i](torch.cat([skips[i], x], dim=1))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and log-variances of an image."""
        features = self.features(x).float()
        with torch.autocast(x.device.type, enabled=False):
            log_variance = self.log_variance(features).clamp(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX)
            return self.logits(features), log_variance


def upsample(x: Tensor, form: str) -> Tensor:
    """Trilinear x2 with half-pixel centres and replicated edges; three forms of one function.

    Raises:
        ValueError: an unknown form.
    """
    if form == "resize":
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    if form == "transpose":
        return _upsample_transpose(x)
    if form == "stencil":
        return _upsample_stencil(x)
    raise ValueError(f"up: expected resize, transpose or stencil, got {form!r}")


def _upsample_transpose(x: Tensor) -> Tensor:
    """One fixed depthwise transposed convolution of the edge-padded map, then a crop."""
    c = x.shape[1]
    line = x.new_tensor([0.25, 0.75, 0.75, 0.25])
    kernel = (line[:, None, None] * line[None, :, None] * line[None, None, :]).expand(c, 1, 4, 4, 4)
    y = F.conv_transpose3d(F.pad(x, (1,) * 6, mode="replicate"), kernel, stride=2, padding=1, groups=c)
    return y[:, :, 2:-2, 2:-2, 2:-2]


def _upsample_stencil(x: Tensor) -> Tensor:
    """Nearest x2, then [1, 2, 1] / 4 along each axis with replicated edges."""
    c = x.shape[1]
    for axis in (2, 3, 4):
        x = x.repeat_interleave(2, dim=axis)
    line = x.new_tensor([0.25, 0.5, 0.25])
    x = F.pad(x, (1,) * 6, mode="replicate")
    for axis in range(3):
        shape = [c, 1, 1, 1, 1]
        shape[2 + axis] = 3
        x = F.conv3d(x, line.reshape([3 if a == axis else 1 for a in range(3)]).expand(shape), groups=c)
    return x


def save_network(network: UNet, path: Path, **facts: Any) -> None:
    """Write a checkpoint atomically: `config`, `weights` (float32) and any facts.

    Raises:
        OSError: the disk is full or the folder cannot be written; an earlier file at `path` stays whole.
    """
    temporary = path.with_suffix(path.suffix + ".part")
    torch.save({"config": asdict(network.config), "weights": network.state_dict(), **facts}, temporary)
    temporary.replace(path)


def load_network(path: Path) -> tuple[UNet, dict[str, Any]]:
    """Read a checkpoint written by `save_network`; weights may be half precision.

    Returns:
        The network in evaluation mode and the whole checkpoint.

    Raises:
        ValueError: the file is no checkpoint of ours; the message names it.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        network = UNet(NetworkConfig(tuple(config["widths"]), config["variances"], config["up"]))
        network.load_state_dict({k: v.float() for k, v in checkpoint["weights"].items()})
    except (KeyError, TypeError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path.name}: not a Rescan checkpoint ({error}); train one with rescan-train cascade"
        ) from error
    return network.eval(), checkpoint


def warm_start(network: UNet, weights: dict[str, Tensor]) -> None:
    """Copy trunk, logits and the task's variance channel from a network with fewer variance channels."""
    own = network.state_dict()
    for name, value in weights.items():
        if own[name].shape == value.shape:
            own[name] = value.float()
        else:
            own[name][: value.shape[0]] = value.float()
    network.load_state_dict(own)


def parameters_count(network: nn.Module) -> int:
    """Number of learnt values."""
    return sum(p.numel() for p in network.parameters())


def conv_gflop(widths: Sequence[int], shape: tuple[int, int, int], variances: int = 6) -> float:
    """Floating-point operations of one forward pass in 10^9, convolutions only, 2 per multiply-add."""
    total, voxels = 0.0, float(shape[0] * shape[1] * shape[2])
    for i, w in enumerate(widths):
        at = voxels / 8**i
        total += at * 27 * ((1 if i == 0 else widths[i - 1]) * w + w * w)
        if i + 1 < len(widths):
            total += at * 27 * (2 * w * w + w * w) + at / 8 * widths[i + 1] * w
    return 2e-9 * (total + voxels * widths[0] * (2 + variances))
