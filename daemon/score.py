"""Maps -> scores: every number that Rescan states about a scan, defined once.

Two steps. `reduce_maps` takes sums over masks and along slices, and nothing else, so that the same reduction can run where
the maps are (on a GPU it is a small graph of its own, see `export/reducer.py`) and only a few kilobytes are copied back.
`score_reduced` turns those sums into scores with the calibration of the card.

Only cells inside the acquired field of view count, never padding. *Region* below is the predicted grey matter
(probability above 0.5) grown by one cell (2 mm); where less than `MIN_GM_ML` of it is left it is the head instead, so that
a scan whose grey matter cannot be found any more still has a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from daemon.card import Calibration, Card, Knots
from daemon.prepare import BUCKETS, SPACING_MM, Prepared
from daemon.words import ARTEFACTS, Array, Maps

VOXEL_ML = SPACING_MM**3 / 1000.0
BOX_CELLS = math.prod(BUCKETS[0])
"""What a mean over the box is a mean over, however much of it was acquired: more air around the head makes no better scan
(docs/decisions/0093)."""

GM_PROBABILITY = 0.5
REGION_CELLS = 1
"""Growth of the predicted grey matter: artefacts are seen at its borders."""

MIN_GM_ML = 50.0
"""Less predicted grey matter than a tenth of the smallest adult's: the region is then the head."""

RING_CELLS = 2
RING_PROBABILITY = 0.05
"""White matter is looked for within 4 mm of grey matter, where grey matter is improbable."""

MIN_RING_ML = 20.0
EDGE_PLANES = 2
"""The outermost plane of cells may lie half outside the field of view."""

MIN_SLICE_SHARE = 0.1
"""A slice needs this share of the largest slice's region to be named the worst."""

TINY = 1e-12


@dataclass(frozen=True)
class Definition:
    """What a score means.

    Attributes:
        text: definition in words and symbols.
        unit: unit, or "1" for a plain number.
        low, high: ends of the range; None where there is no end.
        good: `low`, `high` or `none` (no good end).
    """

    text: str
    unit: str
    low: float | None
    high: float | None
    good: str


SCORES: dict[str, Definition] = {
    "predicted_dice": Definition(
        "Dice overlap that the grey-matter segmentation of this scan is predicted to reach: a decreasing function of the risk",
        "1",
        0.0,
        1.0,
        "high",
    ),
    "predicted_dice_low": Definition("Lower conformal bound of predicted_dice", "1", 0.0, 1.0, "high"),
    "predicted_dice_high": Definition("Upper conformal bound of predicted_dice", "1", 0.0, 1.0, "high"),
    "risk": Definition(
        "Sum of weighted logarithms of the uncertainties, as the model's calibration says; only its order has a meaning",
        "1",
        None,
        None,
        "low",
    ),
    "artefact_uncertainty": Definition(
        "Shaw 2021, Eq. 9: mean over the box around the head (8.3 l) of the sum of the artefact variances sigma_i^2, "
        "cells outside the acquired field of view counting as 0",
        "1",
        0.0,
        None,
        "low",
    ),
    "artefact_uncertainty_gm": Definition("The same mean over the region around grey matter", "1", 0.0, None, "low"),
    "task_uncertainty": Definition("Mean of sigma_t^2 over the region around grey matter", "1", 0.0, None, "low"),
    "entropy": Definition(
        "Mean over the box around the head (8.3 l) of -p ln p - (1-p) ln(1-p), p the temperature-scaled probability, "
        "cells outside the acquired field of view counting as 0",
        "nat",
        0.0,
        0.6932,
        "low",
    ),
    "entropy_gm": Definition("The same mean over the region around grey matter", "nat", 0.0, 0.6932, "low"),
    "gm_volume_ml": Definition(
        "Expected volume of grey matter: sum of p times the cell volume",
        "ml",
        0.0,
        None,
        "none",
    ),
    "gm_volume_error_ml": Definition(
        "Half-width of the 95 % interval of gm_volume_ml: calibrated multiple of the root of the sum of p(1-p)",
        "ml",
        0.0,
        None,
        "low",
    ),
    "gm_affected_share": Definition(
        "Share of predicted grey matter where the sum of artefact variances exceeds the level that 95 % of clean grey matter stays under",
        "1",
        0.0,
        1.0,
        "low",
    ),
    "snr": Definition(
        "Shaw 2021, Eq. 10: mean over standard deviation of the intensity in predicted grey matter",
        "1",
        0.0,
        None,
        "high",
    ),
    "cnr": Definition(
        "Shaw 2021, Eq. 11: distance of the mean intensities of grey and white matter over the deviation in grey matter; "
        "white matter is taken as the tissue within 4 mm of grey matter that is brighter than it",
        "1",
        0.0,
        None,
        "high",
    ),
}
"""Every key of `Scores.flat`, with its meaning; also published in the result schema."""

RAW_SCORES = (
    "artefact_uncertainty",
    "artefact_uncertainty_gm",
    "task_uncertainty",
    "entropy",
    "entropy_gm",
    "cross_entropy_per_gm",
    "expected_dice_loss",
    *(f"artefact_{name}_gm" for name in ARTEFACTS),
)
"""What a risk can be made of: scores that need no calibration."""

LEAST_DOUBT = 1e-4
"""Added to a raw score before its logarithm becomes a gate's feature: a smaller one is none."""

PLANES = ("sagittal", "coronal", "axial")
THIRDS = (
    (
        "left third of the head",
        "middle third of the head, left to right",
        "right third of the head",
    ),
    (
        "back third of the head",
        "middle third of the head, back to front",
        "front third of the head",
    ),
    (
        "lower third of the head",
        "middle third of the head, bottom to top",
        "upper third of the head",
    ),
)
"""Axes R, A, S: the index grows to the right, to the front, to the top."""

PROFILES = ("gm", "head", "region", "variance")

SUMS = (
    "gm_cells",
    "region_cells",
    "head_cells",
    "task_region",
    "entropy_fov",
    "entropy_region",
    "gm_sum",
    "gm_sum_inside",
    "gm_variance",
    "confidence_head",
    "gm_intensity",
    "gm_intensity_square",
    "ring_cells",
    "bright_cells",
    "bright_intensity",
    "affected_cells",
)
"""Order of the plain sums in the output of the reducing graph."""


@dataclass(frozen=True)
class Reduced:
    """Sums of one scan; the counts are cells of `VOXEL_ML`.

    Attributes:
        gm_cells, region_cells, head_cells: sizes of the masks.
        artefact_fov, artefact_region: (5,) float64, sums of sigma_i^2.
        task_region: sum of sigma_t^2.
        entropy_fov, entropy_region: sums in nat.
        gm_sum, gm_variance: sums of p and of p(1-p) over the field of view. gm_sum_inside: of p over predicted grey matter.
        confidence_head: sum over the head of max(p, 1-p).
        gm_intensity, gm_intensity_square: sums over grey matter.
        ring_cells, bright_cells, bright_intensity: the surroundings of grey matter, and the brighter part of them.
        affected_cells: grey matter above the card's `affected_variance`; 0 without a calibration.
        profiles: three (4, n) float64, sums per slice along each axis, rows as in `PROFILES`.
    """

    gm_cells: float
    region_cells: float
    head_cells: float
    artefact_fov: NDArray[np.float64]
    artefact_region: NDArray[np.float64]
    task_region: float
    entropy_fov: float
    entropy_region: float
    gm_sum: float
    gm_sum_inside: float
    gm_variance: float
    confidence_head: float
    gm_intensity: float
    gm_intensity_square: float
    ring_cells: float
    bright_cells: float
    bright_intensity: float
    affected_cells: float
    profiles: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

    @staticmethod
    def from_sums(sums: Mapping[str, NDArray[np.floating]]) -> Reduced:
        """Build from the outputs of the reducing graph: `sums` (as `SUMS`), `artefacts` (2, 5) and three profiles.

        Raises:
            ValueError: a sum that is not finite.
        """
        values = np.asarray(sums["sums"], dtype=np.float64).ravel()
        artefacts = np.asarray(sums["artefacts"], dtype=np.float64)
        if not (np.isfinite(values).all() and np.isfinite(artefacts).all()):
            raise ValueError("a map holds values that are not finite; the engine or the model is at fault")
        profiles = [np.asarray(sums[name], dtype=np.float64) for name in ("profile_r", "profile_a", "profile_s")]
        return Reduced(
            **{name: float(value) for name, value in zip(SUMS, values, strict=True)},
            artefact_fov=artefacts[0],
            artefact_region=artefacts[1],
            profiles=(profiles[0], profiles[1], profiles[2]),
        )


@dataclass(frozen=True)
class WorstSlice:
    """The slice of one plane with the highest mean artefact variance around grey matter.

    Attributes:
        plane: `sagittal`, `coronal` or `axial`.
        index: slice on the prepared grid.
        position_mm: its distance along the volume's own axis of that plane from the first slice of the grid.
        variance: mean over the slice's region of the sum of sigma_i^2.
        place: where in the head, in words.
    """

    plane: str
    index: int
    position_mm: float
    variance: float
    place: str


@dataclass(frozen=True)
class Scores:
    """What is known about one scan; a number that is not known is absent.

    Attributes:
        values: flat scores, keys as in `SCORES`.
        artefacts: artefact -> {"score": comparable 0..1 (with a calibration), "uncertainty": mean sigma_i^2 in the region}.
        slices: the worst slice of each plane, worst first.
        gates: features of the image's refusal rules.
        risk: the calibrated risk, None without a calibration.
    """

    values: dict[str, float]
    artefacts: dict[str, dict[str, float]]
    slices: tuple[WorstSlice, ...]
    gates: dict[str, float]
    risk: float | None = None

    def flat(self) -> dict[str, float]:
        """The `scores` object of a result."""
        return dict(self.values)


def score_maps(maps: Maps, prepared: Prepared, card: Card) -> Scores:
    """Reduce maps to scores.

    Args:
        maps: what the student returned for `prepared`.
        prepared: the network's input with its masks.
        card: of the student; without a calibration the calibrated scores are absent.

    Returns:
        Finite numbers only.

    Raises:
        ValueError: maps and input differ in shape, or a map holds a value that is not finite.
    """
    level = math.inf if card.calibration is None else card.calibration.affected_variance
    return score_reduced(reduce_maps(maps, prepared, level), prepared, card)


def reduce_maps(maps: Maps, prepared: Prepared, affected_variance: float = math.inf) -> Reduced:
    """Take the sums that all scores are made of.

    Args:
        maps: float32 maps on the prepared grid.
        prepared: the network's input with its masks.
        affected_variance: see `Calibration.affected_variance`.

    Returns:
        Sums accumulated in float64.

    Raises:
        ValueError: maps and input differ in shape, or a map holds a value that is not finite.
    """
    _check_maps(maps, prepared)
    p, fov, head = maps.gm_probability, prepared.native_mask, prepared.head_mask
    gm = (p > GM_PROBABILITY) & fov
    region = _grow(gm, REGION_CELLS) & fov if gm.sum() * VOXEL_ML >= MIN_GM_ML else head
    ring = _grow(gm, RING_CELLS) & fov & (p < RING_PROBABILITY)
    total = maps.artefact_variance.sum(axis=0)
    entropy = _entropy(p)
    gm_values = prepared.image[gm].astype(np.float64)
    bright = ring & (prepared.image > (gm_values.mean() if gm_values.size else math.inf))
    p_fov = p[fov].astype(np.float64)
    stack = np.stack([gm, head, region, np.where(region, total, 0)]).astype(np.float32)
    return Reduced(
        gm_cells=float(gm.sum()),
        region_cells=float(region.sum()),
        head_cells=float(head.sum()),
        artefact_fov=np.array([channel[fov].sum(dtype=np.float64) for channel in maps.artefact_variance]),
        artefact_region=np.array([channel[region].sum(dtype=np.float64) for channel in maps.artefact_variance]),
        task_region=_sum(maps.task_variance[region]),
        entropy_fov=_sum(entropy[fov]),
        entropy_region=_sum(entropy[region]),
        gm_sum=_sum(p_fov),
        gm_sum_inside=_sum(p[gm]),
        gm_variance=_sum(p_fov * (1.0 - p_fov)),
        confidence_head=_sum(np.maximum(p, 1.0 - p)[head]),
        gm_intensity=_sum(gm_values),
        gm_intensity_square=_sum(gm_values**2),
        ring_cells=float(ring.sum()),
        bright_cells=float(bright.sum()),
        bright_intensity=_sum(prepared.image[bright]),
        affected_cells=float((gm & (total > affected_variance)).sum()),
        profiles=(_profile(stack, 1), _profile(stack, 2), _profile(stack, 3)),
    )


def score_reduced(reduced: Reduced, prepared: Prepared, card: Card) -> Scores:
    """Turn the sums into scores.

    Returns:
        Finite numbers only; a score whose ground is missing (no grey matter, no white matter, no calibration) is absent.
    """
    calibration = card.calibration
    raw = raw_scores(reduced)
    values = {name: raw[name] for name in RAW_SCORES if name in SCORES and name in raw}
    values |= _volume(reduced) | _contrast(reduced)
    artefacts = {name: {"uncertainty": raw[f"artefact_{name}_gm"]} for name in ARTEFACTS}
    risk = None
    if calibration is not None:
        risk = risk_of(raw, calibration)
        values |= {"risk": risk} | predicted_dice(risk, calibration)
        values["gm_volume_error_ml"] = volume_error_ml(reduced.gm_variance, interpolate(calibration.volume_width, risk))
        if reduced.gm_cells > 0:
            values["gm_affected_share"] = reduced.affected_cells / reduced.gm_cells
        for name, score in comparable_scores(raw, calibration).items():
            artefacts[name]["score"] = score
    return Scores(values, artefacts, worst_slices(reduced), gate_features(reduced, prepared), risk)


def raw_scores(reduced: Reduced) -> dict[str, float]:
    """The scores that need no calibration, keys as in `RAW_SCORES`; all of them, each >= 0."""
    region = max(reduced.region_cells, 1.0)
    # Expected cross entropy: the entropy is what the segmentation admits, half the artefacts' variance what they add (at
    # the minimum of Eq. 4, sigma^2 = 2 CE). Per grey matter, as Dice is: a tighter box makes no better scan.
    doubt = reduced.entropy_fov + float(reduced.artefact_fov.sum()) / 2.0
    # Dice of the mask p > 0.5 with a truth drawn from p: expected overlap over expected size (docs/decisions/0090).
    expected_dice = 2.0 * reduced.gm_sum_inside / max(reduced.gm_cells + reduced.gm_sum, TINY)
    per_artefact = reduced.artefact_region / region
    return {
        "artefact_uncertainty": float(reduced.artefact_fov.sum() / BOX_CELLS),
        "artefact_uncertainty_gm": float(per_artefact.sum()),
        "task_uncertainty": reduced.task_region / region,
        "entropy": reduced.entropy_fov / BOX_CELLS,
        "entropy_gm": reduced.entropy_region / region,
        "cross_entropy_per_gm": doubt / max(reduced.gm_sum, 1.0),
        "expected_dice_loss": max(1.0 - expected_dice, 0.0),
        **{f"artefact_{name}_gm": float(per_artefact[i]) for i, name in enumerate(ARTEFACTS)},
    }


def risk_of(raw: dict[str, float], calibration: Calibration) -> float:
    """The risk: a sum of logarithms of raw scores with weights >= 0. Larger is worse; only its order has a meaning."""
    return sum(t.weight * math.log(raw[t.score] + t.floor) for t in calibration.risk)


def predicted_dice(risk: float, calibration: Calibration) -> dict[str, float]:
    """Predicted Dice and its conformal bounds, each in [0, 1]; keys as in `SCORES`."""
    dice = interpolate(calibration.dice, risk)
    bound = next((b for b in calibration.bounds if risk <= b.risk_upto), calibration.bounds[-1])
    return {
        "predicted_dice": dice,
        "predicted_dice_low": min(max(dice + bound.low, 0.0), 1.0),
        "predicted_dice_high": min(max(dice + bound.high, 0.0), 1.0),
    }


def comparable_scores(raw: dict[str, float], calibration: Calibration) -> dict[str, float]:
    """One number per artefact that means the same for all: 0 as in a clean scan, 0.5 as in a typical visible artefact.

    The excess of ln(mean sigma_i^2) over clean scans is unmixed with the calibration's matrix (what leaks from one
    artefact into the channel of another is taken out) into strengths z, and z / (1 + z) is returned.
    """
    log_variance = np.log([raw[f"artefact_{name}_gm"] + TINY for name in ARTEFACTS])
    excess = log_variance - np.asarray(calibration.artefact_clean)
    strength = np.maximum(np.asarray(calibration.artefact_unmixing) @ excess, 0.0)
    return {name: float(z / (1.0 + z)) for name, z in zip(ARTEFACTS, strength, strict=True)}


def volume_error_ml(gm_variance: float, width: float) -> float:
    """Half-width of the error bar on the grey-matter volume.

    Args:
        gm_variance: sum over the field of view of p(1-p), p calibrated.
        width: calibrated multiplier; 1.0 means one standard deviation of independent voxels.

    Returns:
        Millilitres, >= 0. Smaller is better.

    Source: Shaw 2021, section 7. Departure: Bernoulli variance p(1-p) instead of Eq. 8, which has a floor of 0.0585 per voxel.
    """
    return width * VOXEL_ML * math.sqrt(max(gm_variance, 0.0))


def interpolate(knots: Knots, x: float) -> float:
    """Value of a monotone map; constant beyond its ends."""
    return float(np.interp(x, knots.x, knots.y))


def worst_slices(reduced: Reduced) -> tuple[WorstSlice, ...]:
    """The worst slice of each plane, the highest mean first; a plane without a region is absent."""
    found = [slice_ for axis in range(3) if (slice_ := _worst_slice(reduced.profiles[axis], axis)) is not None]
    return tuple(sorted(found, key=lambda s: -s.variance))


def gate_features(reduced: Reduced, prepared: Prepared) -> dict[str, float]:
    """Features from which the image's refusal rules are made: is this a head with the contrast the student knows?

    Returns:
        gm_ml: predicted grey matter; gm_to_head: its share of the head;
        confidence: mean over the head of max(p, 1-p); entropy_gm: mean entropy in the region;
        sheet: region over grey matter, large for thin sheets and crumbs;
        gm_width_mm, gm_length_mm, gm_height_mm: extent of its middle 90 % along R, A, S;
        gm_below_vertex_mm: top of the head to top of the grey matter; gm_off_centre_mm: left-right distance of the centres;
        gm_level: mean intensity of grey matter (1.0 is bright tissue);
        bright_share: share of its surroundings that is brighter; bright_ratio: how much brighter;
        gm_at_edge_cm2: grey matter in the outermost acquired planes, where it is most;
        head_q10, head_q25, head_q50, head_q75, head_q90: intensity quantiles of the head; air_level: mean outside it.
        log_task_uncertainty, log_cross_entropy_per_gm, log_artefact_<name>_gm: logarithms of raw scores. An image the student
        cannot read is in doubt by its task's part, a bad scan by its artefacts' parts: together they tell one from the other.
        What has no ground (no grey matter) is 0.
    """
    gm = max(reduced.gm_cells, 1.0)
    level = reduced.gm_intensity / gm
    bright = reduced.bright_intensity / max(reduced.bright_cells, 1.0)
    extents = [_extent_mm(profile[0]) for profile in reduced.profiles]
    return {
        "gm_ml": reduced.gm_cells * VOXEL_ML,
        "gm_to_head": reduced.gm_cells / max(reduced.head_cells, 1.0),
        "confidence": reduced.confidence_head / max(reduced.head_cells, 1.0),
        "entropy_gm": reduced.entropy_region / max(reduced.region_cells, 1.0),
        "sheet": reduced.region_cells / gm,
        "gm_width_mm": extents[0],
        "gm_length_mm": extents[1],
        "gm_height_mm": extents[2],
        "gm_below_vertex_mm": _top_mm(reduced.profiles[2][1]) - _top_mm(reduced.profiles[2][0]),
        "gm_off_centre_mm": abs(_centre_mm(reduced.profiles[0][0]) - _centre_mm(reduced.profiles[0][1])),
        "gm_level": level,
        "bright_share": reduced.bright_cells / max(reduced.ring_cells, 1.0),
        "bright_ratio": bright / level if level > 0 else 0.0,
        "gm_at_edge_cm2": gm_at_edge_cm2(reduced, prepared),
        **_intensity_features(prepared),
        **_doubt_features(raw_scores(reduced)),
    }


def _doubt_features(raw: dict[str, float]) -> dict[str, float]:
    names = ("task_uncertainty", "cross_entropy_per_gm", *(f"artefact_{name}_gm" for name in ARTEFACTS))
    return {f"log_{name}": math.log(raw[name] + LEAST_DOUBT) for name in names}


def gm_at_edge_cm2(reduced: Reduced, prepared: Prepared) -> float:
    """Area of predicted grey matter where the acquired field of view ends, at the side where it is largest.

    Mean of the two outermost planes of cells that hold signal; planes of zeros are padding, not field of view.
    """
    held = prepared.native_mask & (prepared.image > 0.0)
    areas = []
    for axis, profile in enumerate(reduced.profiles):
        planes = np.flatnonzero(held.any(axis=tuple(a for a in range(3) if a != axis)))
        if planes.size >= EDGE_PLANES:
            gm = profile[PROFILES.index("gm")]
            areas += [gm[planes[:EDGE_PLANES]].mean(), gm[planes[-EDGE_PLANES:]].mean()]
    return float(max(areas, default=0.0)) * SPACING_MM**2 / 100.0


def _check_maps(maps: Maps, prepared: Prepared) -> None:
    shape = prepared.image.shape
    expected = {
        "gm_probability": shape,
        "task_variance": shape,
        "artefact_variance": (len(ARTEFACTS), *shape),
    }
    for name, wanted in expected.items():
        values: Array = getattr(maps, name)
        if values.shape != wanted:
            raise ValueError(f"{name}: expected shape {wanted}, got {values.shape}")
        if not np.isfinite(values.sum(dtype=np.float64)):
            raise ValueError(f"{name}: holds values that are not finite; the engine or the model is at fault")


def _volume(reduced: Reduced) -> dict[str, float]:
    return {"gm_volume_ml": reduced.gm_sum * VOXEL_ML}


def _contrast(reduced: Reduced) -> dict[str, float]:
    """SNR and CNR; absent where there is no grey matter, no spread or too little white matter."""
    if reduced.gm_cells * VOXEL_ML < MIN_GM_ML:
        return {}
    mean = reduced.gm_intensity / reduced.gm_cells
    deviation = math.sqrt(max(reduced.gm_intensity_square / reduced.gm_cells - mean**2, 0.0))
    if deviation <= 0.0:
        return {}
    out = {"snr": mean / deviation}
    if reduced.bright_cells * VOXEL_ML >= MIN_RING_ML:
        out["cnr"] = abs(reduced.bright_intensity / reduced.bright_cells - mean) / deviation
    return out


def _worst_slice(profile: NDArray[np.float64], axis: int) -> WorstSlice | None:
    region, variance = (
        profile[PROFILES.index("region")],
        profile[PROFILES.index("variance")],
    )
    enough = region >= max(MIN_SLICE_SHARE * float(region.max()), 1.0)
    if not enough.any():
        return None
    means = np.where(enough, variance / np.maximum(region, 1.0), -1.0)
    index = int(means.argmax())
    head = np.flatnonzero(profile[PROFILES.index("head")])
    low, high = (int(head[0]), int(head[-1]) + 1) if head.size else (0, len(region))
    third = min(max(3 * (index - low) // max(high - low, 1), 0), 2)
    return WorstSlice(
        PLANES[axis],
        index,
        index * SPACING_MM,
        float(means[index]),
        THIRDS[axis][third],
    )


def _intensity_features(prepared: Prepared) -> dict[str, float]:
    inside = prepared.image[prepared.head_mask]
    air = prepared.image[prepared.native_mask & ~prepared.head_mask]
    names = (10, 25, 50, 75, 90)
    quantiles = np.percentile(inside, names) if inside.size else np.zeros(len(names))
    features = {f"head_q{name}": float(q) for name, q in zip(names, quantiles, strict=True)}
    return features | {"air_level": float(air.mean()) if air.size else 0.0}


def _grow(mask: NDArray[np.bool_], cells: int) -> NDArray[np.bool_]:
    """Dilation with a cube of 2 * cells + 1, one axis after the other."""
    grown = mask.view(np.uint8)
    for axis in range(3):
        grown = ndimage.maximum_filter1d(grown, 2 * cells + 1, axis=axis, mode="constant")
    return grown.view(np.bool_)


def _entropy(p: Array) -> Array:
    """Entropy of a Bernoulli variable in nat, 0 at both ends."""
    q = np.clip(p, 1e-7, 1.0 - 1e-7)
    entropy: Array = -(q * np.log(q) + (1.0 - q) * np.log1p(-q))
    return entropy


def _profile(stack: Array, axis: int) -> NDArray[np.float64]:
    others = tuple(a for a in (1, 2, 3) if a != axis)
    out: NDArray[np.float64] = stack.sum(axis=others, dtype=np.float64)
    return out


def _sum(values: NDArray[np.floating]) -> float:
    return float(values.sum(dtype=np.float64))


def _extent_mm(profile: NDArray[np.float64]) -> float:
    total = float(profile.sum())
    if total <= 0:
        return 0.0
    low, high = np.searchsorted(np.cumsum(profile), (0.05 * total, 0.95 * total))
    return float(high - low + 1) * SPACING_MM


def _centre_mm(profile: NDArray[np.float64]) -> float:
    return float((np.arange(len(profile)) * profile).sum() / max(float(profile.sum()), 1.0)) * SPACING_MM


def _top_mm(profile: NDArray[np.float64]) -> float:
    """Highest slice of which a tenth of the largest slice's area is filled."""
    filled = np.flatnonzero(profile > 0.1 * float(profile.max()))
    return float(filled[-1]) * SPACING_MM if filled.size else 0.0
