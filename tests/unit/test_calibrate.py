"""Calibration: made-up populations with known truth, and maintained libraries as oracles."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from crepes import ConformalPredictiveSystem
from mapie.risk_control import BinaryClassificationController
from sklearn.isotonic import IsotonicRegression

from daemon.calibration import order_statistic_rank
from daemon.card import Knots, Term, parse_calibration
from daemon.judge import refusing_gate
from daemon.score import RAW_SCORES, interpolate, risk_of
from daemon.words import ARTEFACTS
from training.calibrate import (
    LOGIT_EDGES,
    RATE,
    Alarm,
    CalibrationImpossible,
    Sample,
    _Partial,
    choose_risk,
    decide,
    fit_acceptable,
    fit_alarm,
    fit_bounds,
    fit_calibration,
    fit_dice,
    fit_temperature,
    logit_histogram,
    read_samples,
    risk_bins,
    split_heads,
    write_samples,
)

GATES = ("gm_ml", "bright_ratio", "confidence")


def made_up_sample(rng: np.random.Generator, head: int, artefact: str | None, severity: float) -> Sample:
    """A scan whose uncertainty rises and whose Dice falls with severity; a fifth leaks into the next channel."""
    excess = np.full(5, 0.05 * rng.normal())
    if artefact is not None:
        at = ARTEFACTS.index(artefact)
        excess[at] += 2.0 * severity
        excess[(at + 1) % 5] += 0.4 * severity
    channels = np.exp(-5.0 + excess + 0.1 * rng.normal(size=5))
    total = float(channels.sum())
    raw = dict.fromkeys(RAW_SCORES, 0.02 * float(np.exp(0.1 * rng.normal())))
    raw |= {f"artefact_{n}_gm": float(c) for n, c in zip(ARTEFACTS, channels, strict=True)}
    raw |= {"artefact_uncertainty_gm": total, "artefact_uncertainty": 0.2 * total}
    clean_dice = 0.88 + 0.01 * rng.normal()
    dice = float(np.clip(clean_dice - 0.15 * severity + 0.01 * rng.normal(), 0, 1))
    gates = {
        "gm_ml": 650 + 50 * rng.normal(),
        "bright_ratio": 1.5 + 0.05 * rng.normal(),
        "confidence": 0.9 - 0.02 * severity,
    }
    return Sample(
        head=f"h{head}", anatomy=f"a{head % 2}", artefact=artefact, raw=raw, gates=gates, gm_ml=650 + 8 * rng.normal() * (1 + severity),
        gm_variance=2e4, affected_p95=0.1, dice=dice, clean_dice=float(clean_dice), reference_ml=650.0,
    )  # fmt: skip


def population(heads: int = 160, seed: int = 0, first: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for head in range(first, first + heads):
        out.append(made_up_sample(rng, head, None, 0.0))
        out += [
            made_up_sample(rng, head, a, float(rng.uniform(0.1, 2.5))) for a in rng.choice(ARTEFACTS, 2, replace=False)
        ]
    return out


def others(n: int = 30) -> list[Sample]:
    rng = np.random.default_rng(9)
    base = [made_up_sample(rng, 10_000 + i, None, 0.0) for i in range(n)]
    half = n // 2
    low = [
        replace(s, dice=None, refusal="not_a_head", gates=s.gates | {"gm_ml": 40.0 * rng.random()}) for s in base[:half]
    ]
    dark = [
        replace(s, dice=None, refusal="unsupported_contrast", gates=s.gates | {"bright_ratio": 0.9})
        for s in base[half:]
    ]
    return low + dark


@pytest.fixture(scope="module")
def fitted():
    return fit_calibration([*population(), *others()], "made up", seed=1)


def test_the_stated_rates_hold_on_new_heads(fitted) -> None:
    """On 400 unseen heads: bounds exceeded by at most 5 % on each side, clean alarms at most 5 %, each plus two deviations."""
    new = population(400, seed=7, first=500)
    found = [(s, decide(s, fitted)) for s in new]
    bins = [next(b for b in fitted.bounds if d["risk"] <= b.risk_upto) for _, d in found]
    above = np.mean([s.dice > d["predicted_dice"] + b.high for (s, d), b in zip(found, bins, strict=True)])
    below = np.mean([s.dice < d["predicted_dice"] + b.low for (s, d), b in zip(found, bins, strict=True)])
    assert above <= 0.05 + 2 * 0.011 + 0.01
    assert below <= 0.05 + 2 * 0.011 + 0.01
    clean = [d["risk"] > fitted.alarm_risk for s, d in found if s.artefact is None]
    assert np.mean(clean) <= 0.05 + 2 * 0.011
    error = np.mean([abs(s.dice - d["predicted_dice"]) for s, d in found])
    assert error < 0.03


def test_scans_that_reach_the_requirement_are_seldom_accused(fitted) -> None:
    """On 400 unseen heads: at every requirement at most 5 % of those that reach it, and more found than by the upper bound."""
    new = [(s, decide(s, fitted)) for s in population(400, seed=7, first=500)]
    for required in (0.6, 0.7, 0.75, 0.8):
        limit = interpolate(fitted.acceptable_risk, required)
        reach = [d["risk"] > limit for s, d in new if s.dice >= required]
        assert np.mean(reach) <= 0.05 + 2 * 0.008
        poor = [d for s, d in new if s.dice < required]
        high = [next(b.high for b in fitted.bounds if d["risk"] <= b.risk_upto) + d["predicted_dice"] for d in poor]
        assert sum(d["risk"] > limit for d in poor) > sum(h < required for h in high)


@pytest.mark.parametrize(("spread", "chosen"), [(0.05, "cross_entropy_per_gm"), (0.5, "expected_dice_loss")])
def test_another_score_must_be_clearly_better(spread: float, chosen: str) -> None:
    """The score that holds the artefacts' parts is the risk, also where one without them is as good; not where it is poor."""
    rng = np.random.default_rng(4)
    told = []
    for s in population():
        lost, luck = 1.0 - s.dice, rng.normal()
        scores = {
            "cross_entropy_per_gm": lost * float(np.exp(spread * luck)),
            "expected_dice_loss": lost * float(np.exp(0.049 * luck)),
        }
        told.append(replace(s, raw=s.raw | scores))
    assert [t.score for t in choose_risk(told)] == [chosen]


def test_too_few_scans_leave_test_a_to_the_bounds() -> None:
    """Fewer than 59 scans have no order statistic of 5 % at 95 % confidence."""
    partial = _Partial((Term("artefact_uncertainty_gm", 1.0, 1e-9),))
    assert fit_acceptable(population(19), partial) is None
    assert fit_acceptable(population(20), partial) is not None


def test_the_default_requirement_is_fixed_by_clean_scans(fitted) -> None:
    """5th percentile of clean Dice minus 0.05."""
    clean = [s.dice for s in population() if s.artefact is None]
    assert fitted.required_dice == pytest.approx(np.percentile(clean, 5) - 0.05, abs=1e-4)
    assert fitted.samples["required_dice_goal_met"]
    assert fitted.samples["anatomies"] == 2


def test_the_artefact_is_named(fitted) -> None:
    """Visible artefacts of unseen heads are named right in at least 95 % although a fifth leaks."""
    new = [s for s in population(100, seed=11, first=900) if s.artefact and s.loss >= 0.05]
    clean, matrix = np.array(fitted.artefact_clean), np.array(fitted.artefact_unmixing)
    strengths = [matrix @ (np.log([s.raw[f"artefact_{n}_gm"] for n in ARTEFACTS]) - clean) for s in new]
    assert np.mean([ARTEFACTS[int(z.argmax())] == s.artefact for z, s in zip(strengths, new, strict=True)]) >= 0.95


def test_gates_refuse_what_is_no_head_and_no_head_at_all(fitted) -> None:
    """Every image of the other kinds is refused with its code, and no unseen head, however bad."""
    for sample in others():
        gate = refusing_gate(sample.gates, fitted.gates)
        assert gate is not None
        assert gate.code == sample.refusal
    assert not any(refusing_gate(s.gates, fitted.gates) for s in population(100, seed=12, first=2000))


def test_the_volume_interval_covers_and_widens(fitted) -> None:
    """93 to 99 % of unseen references lie inside, and the multiplier rises with the risk."""
    new = population(300, seed=13, first=3000)
    inside = []
    for s in new:
        width = interpolate(fitted.volume_width, risk_of(s.raw, fitted)) * 0.008 * math.sqrt(s.gm_variance)
        inside.append(abs(s.gm_ml - s.reference_ml) <= width)
    assert 0.93 <= np.mean(inside) <= 0.99
    assert fitted.volume_width.y[-1] > fitted.volume_width.y[0]


def test_the_calibration_survives_json(fitted) -> None:
    """What is fitted is what the card reads, without infinities."""
    assert parse_calibration(json.loads(json.dumps(asdict(fitted), allow_nan=False)), "facts") == fitted


def test_predicted_dice_is_the_isotonic_regression_of_scikit_learn() -> None:
    """Oracle: the maintained implementation at the knots; between them at most a hundredth away."""
    fit = population(80, seed=3)
    partial = _Partial((Term("artefact_uncertainty_gm", 1.0, 1e-9),))
    risk = np.array([partial.risk(s) for s in fit])
    oracle = IsotonicRegression(increasing=False).fit(risk, [s.dice for s in fit]).predict(risk)
    ours = [interpolate(fit_dice(fit, partial), r) for r in risk]
    assert np.abs(np.array(ours) - oracle).mean() < 0.01
    assert (np.diff([interpolate(fit_dice(fit, partial), r) for r in np.sort(risk)]) <= 1e-12).all()


def test_the_bounds_are_those_of_crepes() -> None:
    """Oracle: a Mondrian conformal predictive system; both sides, every bin."""
    bound = population(100, seed=4)
    partial = _Partial((Term("artefact_uncertainty_gm", 1.0, 1e-9),))
    dice = Knots((-9.0, 0.0), (0.9, 0.4))
    risk = np.array([partial.risk(s) for s in bound])
    residual = np.array([s.dice - interpolate(dice, r) for s, r in zip(bound, risk, strict=True)])
    bins = np.searchsorted(risk_bins(risk)[:-1], risk)
    for k, ours in enumerate(fit_bounds(bound, partial, dice)):
        system = ConformalPredictiveSystem().fit(residual[bins == k])
        high = system.predict_percentiles(np.zeros(1), higher_percentiles=100 * (1 - RATE))
        low = system.predict_percentiles(np.zeros(1), lower_percentiles=100 * RATE)
        assert ours.high == pytest.approx(max(float(np.ravel(high)[0]), 0.0))
        assert ours.low == pytest.approx(min(float(np.ravel(low)[0]), 0.0))


def test_test_b_is_no_looser_than_mapie_allows() -> None:
    """Oracle: MAPIE's Learn-then-Test control of the false-positive rate accepts our threshold's error, and ours is the sharper."""
    rng = np.random.default_rng(8)
    scores = np.sort(rng.random(400))
    rank = order_statistic_rank(len(scores), 0.05, 0.95)
    assert rank is not None
    ours = scores[rank - 1]
    controller = BinaryClassificationController(
        predict_function=lambda x: np.stack([1 - np.ravel(x), np.ravel(x)], axis=1),
        risk="fpr", target_level=0.05, confidence_level=0.95, list_predict_params=np.linspace(0.9, 1.0, 101),
        best_predict_param_choice="fpr", fwer_method="fixed_sequence",
    )  # fmt: skip
    x = np.concatenate([scores, 0.9 + 0.1 * rng.random(50)])[:, None]
    y = np.concatenate([np.zeros(len(scores)), np.ones(50)]).astype(int)
    controller.calibrate(x, y)
    valid = np.ravel(controller.valid_predict_params)
    assert ours <= valid.min() + 0.01
    assert np.mean(scores > ours) <= 0.05


def test_temperature_is_found_again() -> None:
    """Labels drawn with logits divided by 1.7 give 1.7 back; the histogram loses nothing that matters."""
    rng = np.random.default_rng(2)
    logit = rng.normal(0, 4, 60_000)
    truth = rng.random(60_000) < 1 / (1 + np.exp(-logit / 1.7))
    base = made_up_sample(rng, 0, None, 0.0)
    sample = replace(base, logits=logit_histogram(1 / (1 + np.exp(-logit)), truth))
    assert len(sample.logits) == len(LOGIT_EDGES) - 1
    assert fit_temperature([sample]) == pytest.approx(1.7, rel=0.05)


def test_heads_are_never_split() -> None:
    """All scans of one head fall in the same half; the halves are equal."""
    fit, bound = split_heads(population(40), seed=3)
    assert {s.head for s in fit}.isdisjoint({s.head for s in bound})
    assert len({s.head for s in fit}) == 20


def test_too_few_scans_are_said_not_guessed() -> None:
    """Too few clean heads for Test B, or an artefact that is not there: the message says how many are needed."""
    with pytest.raises(CalibrationImpossible, match="12 clean heads, at least 19"):
        fit_alarm([0.1 * i for i in range(12)])
    rare = [s for s in population(80) if s.artefact != "blur"]
    with pytest.raises(CalibrationImpossible, match="artefact blur: 0 scans"):
        fit_calibration(rare, "no blur")


def test_fewer_than_59_clean_heads_lower_the_stated_confidence() -> None:
    """40 heads: the largest clean risk, and 1 - 0.95^40 = 87 % instead of 95 %; 59 and more: 95 %."""
    assert fit_alarm([float(i) for i in range(40)]) == Alarm(39.0, 0.8715, 40)
    assert fit_alarm([float(i) for i in range(59)]) == Alarm(58.0, 0.95, 59)
    assert fit_alarm([float(i) for i in range(200)]) == Alarm(195.0, 0.95, 200)


def test_samples_survive_their_file(tmp_path: Path) -> None:
    """JSON lines out and in; a foreign file is one line."""
    samples = population(4)
    write_samples(samples, tmp_path / "s.jsonl")
    assert read_samples(tmp_path / "s.jsonl") == samples
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="not a file of samples"):
        read_samples(tmp_path / "x.jsonl")
