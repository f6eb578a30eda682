"""What a stage is judged by while it trains: Dice, and whether the uncertainty parts come apart (not the loss)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from daemon.words import ARTEFACTS
from training.bank import GREY, IMAGES, Case, to_input
from training.network import LOG_VARIANCE_MIN, UNet

OWN_RATIO = 2.0
"""A teacher has learnt its artefact when its own variance is this many times higher with it than without."""


@dataclass(frozen=True)
class Reading:
    """One image seen by one network.

    Attributes:
        dice: of the grey matter against the exact labels, inside the field of view.
        variances: (V,) mean sigma^2 in and around grey matter, task first.
        clamped: share of the voxels whose log-variance lies at its lower bound.
    """

    dice: float
    variances: NDArray[np.float64]
    clamped: float


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Overlap 2|A and B| / (|A| + |B|) in [0, 1]; two empty masks agree."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


@torch.no_grad()
def read(network: UNet, case: Case, image: int) -> Reading:
    """Run a network over a whole stored image."""
    device = next(network.parameters()).device
    values, native = to_input(case.images[image])
    with torch.autocast(device.type, torch.bfloat16):
        logits, log_variance = network(torch.from_numpy(values)[None, None].to(device))
    segmented = (logits[0, 1] > logits[0, 0]).cpu().numpy()
    grey = (case.labels & GREY) > 0
    near = ndimage.binary_dilation(grey) & native
    s = log_variance[0].float().cpu().numpy()
    return Reading(
        dice(segmented & native, grey & native), np.exp(s[:, near]).mean(axis=1), float((s <= LOG_VARIANCE_MIN).mean())
    )


def validate_task(network: UNet, cases: Sequence[Case]) -> dict[str, float]:
    """Dice on clean held-out heads; converged above 0.75."""
    readings = [read(network, c, 0) for c in cases]
    score = float(np.mean([r.dice for r in readings]))
    return {
        "dice_clean": score,
        "task_variance": float(np.mean([r.variances[0] for r in readings])),
        "clamped": float(np.mean([r.clamped for r in readings])),
        "converged": float(score > 0.75),
    }


def validate_teacher(network: UNet, cases: Sequence[Case], artefact: str) -> dict[str, float]:
    """Own variance with the artefact over without; converged when well above 1."""
    clean = [read(network, c, 0) for c in cases]
    bad = [read(network, c, IMAGES.index(f"{artefact}_{s}")) for c in cases for s in "ab"]
    ratio = float(np.mean([r.variances[1] for r in bad]) / np.mean([r.variances[1] for r in clean]))
    return {
        "dice_clean": float(np.mean([r.dice for r in clean])),
        "dice_artefact": float(np.mean([r.dice for r in bad])),
        "own_ratio": ratio,
        "own_clean": float(np.mean([r.variances[1] for r in clean])),
        "task_variance": float(np.mean([r.variances[0] for r in clean])),
        "clamped": float(np.mean([r.clamped for r in clean])),
        "converged": float(ratio > OWN_RATIO),
    }


def decoupling(network: UNet, cases: Sequence[Case]) -> tuple[NDArray[np.float64], list[Reading], list[float]]:
    """The 5x5 matrix: mean sigma_i^2 given artefact j over mean sigma_i^2 given a clean image (rows j, columns i).

    Returns:
        matrix, readings of clean images, Dice of images with one artefact.
    """
    clean = [read(network, c, 0) for c in cases]
    floor = np.mean([r.variances[1:] for r in clean], axis=0)
    rows, bad = [], []
    for artefact in ARTEFACTS:
        readings = [read(network, c, IMAGES.index(f"{artefact}_{s}")) for c in cases for s in "ab"]
        rows.append(np.mean([r.variances[1:] for r in readings], axis=0) / floor)
        bad += [r.dice for r in readings]
    return np.array(rows), clean, bad


def validate_student(network: UNet, cases: Sequence[Case]) -> dict[str, float]:
    """Dice and the decoupling matrix; converged when every row's largest entry is its own and well above 1."""
    matrix, clean, bad = decoupling(network, cases)
    own = np.diag(matrix)
    numbers = {
        "dice_clean": float(np.mean([r.dice for r in clean])),
        "dice_artefact": float(np.mean(bad)),
        "task_variance": float(np.mean([r.variances[0] for r in clean])),
        "clamped": float(np.mean([r.clamped for r in clean])),
    }
    for j, given in enumerate(ARTEFACTS):
        for i, part in enumerate(ARTEFACTS):
            numbers[f"ratio_{part}_given_{given}"] = float(matrix[j, i])
    numbers["converged"] = float(bool(np.all(matrix.argmax(axis=1) == np.arange(5)) and own.min() > OWN_RATIO))
    return numbers
