"""The losses of Shaw 2021, each with its equation number, and the forms we measured against them.

Shapes: logits (N, 2, D, H, W), labels (N, D, H, W) int64 (0 other, 1 grey matter), variances (N, C, D, H, W),
weight (N, D, H, W) float32, 0 outside the field of view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Likelihood = Literal["paper", "exact", "faithful"]
LIKELIHOODS: tuple[Likelihood, ...] = ("paper", "exact", "faithful")

SSIM_WEIGHT = 0.1
"""lambda in Eq. 7."""

REGRESSION_WEIGHT = 3.0
"""Of the faithful form's variances against its cross entropy: few voxels carry an artefact's part."""

CE_MAX = 5.0
"""A voxel that is wrong with more certainty than this teaches the variance no more."""

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Parts:
    """What a loss is made of, for the log.

    Attributes:
        total: what is minimised.
        ce: mean cross entropy.
        likelihood: mean of the attenuated part (Eq. 4).
        consistency: Eq. 7, summed over the variances it holds for; 0 in the task stage.
        weight_p99: 99th percentile of the voxel weight 1 / (sigma^2 + eps): large values announce instability.
    """

    total: Tensor
    ce: Tensor
    likelihood: Tensor
    consistency: Tensor
    weight_p99: Tensor


def mean_parts(parts: Sequence[Parts]) -> Parts:
    """The mean over several images of each number."""
    return Parts(*(torch.stack([getattr(p, f.name) for p in parts]).mean() for f in fields(Parts)))


def masked_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of (N, D, H, W) values over the field of view."""
    return (values * weight).sum() / weight.sum().clamp_min(1.0)


def heteroscedastic(
    logits: Tensor, labels: Tensor, variance: Tensor, eps: float, form: Likelihood
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood per voxel, and the plain cross entropy per voxel.

    Args:
        logits: (N, 2, D, H, W) unscaled.
        labels: (N, D, H, W) int64.
        variance: (N, D, H, W) total sigma^2 >= 0 (Eq. 5: the task's plus every artefact's).
        eps: added once, to the total, in both terms (L3, L5).
        form: `paper`: Eq. 4, CE / (s2 + eps) + 0.5 log(s2 + eps), whose minimum over s2 lies at s2 + eps = 2 CE;
            `exact`: CE of softmax(f / (s2 + eps)) (Eq. 1 and 2 without the approximation);
            `faithful`: the plain cross entropy here; the variances are regressed apart from it (`mean_consistency`).

    Returns:
        (N, D, H, W) both.

    Raises:
        ValueError: an unknown form.
    """
    ce = F.cross_entropy(logits, labels, reduction="none")
    total = variance + eps
    if form == "paper":
        return ce / total + 0.5 * torch.log(total), ce
    if form == "faithful":
        return ce, ce
    if form == "exact":
        return F.cross_entropy(logits / total.unsqueeze(1), labels, reduction="none"), ce
    raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {form!r}")


def consistency(predicted: Tensor, target: Tensor, weight: Tensor, channels: Tensor | None = None) -> Tensor:
    """Eq. 7 on variances (not their logarithms): L1 + gradient L1 + 0.1 SSIM.

    Args:
        predicted: (N, C, D, H, W) sigma^2.
        target: (N, C, D, H, W) sigma^2 of the frozen networks.
        weight: (N, D, H, W).
        channels: (C,) weight of each channel; None is 1 each (L5).

    Returns:
        Weighted sum over the C channels.
    """
    w = weight.unsqueeze(1)
    loss = channel_mean((predicted - target).abs(), w)
    loss = (
        loss + sum(channel_mean((_step(predicted, a) - _step(target, a)).abs(), _both(w, a)) for a in (2, 3, 4)) / 3.0
    )
    loss = loss + SSIM_WEIGHT * channel_mean(ssim_loss(predicted, target), w)
    return loss.sum() if channels is None else (loss * channels).sum()


def mean_consistency(log_variance: Tensor, target: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """The faithful form's regression of a variance on its target: exp(s) - target * s, least at the target's mean.

    Against Eq. 4 and Eq. 7, whose minima it shares where the target is certain, its gradient exp(s) - target neither
    explodes where the variance is small nor dies there. Eq. 4 weighs a voxel by 1 / (s2 + eps)^2, so that a few wrong
    voxels in the air outweigh the cortex; Eq. 7's L1 has its minimum at the median, which is zero for an artefact that
    is in fewer than half of the images, until the network can tell it apart (docs/decisions/0011).

    Args:
        log_variance: (N, C, D, H, W) s.
        target: (N, C, D, H, W) sigma^2 >= 0; a negative one has no minimum.
        weight: (N, D, H, W).
        channels: (C,) weight of each channel.
    """
    loss = channel_mean(torch.exp(log_variance) - target * log_variance, weight.unsqueeze(1))
    return REGRESSION_WEIGHT * (loss * channels).sum()


def channel_mean(values: Tensor, weight: Tensor) -> Tensor:
    """(C,) mean over everything but the channel."""
    dims = (0, 2, 3, 4)
    return (values * weight).sum(dims) / weight.sum().clamp_min(1.0)


def _step(x: Tensor, axis: int) -> Tensor:
    """Forward difference along one axis."""
    return x.narrow(axis, 1, x.shape[axis] - 1) - x.narrow(axis, 0, x.shape[axis] - 1)


def _both(w: Tensor, axis: int) -> Tensor:
    """Weight of a difference: both of its voxels count."""
    return w.narrow(axis, 1, w.shape[axis] - 1) * w.narrow(axis, 0, w.shape[axis] - 1)


def ssim_loss(x: Tensor, y: Tensor) -> Tensor:
    """(1 - SSIM) / 2 in [0, 1] per voxel with a 3x3x3 mean filter, edges counted by what they hold (L6)."""

    def mean(v: Tensor) -> Tensor:
        return F.avg_pool3d(v, 3, stride=1, padding=1, count_include_pad=False)

    mx, my = mean(x), mean(y)
    vx, vy = mean(x * x) - mx * mx, mean(y * y) - my * my
    cov = mean(x * y) - mx * my
    ssim = (2 * mx * my + SSIM_C1) * (2 * cov + SSIM_C2) / ((mx**2 + my**2 + SSIM_C1) * (vx + vy + SSIM_C2))
    return ((1.0 - ssim) / 2.0).clamp(0.0, 1.0)


def combine(
    logits: Tensor,
    log_variance: Tensor,
    labels: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    eps: float,
    form: Likelihood,
    channels: Tensor | None = None,
    own: int | None = None,
    clean_ce: Tensor | None = None,
) -> Parts:
    """The loss of any stage: task (Eq. 4), teacher (Eq. 6) or student (the sum over artefacts).

    Args:
        logits: (N, 2, D, H, W).
        log_variance: (N, 1 + A, D, H, W): the task's, then one per artefact.
        labels: (N, D, H, W).
        weight: (N, D, H, W).
        targets: (N, T, D, H, W) sigma^2 of the frozen networks, which the first T variances shall equal; None: task.
        eps: see `heteroscedastic`.
        form: see `heteroscedastic`.
        channels: (T,) weights of the targets.
        own: variance that has no target and takes what the task leaves of 2 CE; used by the faithful form, in which it
            is regressed on the local mean of what the artefact adds to 2 CE.
        clean_ce: (N, D, H, W) cross entropy of the same network on the clean twin; None: the image is the clean one.
    """
    variance = torch.exp(log_variance)
    total = variance.sum(dim=1)
    nll, ce = heteroscedastic(logits, labels, total, eps, form)
    likelihood, held = masked_mean(nll, weight), nll.new_zeros(())
    if form == "faithful":
        held = _regressed(log_variance, ce, weight, targets, eps, channels, own, clean_ce)
    elif targets is not None:
        held = consistency(variance[:, : targets.shape[1]], targets, weight, channels)
    weight_p99 = torch.quantile((1.0 / (total.detach() + eps)).flatten()[::97], 0.99)
    return Parts(likelihood + held, masked_mean(ce, weight).detach(), likelihood.detach(), held.detach(), weight_p99)


def _regressed(
    log_variance: Tensor,
    ce: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    eps: float,
    channels: Tensor | None,
    own: int | None,
    clean_ce: Tensor | None,
) -> Tensor:
    """The faithful form's part for the variances; see `combine`."""
    if targets is None:
        left = (2.0 * ce.detach().clamp_max(CE_MAX) - eps).unsqueeze(1)
        return mean_consistency(log_variance, left.clamp_min(0.0), weight, left.new_ones(1))
    weights = targets.new_ones(targets.shape[1]) if channels is None else channels
    held = mean_consistency(log_variance[:, : targets.shape[1]], targets, weight, weights)
    if own is None:
        return held
    added = torch.zeros_like(ce) if clean_ce is None else excess(ce.detach(), clean_ce)
    return held + mean_consistency(log_variance[:, own : own + 1], added.unsqueeze(1), weight, targets.new_ones(1))


def excess(ce: Tensor, clean_ce: Tensor) -> Tensor:
    """What an artefact adds to 2 CE, as a mean over 5x5x5 voxels, not below zero.

    Both come from the same network and the same labels, so that what is hard about the anatomy cancels: an artefact
    nobody can see adds nothing. One voxel's cross entropy is a coin thrown once; only a neighbourhood tells an excess
    from luck.

    Args:
        ce: (N, D, H, W) cross entropy with the artefact.
        clean_ce: (N, D, H, W) on the clean twin.
    """
    added = 2.0 * (ce.clamp_max(CE_MAX) - clean_ce.clamp_max(CE_MAX))
    return F.avg_pool3d(added, 5, stride=1, padding=2, count_include_pad=False).clamp_min(0.0)
