"""Builders of what surrounds a network: cards, maps, prepared volumes and scores, all made up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from daemon.card import CARD_VERSION, Calibration, Card, parse_calibration
from daemon.prepare import Box, Prepared
from daemon.words import ARTEFACTS, Maps

SHAPE = (40, 48, 44)


def made_up_calibration(**changes: Any) -> Calibration:
    """A calibration with easy numbers: risk = ln(artefact_uncertainty_gm), Dice 0.9 at risk -4 falling to 0.3 at 0."""
    raw: dict[str, Any] = {
        "population": "made up",
        "risk": [{"score": "artefact_uncertainty_gm", "weight": 1.0, "floor": 1e-9}],
        "dice": {"x": [-4.0, 0.0], "y": [0.9, 0.3]},
        "bounds": [{"risk_upto": 1e9, "low": -0.05, "high": 0.05, "scans": 100}],
        "bound_rate": 0.05,
        "required_dice": 0.8,
        "alarm_risk": -3.0,
        "alarm_rate": 0.05,
        "alarm_confidence": 0.95,
        "alarm_scans": 120,
        "artefact_clean": [-6.0] * 5,
        "artefact_unmixing": np.eye(5).tolist(),
        "affected_variance": 0.1,
        "volume_width": {"x": [-4.0, 0.0], "y": [10.0, 40.0]},
        "gates": [],
        "samples": {},
    }
    return parse_calibration(raw | changes, "made up")


def made_up_card(calibration: Calibration | None = None) -> Card:
    """A card that belongs to no graph."""
    return Card(
        card_version=CARD_VERSION, name="made-up", version="0", artefacts=ARTEFACTS, input_name="image", outputs={},
        spacing_mm=2.0, orientation="RAS+", preparation="", buckets=((96, 112, 96),), temperature=1.0, graph_sha256="",
        opset=18, operators={}, weights=1, activation_bytes_per_voxel=1.0, gigaflops={}, precisions={}, intended_use="",
        limits=(), licence="", training={}, evaluation={}, calibration=calibration,
    )  # fmt: skip


def ball(radius: float, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.bool_]:
    """A ball in the middle of the grid."""
    grid = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    return np.asarray(np.sqrt(sum(g**2 for g in grid)) < radius)


def made_up_head(shape: tuple[int, int, int] = SHAPE) -> Prepared:
    """A head: scalp, fluid, a shell of grey matter around a brighter core; two slices of padding at the top."""
    outer, brain, core = ball(19, shape), ball(16, shape), ball(13, shape)
    image = np.where(core, 1.0, np.where(brain, 0.6, np.where(outer, 0.2, 0.0))).astype(np.float32)
    image += 0.02 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    native = np.ones(shape, dtype=bool)
    native[:, :, -2:] = False
    return Prepared(
        image=np.clip(image, 0, 4), native_mask=native, head_mask=outer & native, affine=np.diag([2.0, 2.0, 2.0, 1.0]),
        box=Box((0.0, 0.0, 0.0), shape), scale=1.0,
    )  # fmt: skip


def made_up_maps(prepared: Prepared, variance: float = 0.02, artefact: str | None = None, seed: int = 0) -> Maps:
    """Maps of `made_up_head`: the shell is grey matter; each channel at `variance`, or at a tenth but for one artefact."""
    rng = np.random.default_rng(seed)
    shape = prepared.image.shape
    shell = (prepared.image > 0.4) & (prepared.image < 0.8)
    p = np.clip(ndimage.gaussian_filter(shell.astype(np.float32), 0.5) + 0.01 * rng.random(shape), 0, 1).astype(
        np.float32
    )
    levels = np.full(5, variance if artefact is None else variance / 10)
    if artefact is not None:
        levels[ARTEFACTS.index(artefact)] = variance
    noise = 1.0 + 0.2 * rng.random((5, *shape))
    return Maps(p, np.full(shape, 0.05, np.float32), (levels[:, None, None, None] * noise).astype(np.float32))
