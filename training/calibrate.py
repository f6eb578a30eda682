"""Score -> predicted Dice -> decision, with stated error rates: fits what the card calls its calibration.

The order of work:

1. export the student with temperature 1, measure clean scans (`measure`), `fit_temperature`, export again;
2. measure every calibration scan: clean and artefacted heads, and images that are no T1 head;
3. `fit_calibration` on these samples, and embed its JSON with `rescan-export card --calibration`.

Half of the heads (by head, not by scan) fix the functions, the other half the bounds, so that the bounds hold for what the
functions have not seen. All of it is fitted on calibration subjects; no test subject is touched.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from daemon.calibration import conformal_rank, order_statistic_rank
from daemon.card import Bound, Calibration, Gate, Knots, Term, check_calibration
from daemon.prepare import Prepared
from daemon.score import (
    GM_PROBABILITY,
    RAW_SCORES,
    TINY,
    VOXEL_ML,
    gate_features,
    interpolate,
    raw_scores,
    reduce_maps,
    risk_of,
)
from daemon.words import ARTEFACTS, Array, Maps

RATE = 0.05
CONFIDENCE = 0.95
REQUIRED_PERCENTILE = 5.0
REQUIRED_MARGIN = 0.05
"""The default requirement: this percentile of clean Dice on the calibration subjects, minus this margin."""

MIN_REQUIRED_DICE = 0.70
"""A lower requirement is reported as a goal missed."""

VISIBLE_LOSS = 0.05
"""An artefact is *visible* where it costs this much Dice against its clean twin."""

MIN_VISIBLE = 3
SIMPLE_IS_WORTH = 0.02
"""Share of right names by which a full unmixing matrix must beat one number per artefact."""

MIN_BIN_SCANS = 60
MAX_BINS = 5
COMBINATION_GAIN = 0.05
"""Another score, or a combination, replaces the first one only where it lowers the error of predicted Dice by this share."""

GATE_MARGIN = 0.1
"""A gate lies this share of the heads' own range beyond the outermost head of the calibration."""

MAX_GATES_PER_CODE = 4
REQUIREMENTS = np.round(np.arange(0.0, 1.0, 0.01), 2)
"""Required Dice for which Test A is prepared; in between the limit is interpolated."""

LOGIT_EDGES = np.linspace(-12.0, 12.0, 97)


@dataclass(frozen=True)
class Sample:
    """One measured scan.

    Attributes:
        head: identity of the anatomy and its draw; scans of one head go to the same half.
        anatomy: the label map or person.
        artefact: name from `ARTEFACTS`, `mixed`, or None for a clean scan.
        raw: raw scores. gates: gate features. gm_ml, gm_variance: volume and sum of p(1-p).
        affected_p95: 95th percentile over predicted grey matter of the sum of artefact variances.
        dice: against the reference; None for an image that is no T1 head. clean_dice: of the clean twin.
        reference_ml: volume of the reference.
        refusal: code with which this image must be refused; None for a head.
        logits: (len(LOGIT_EDGES) - 1, 2) voxels per bin of the logit of p, and how many of them are grey matter.
    """

    head: str
    anatomy: str
    artefact: str | None
    raw: dict[str, float]
    gates: dict[str, float]
    gm_ml: float
    gm_variance: float
    affected_p95: float
    dice: float | None = None
    clean_dice: float | None = None
    reference_ml: float | None = None
    refusal: str | None = None
    logits: list[list[float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Dice lost against the clean twin; 0 where that is not known."""
        return 0.0 if self.dice is None or self.clean_dice is None else self.clean_dice - self.dice


class CalibrationImpossible(ValueError):
    """Too few samples of some kind; the message says which and how many are needed."""


def measure(
    maps: Maps,
    prepared: Prepared,
    reference: Array | None,
    *,
    head: str,
    anatomy: str,
    artefact: str | None,
    clean_dice: float | None = None,
    refusal: str | None = None,
) -> Sample:
    """Measure one scan.

    Args:
        maps: of the student.
        prepared: its input.
        reference: (D, H, W) share of grey matter per cell in [0, 1], on the prepared grid; None for an image that is no head.
        head: see `Sample`.
        anatomy: see `Sample`.
        artefact: see `Sample`.
        clean_dice: see `Sample`.
        refusal: see `Sample`.
    """
    reduced = reduce_maps(maps, prepared)
    gm = (maps.gm_probability > GM_PROBABILITY) & prepared.native_mask
    total = maps.artefact_variance.sum(axis=0)[gm]
    truth = None if reference is None else (reference > 0.5) & prepared.native_mask
    return Sample(
        head=head,
        anatomy=anatomy,
        artefact=artefact,
        raw=raw_scores(reduced),
        gates=gate_features(reduced, prepared),
        gm_ml=reduced.gm_sum * VOXEL_ML,
        gm_variance=reduced.gm_variance,
        affected_p95=float(np.percentile(total, 95)) if total.size else 0.0,
        dice=None if truth is None else dice_overlap(gm, truth),
        clean_dice=clean_dice,
        reference_ml=None
        if reference is None
        else float(reference[prepared.native_mask].sum(dtype=np.float64)) * VOXEL_ML,
        refusal=refusal,
        logits=[]
        if truth is None
        else logit_histogram(maps.gm_probability[prepared.native_mask], truth[prepared.native_mask]),
    )


def dice_overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Dice overlap of two masks, 1.0 where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


def logit_histogram(p: NDArray[np.floating], truth: NDArray[np.bool_]) -> list[list[float]]:
    """Voxels per bin of the logit, and the grey ones among them; what temperature and reliability need."""
    q = np.clip(p.astype(np.float64), 1e-9, 1.0 - 1e-9)
    logit = np.clip(np.log(q) - np.log1p(-q), LOGIT_EDGES[0], LOGIT_EDGES[-1] - 1e-9)
    all_, _ = np.histogram(logit, LOGIT_EDGES)
    grey, _ = np.histogram(logit[truth], LOGIT_EDGES)
    return [[float(n), float(g)] for n, g in zip(all_, grey, strict=True)]


def fit_temperature(samples: Iterable[Sample]) -> float:
    """The temperature that minimises the cross entropy of clean scans, all scans weighing the same.

    Args:
        samples: measured with a model of temperature 1.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
    """
    histograms = [np.asarray(s.logits) for s in samples if s.artefact is None and s.logits]
    if not histograms:
        raise CalibrationImpossible("temperature: no clean scan with a reference; measure some")
    shares = sum(h / h.sum(axis=0)[0] for h in histograms)
    centre = 0.5 * (LOGIT_EDGES[:-1] + LOGIT_EDGES[1:])

    def cross_entropy(log_t: float) -> float:
        z = centre / math.exp(log_t)
        return float((shares[:, 0] * np.logaddexp(0.0, z) - shares[:, 1] * z).sum())

    return float(math.exp(optimize.minimize_scalar(cross_entropy, bounds=(-2.0, 2.0), method="bounded").x))


def fit_calibration(samples: Sequence[Sample], population: str, seed: int = 0) -> Calibration:
    """Fit everything in the card's calibration.

    Args:
        samples: clean and artefacted heads, and images that must be refused.
        population: what the heads are, in words; the guarantee holds for these.
        seed: of the split of the heads into halves.

    Raises:
        CalibrationImpossible: too few heads, clean scans or kinds of artefact.
    """
    heads = [s for s in samples if s.refusal is None and s.dice is not None]
    fit, bound = split_heads(heads, seed)
    required = required_dice(heads)
    risk = choose_risk(fit)
    partial = _Partial(risk)
    dice = fit_dice(fit, partial)
    clean, unmixing, accuracy = fit_artefacts(fit)
    # A single score was not fitted to anything, so all heads may bound it; a combination only those it has not seen.
    unseen = heads if len(risk) == 1 else bound
    alarm = fit_alarm(sorted(partial.risk(s) for s in one_per_head(unseen)))
    calibration = Calibration(
        population=population,
        risk=risk,
        dice=dice,
        bounds=fit_bounds(bound, partial, dice),
        bound_rate=RATE,
        required_dice=required,
        alarm_risk=alarm.risk,
        alarm_rate=RATE,
        alarm_confidence=alarm.confidence,
        alarm_scans=alarm.scans,
        artefact_clean=clean,
        artefact_unmixing=unmixing,
        affected_variance=float(np.median([s.affected_p95 for s in fit if s.artefact is None])),
        volume_width=fit_volume_width(bound, partial),
        gates=fit_gates(samples),
        samples=_counts(samples, fit, bound, seed, accuracy, required),
        acceptable_risk=fit_acceptable(unseen, partial),
    )
    check_calibration(calibration, "calibration")
    return calibration


@dataclass(frozen=True)
class Alarm:
    """Threshold of Test B, the confidence that its false-alarm rate is at most `RATE`, and its sample size."""

    risk: float
    confidence: float
    scans: int


def fit_alarm(risks: Sequence[float]) -> Alarm:
    """The order statistic of clean risks (ascending).

    With fewer than 59 scans the largest risk is taken and the confidence that it gives, 1 - (1 - rate)^n, is stated instead
    of 95 %.

    Raises:
        CalibrationImpossible: fewer than 19 scans, with which not even a new scan's own chance is at most 5 %.
    """
    n = len(risks)
    if conformal_rank(n, RATE) is None:
        raise CalibrationImpossible(
            f"Test B: {n} clean heads, at least 19 are needed, 59 for {CONFIDENCE:.0%} confidence"
        )
    rank = order_statistic_rank(n, RATE, CONFIDENCE)
    if rank is None:
        return Alarm(risks[-1], round(1.0 - (1.0 - RATE) ** n, 4), n)
    return Alarm(risks[rank - 1], CONFIDENCE, n)


def fit_acceptable(scans: Sequence[Sample], partial: _Partial) -> Knots | None:
    """Test A: for each Dice that may be required, the risk that at most `RATE` of the scans which reach it exceed.

    An order statistic of the scans that reach it, so that the rate holds with `CONFIDENCE`; where they are too few for that
    the table ends. An alert on the upper bound of predicted Dice keeps the same promise and misses more: it must hold for
    every scan's own Dice, this one only for the requirement.

    Returns:
        Required Dice -> risk, falling; None with fewer than 59 scans.

    Source: Tong, Feng, Li, Sci. Adv. 4:eaao1659 (2018), the umbrella of Neyman-Pearson classification.
    """
    dice = np.array([s.dice or 0.0 for s in scans])
    risk = np.array([partial.risk(s) for s in scans])
    required, limits = [], []
    for asked in REQUIREMENTS:
        reach = np.sort(risk[dice >= asked])
        rank = order_statistic_rank(len(reach), RATE, CONFIDENCE)
        if rank is None:
            break
        required.append(float(asked))
        limits.append(float(reach[rank - 1]))
    if not required:
        return None
    falling = np.maximum.accumulate(limits[::-1])[::-1]
    return Knots(tuple(required), tuple(round(float(v), 6) for v in falling))


def split_heads(heads: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Two halves by head: every scan of a head falls in the same half.

    Raises:
        CalibrationImpossible: fewer than 4 heads.
    """
    names = sorted({s.head for s in heads})
    if len(names) < 4:
        raise CalibrationImpossible(f"heads: got {len(names)}, at least 4 are needed to split them")
    first = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist())
    return [s for s in heads if s.head in first], [s for s in heads if s.head not in first]


def one_per_head(samples: Iterable[Sample]) -> list[Sample]:
    """One clean scan of each head: repeated scans of one head are not independent."""
    return list({s.head: s for s in samples if s.artefact is None}.values())


def required_dice(heads: Iterable[Sample]) -> float:
    """Default requirement, fixed before anything else is fitted."""
    clean = [s.dice for s in heads if s.artefact is None and s.dice is not None]
    if not clean:
        raise CalibrationImpossible("required Dice: no clean scan with a reference; measure some")
    return round(float(np.percentile(clean, REQUIRED_PERCENTILE)) - REQUIRED_MARGIN, 4)


SINGLES = ("cross_entropy_per_gm", "expected_dice_loss", "artefact_uncertainty", "artefact_uncertainty_gm")
"""Scores that may be the risk by themselves. The first is it unless another is clearly better: it alone holds both what the
segmentation admits and what the artefacts add (docs/decisions/0090)."""


@dataclass(frozen=True)
class _Partial:
    """The risk before the rest of the calibration is known."""

    terms: tuple[Term, ...]

    def risk(self, sample: Sample) -> float:
        return sum(t.weight * math.log(sample.raw[t.score] + t.floor) for t in self.terms)


def choose_risk(fit: Sequence[Sample]) -> tuple[Term, ...]:
    """The first of `SINGLES`, or another score or a combination that predicts Dice clearly better on heads left out."""
    floors = {name: max(0.1 * float(np.percentile([s.raw[name] for s in fit], 5)), 1e-9) for name in RAW_SCORES}
    singles = {name: (Term(name, 1.0, floors[name]),) for name in SINGLES}
    errors = {name: cross_validated_error(fit, terms) for name, terms in singles.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] >= (1.0 - COMBINATION_GAIN) * errors[SINGLES[0]]:
        best = SINGLES[0]
    combined = combine_scores(fit, floors)
    if combined and cross_validated_error(fit, None, floors) < (1.0 - COMBINATION_GAIN) * errors[best]:
        return combined
    return singles[best]


def combine_scores(fit: Sequence[Sample], floors: dict[str, float]) -> tuple[Term, ...]:
    """Weights >= 0 of the logarithms of all raw scores that explain lost Dice best (non-negative least squares)."""
    names = [n for n in RAW_SCORES if n not in ("artefact_uncertainty", "artefact_uncertainty_gm", "entropy")]
    x = np.log([[s.raw[n] + floors[n] for n in names] for s in fit])
    spread = np.maximum(x.std(axis=0), 1e-9)
    lost = np.array([1.0 - (s.dice or 0.0) for s in fit])
    weights, _ = optimize.nnls((x - x.mean(axis=0)) / spread, lost - lost.mean())
    weights = weights / spread
    total = weights.sum()
    return (
        tuple(Term(n, float(w / total), floors[n]) for n, w in zip(names, weights, strict=True) if w > 0)
        if total > 0
        else ()
    )


def cross_validated_error(
    fit: Sequence[Sample], terms: tuple[Term, ...] | None, floors: dict[str, float] | None = None, folds: int = 5
) -> float:
    """Mean absolute error of predicted Dice on heads left out; `terms` None combines scores anew in each fold."""
    names = sorted({s.head for s in fit})
    errors: list[float] = []
    for k in range(min(folds, len(names))):
        left_out = set(names[k::folds])
        train = [s for s in fit if s.head not in left_out]
        test = [s for s in fit if s.head in left_out]
        chosen = terms if terms is not None else combine_scores(train, floors or {})
        if not train or not test or not chosen:
            return math.inf
        partial = _Partial(chosen)
        dice = fit_dice(train, partial)
        errors += [abs(interpolate(dice, partial.risk(s)) - (s.dice or 0.0)) for s in test]
    return float(np.mean(errors))


def fit_dice(fit: Sequence[Sample], partial: _Partial, knots: int = 24) -> Knots:
    """Isotonic regression of Dice on the risk, thinned to a few knots.

    Source: Barlow et al., Statistical Inference under Order Restrictions, 1972; scikit-learn's pool-adjacent-violators.
    """
    risk = np.array([partial.risk(s) for s in fit])
    dice = np.array([s.dice or 0.0 for s in fit])
    model = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(risk, dice)
    grid = np.unique(np.quantile(risk, np.linspace(0.0, 1.0, knots)))
    values = np.minimum.accumulate(model.predict(grid))
    return Knots(tuple(float(v) for v in grid), tuple(round(float(v), 5) for v in values))


def risk_bins(risks: NDArray[np.float64]) -> list[float]:
    """Upper ends of bins with at least `MIN_BIN_SCANS` scans each; the last is infinity."""
    bins = max(1, min(MAX_BINS, len(risks) // MIN_BIN_SCANS))
    return [float(v) for v in np.quantile(risks, np.arange(1, bins) / bins)] + [math.inf]


def fit_bounds(bound: Sequence[Sample], partial: _Partial, dice: Knots) -> tuple[Bound, ...]:
    """Conformal offsets of predicted Dice, one pair per bin of the risk (Mondrian).

    Each offset is the residual of rank ceil((n + 1)(1 - rate)) on its side.

    Raises:
        CalibrationImpossible: a bin with fewer than 19 scans.

    Source: Vovk et al. 2005, section 4.5 (Mondrian); one-sided split conformal prediction.
    """
    risk = np.array([partial.risk(s) for s in bound])
    residual = np.array([(s.dice or 0.0) - interpolate(dice, r) for s, r in zip(bound, risk, strict=True)])
    bounds, lower = [], -math.inf
    for upper in risk_bins(risk):
        inside = np.sort(residual[(risk > lower) & (risk <= upper)])
        rank = conformal_rank(len(inside), RATE)
        if rank is None:
            raise CalibrationImpossible(
                f"bounds: {len(inside)} scans in a bin, at least {math.ceil(1 / RATE) - 1} are needed"
            )
        high, low = float(inside[rank - 1]), float(inside[len(inside) - rank])
        # JSON has no infinity: the last bin ends beyond any risk.
        bounds.append(Bound(min(upper, 1e9), min(low, 0.0), max(high, 0.0), len(inside)))
        lower = upper
    return tuple(bounds)


def fit_artefacts(fit: Sequence[Sample]) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...], dict[str, float]]:
    """Clean levels and the unmixing matrix of the comparable scores.

    Three matrices are tried on heads left out: one number per artefact (its own typical visible excess), the inverse of the
    leakage matrix, and the weights of a multinomial logistic regression; the one that names the artefact best is kept.

    Returns:
        Median ln sigma_i^2 of clean scans, the matrix, and each candidate's share of visible artefacts named right.

    Raises:
        CalibrationImpossible: an artefact without scans.
    """
    visible = [s for name in ARTEFACTS for s in visible_scans(fit, name)]
    clean = np.median(_log_variances([s for s in fit if s.artefact is None]), axis=0)
    makers = {"diagonal": _diagonal, "leakage": _inverse_leakage, "logistic": _logistic}
    accuracy = {name: _attribution(visible, clean, maker) for name, maker in makers.items()}
    best = max(accuracy, key=lambda name: accuracy[name] - (0.0 if name == "diagonal" else SIMPLE_IS_WORTH))
    excess, kinds = _log_variances(visible) - clean, np.array([ARTEFACTS.index(str(s.artefact)) for s in visible])
    matrix = makers[best](excess, kinds)
    rows = tuple(tuple(round(float(v), 6) for v in row) for row in matrix)
    return tuple(round(float(v), 6) for v in clean), rows, {k: round(v, 4) for k, v in accuracy.items()}


def visible_scans(fit: Sequence[Sample], artefact: str) -> list[Sample]:
    """Scans with this artefact that lost `VISIBLE_LOSS`; where there are fewer than `MIN_VISIBLE`, those that lost most.

    Raises:
        CalibrationImpossible: fewer than `MIN_VISIBLE` scans with this artefact at all.
    """
    found = sorted((s for s in fit if s.artefact == artefact), key=lambda s: -s.loss)
    if len(found) < MIN_VISIBLE:
        raise CalibrationImpossible(f"artefact {artefact}: {len(found)} scans, at least {MIN_VISIBLE} are needed")
    visible = [s for s in found if s.loss >= VISIBLE_LOSS]
    return visible if len(visible) >= MIN_VISIBLE else found[:MIN_VISIBLE]


def _log_variances(samples: Sequence[Sample]) -> NDArray[np.float64]:
    return np.log([[s.raw[f"artefact_{name}_gm"] + TINY for name in ARTEFACTS] for s in samples])


def _leakage(excess: NDArray[np.float64], kinds: NDArray[np.int_]) -> NDArray[np.float64]:
    """Column j: median excess of every channel under artefact j."""
    return np.stack([np.median(excess[kinds == j], axis=0) for j in range(len(ARTEFACTS))], axis=1)


def _diagonal(excess: NDArray[np.float64], kinds: NDArray[np.int_]) -> NDArray[np.float64]:
    own = np.maximum(np.diag(_leakage(excess, kinds)), 0.05)
    return np.diag(1.0 / own)


def _inverse_leakage(excess: NDArray[np.float64], kinds: NDArray[np.int_]) -> NDArray[np.float64]:
    leakage = _leakage(excess, kinds)
    # A little is added to the diagonal so that nearly parallel columns do not blow noise up.
    return np.linalg.pinv(leakage + 0.05 * np.abs(leakage).max() * np.eye(len(ARTEFACTS)))


def _logistic(excess: NDArray[np.float64], kinds: NDArray[np.int_]) -> NDArray[np.float64]:
    weights = LogisticRegression(fit_intercept=False, max_iter=2000, C=1.0).fit(excess, kinds).coef_
    own = np.array([np.median(excess[kinds == j] @ weights[j]) for j in range(len(ARTEFACTS))])
    # One factor for all rows keeps the order of the classes; 1.0 is the typical visible artefact.
    matrix: NDArray[np.float64] = weights / max(float(np.median(own)), 0.05)
    return matrix


def _attribution(visible: Sequence[Sample], clean: NDArray[np.float64], maker: Any, folds: int = 5) -> float:
    """Share of visible artefacts on heads left out that have the highest score in their own channel."""
    names = sorted({s.head for s in visible})
    right = []
    for k in range(min(folds, len(names))):
        left_out = set(names[k::folds])
        train = [s for s in visible if s.head not in left_out]
        kinds = np.array([ARTEFACTS.index(str(s.artefact)) for s in train])
        if len(set(kinds.tolist())) < len(ARTEFACTS):
            return 0.0
        matrix = maker(_log_variances(train) - clean, kinds)
        for s in (s for s in visible if s.head in left_out):
            strength = matrix @ (_log_variances([s])[0] - clean)
            right.append(ARTEFACTS[int(strength.argmax())] == s.artefact)
    return float(np.mean(right)) if right else 0.0


def fit_volume_width(bound: Sequence[Sample], partial: _Partial) -> Knots:
    """Multiplier of the independent-voxel error that covers 95 % of the references, rising with the risk."""
    known = [s for s in bound if s.reference_ml is not None and s.gm_variance > 0]
    risk = np.array([partial.risk(s) for s in known])
    ratio = np.array([abs(s.gm_ml - (s.reference_ml or 0.0)) / (VOXEL_ML * math.sqrt(s.gm_variance)) for s in known])
    x, y, lower = [], [], -math.inf
    for upper in risk_bins(risk):
        inside = (risk > lower) & (risk <= upper)
        values = np.sort(ratio[inside])
        rank = conformal_rank(len(values), RATE)
        if rank is None:
            raise CalibrationImpossible(
                f"volume: {len(values)} scans in a bin, at least {math.ceil(1 / RATE) - 1} are needed"
            )
        x.append(float(np.median(risk[inside])))
        y.append(float(values[rank - 1]))
        lower = upper
    rising = np.maximum.accumulate(y)
    return Knots(tuple(x), tuple(round(float(v), 4) for v in rising))


def fit_gates(samples: Sequence[Sample]) -> tuple[Gate, ...]:
    """Half-spaces of the gate features that no head of the calibration leaves, however bad, and most other images do.

    For each refusal code, greedy: of all half-spaces (one feature, or a logistic regression over all) the one that refuses most
    of the code's images not yet refused, each `GATE_MARGIN` beyond the outermost head.
    """
    heads, others = [s for s in samples if s.refusal is None], [s for s in samples if s.refusal is not None]
    if not others:
        return ()
    names = sorted(others[0].gates)
    inside = _features(heads, names)
    gates: list[Gate] = []
    for code in sorted({str(s.refusal) for s in others}):
        left = _features([s for s in others if s.refusal == code], names)
        for _ in range(MAX_GATES_PER_CODE):
            if not len(left):
                break
            best = max(
                [*_axes(len(names)), _separating(inside, left)], key=lambda w: int(_refused(w, inside, left).sum())
            )
            refused = _refused(best, inside, left)
            if not refused.any():
                break
            weights = {n: float(w) for n, w in zip(names, best, strict=True) if w != 0.0}
            gates.append(Gate(code, weights, _limit(best, inside)))
            left = left[~refused]
    return tuple(gates)


def _features(samples: Sequence[Sample], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[s.gates[n] for n in names] for s in samples], dtype=np.float64).reshape(len(samples), len(names))


def _axes(n: int) -> list[NDArray[np.float64]]:
    return [sign * row for row in np.eye(n) for sign in (1.0, -1.0)]


def _separating(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> NDArray[np.float64]:
    mean, spread = inside.mean(axis=0), np.maximum(inside.std(axis=0), 1e-9)
    x = np.concatenate([inside, outside])
    y = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
    model = LogisticRegression(max_iter=5000, C=10.0, class_weight="balanced").fit((x - mean) / spread, y)
    direction: NDArray[np.float64] = np.asarray(model.coef_[0] / spread, dtype=np.float64)
    return direction


def _limit(weights: NDArray[np.float64], inside: NDArray[np.float64]) -> float:
    along = inside @ weights
    return float(along.max() + GATE_MARGIN * (along.max() - along.min()) + 1e-9)


def _refused(
    weights: NDArray[np.float64], inside: NDArray[np.float64], outside: NDArray[np.float64]
) -> NDArray[np.bool_]:
    refused: NDArray[np.bool_] = outside @ weights > _limit(weights, inside)
    return refused


def _counts(
    samples: Sequence[Sample],
    fit: Sequence[Sample],
    bound: Sequence[Sample],
    seed: int,
    accuracy: dict[str, float],
    required: float,
) -> dict[str, Any]:
    heads = [*fit, *bound]
    others = [s for s in samples if s.refusal is not None]
    return {
        "anatomies": len({s.anatomy for s in heads}),
        "heads": len({s.head for s in heads}),
        "scans_for_functions": len(fit),
        "scans_for_bounds": len(bound),
        "clean_scans": sum(s.artefact is None for s in heads),
        "images_to_refuse": len(others),
        "split_seed": seed,
        "attribution_cross_validated": accuracy,
        "required_dice_goal_met": required >= MIN_REQUIRED_DICE,
    }


def decide(sample: Sample, calibration: Calibration) -> dict[str, float]:
    """Risk and predicted Dice of one measured scan, for evaluation."""
    risk = risk_of(sample.raw, calibration)
    return {"risk": risk, "predicted_dice": interpolate(calibration.dice, risk)}


def read_samples(path: Path) -> list[Sample]:
    """Read samples from JSON lines.

    Raises:
        ValueError: unreadable, or a line that is no sample.
    """
    try:
        return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path.name}: not a file of samples ({error}); make one with `rescan-train evaluate`"
        ) from None


def write_samples(samples: Iterable[Sample], path: Path) -> None:
    """Write samples as JSON lines."""
    path.write_text("".join(json.dumps(asdict(s)) + "\n" for s in samples), encoding="utf-8")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan-train calibrate SAMPLES -o FACTS`."""
    parser = subparsers.add_parser("calibrate", help="measured scans -> the calibration for the card")
    parser.add_argument("samples", type=Path, help="JSON lines of measured calibration scans")
    parser.add_argument("-o", "--out", type=Path, required=True, help="facts for `rescan-export card --calibration`")
    parser.add_argument("--population", required=True, help="what the scans are: the guarantee holds for these")
    parser.add_argument("--seed", type=int, default=0, help="of the split into halves (default %(default)s)")
    parser.set_defaults(func=_command)


def _command(args: argparse.Namespace) -> int:
    try:
        calibration = fit_calibration(read_samples(args.samples), args.population, args.seed)
    except ValueError as error:
        print(f"rescan-train calibrate: {error}", file=sys.stderr)
        return 1
    facts = {"calibration": asdict(calibration)}
    args.out.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    met = "" if calibration.required_dice >= MIN_REQUIRED_DICE else f" (goal missed: below {MIN_REQUIRED_DICE})"
    print(
        f"required Dice {calibration.required_dice:.3f}{met}; risk of {', '.join(t.score for t in calibration.risk)}; "
        f"Test B above {calibration.alarm_risk:.4f} from {calibration.alarm_scans} clean scans; {len(calibration.gates)} gates",
        file=sys.stderr,
    )
    return 0
