"""What every image gets on top of its synthesis: flips and a bias field, the same for all twins of a sample.

Rotation and scale are drawn with the anatomy (`training.anatomy.HeadDraw`), before sampling, so they cost nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """One draw.

    Attributes:
        flip: per axis (R-L, A-P, S-I).
        gain: overall intensity factor.
        bias: 27 knots of a smooth log field, its strength included.
    """

    flip: tuple[bool, bool, bool]
    gain: float
    bias: tuple[float, ...]


def draw_augmentation(rng: Generator, flip_share: tuple[float, float, float]) -> Augmentation:
    """Draw flips with the given probability per axis, a gain of about 10 % and a bias field of about 10 %."""
    flip = [bool(rng.random() < p) for p in flip_share]
    strength = float(rng.uniform(0.0, 0.15))
    knots = tuple(float(v) for v in rng.normal(0.0, strength, 27))
    return Augmentation((flip[0], flip[1], flip[2]), float(rng.normal(1.0, 0.08)), knots)


def augment(images: Tensor, labels: Tensor, draw: Augmentation) -> tuple[Tensor, Tensor]:
    """Apply one draw to all twins of a sample.

    Args:
        images: (T, D, H, W) float32, negative values mark cells outside the field of view and stay negative.
        labels: (D, H, W).
        draw: what to do.

    Returns:
        Both, flipped; the images also shaded.
    """
    field = torch.tensor(draw.bias).reshape(1, 1, 3, 3, 3)
    field = F.interpolate(field, size=images.shape[1:], mode="trilinear", align_corners=True)[0, 0]
    images = images * (draw.gain * torch.exp(field))
    axes = [a for a, yes in enumerate(draw.flip) if yes]
    if axes:
        images, labels = torch.flip(images, [a + 1 for a in axes]), torch.flip(labels, axes)
    return images.contiguous(), labels.contiguous()
