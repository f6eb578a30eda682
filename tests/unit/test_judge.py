"""Scores -> verdict: the table of the two tests, and everything that must never be `PASS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from daemon.calibration import SiteCalibration
from daemon.card import Gate, Knots
from daemon.judge import ADVICE, GATE_TEXT, GM_ONLY, dominant_artefact, judge
from daemon.reasons import ADVICE as ADVICE_CODES
from daemon.reasons import REASONS
from daemon.score import Scores, predicted_dice
from daemon.words import ARTEFACTS, Verdict
from tests.model_builders import made_up_calibration, made_up_card

CALIBRATION = made_up_calibration()
CARD = made_up_card(CALIBRATION)


@dataclass(frozen=True)
class Rule:
    required_dice: float | None = None


@dataclass(frozen=True)
class Evidence:
    instances: int
    expected: int | None


def scores_at(risk: float, artefact: str | None = None, **gates: float) -> Scores:
    values = {"risk": risk, "gm_volume_ml": 700.0} | predicted_dice(risk, CALIBRATION)
    parts = {name: {"uncertainty": 0.1, "score": 0.6 if name == artefact else 0.05} for name in ARTEFACTS}
    return Scores(values, parts, (), {"gm_ml": 700.0} | gates, risk)


@pytest.mark.parametrize(
    ("risk", "required", "verdict"),
    [
        (-4.0, None, Verdict.PASS),  # Dice 0.90, upper 0.95
        (-2.0, None, Verdict.RESCAN),  # Dice 0.60, upper 0.65 < 0.8; above -3
        (-2.9, 0.5, Verdict.REVIEW),  # B alone
        (-3.1, 0.9, Verdict.REVIEW),  # A alone
        (-3.0, None, Verdict.PASS),  # exactly at the order statistic: not above it
    ],
)
def test_the_table_of_the_two_tests(risk: float, required: float | None, verdict: Verdict) -> None:
    """A and B: RESCAN; one of them: REVIEW; none: PASS."""
    found = judge(scores_at(risk), CARD, Rule(required))
    assert found.verdict is verdict
    assert found.required_dice == (required or 0.8)


def test_a_fires_above_the_risk_of_scans_that_reach_the_requirement() -> None:
    """With order statistics in the card the upper bound no longer decides; the reason says on what ground."""
    table = Knots((0.5, 0.7, 0.8), (-1.0, -2.6, -2.9))
    card = made_up_card(replace(CALIBRATION, acceptable_risk=table))
    for risk, required, verdict in (
        (-2.8, 0.8, Verdict.RESCAN),
        (-2.7, 0.75, Verdict.RESCAN),
        (-2.7, 0.7, Verdict.REVIEW),
        (-2.8, 0.1, Verdict.REVIEW),
    ):
        assert judge(scores_at(risk), card, Rule(required)).verdict is verdict, (risk, required)
    text = judge(scores_at(-2.7), card, Rule(0.75)).reasons[0].text
    assert text.endswith("0.75 is required. Of scans that reach it, at most 5 % are this uncertain.")


def test_more_than_the_table_knows_is_asked_of_the_upper_bound() -> None:
    """Dice 0.90 (at most 0.95) is no PASS where 0.96 is required, though no scan of the calibration shows the risk for it."""
    card = made_up_card(replace(CALIBRATION, acceptable_risk=Knots((0.5, 0.7, 0.8), (-1.0, -2.6, -2.9))))
    verdicts = {required: judge(scores_at(-4.0), card, Rule(required)).verdict for required in (0.8, 0.9, 0.96)}
    assert verdicts == {0.8: Verdict.PASS, 0.9: Verdict.PASS, 0.96: Verdict.REVIEW}


def test_every_verdict_says_that_only_grey_matter_is_judged() -> None:
    """The last reason of PASS, REVIEW and RESCAN."""
    for risk in (-4.0, -2.9, -1.0):
        assert judge(scores_at(risk), CARD).reasons[-1] == GM_ONLY
    assert "elsewhere" in GM_ONLY.text


def test_rescan_names_the_artefact_and_what_to_do() -> None:
    """Most important first: the requirement, the comparison with clean scans, the artefact; advice for it."""
    found = judge(scores_at(-1.0, "spike"), CARD)
    assert [r.code for r in found.reasons] == [
        "dice_below_required",
        "worse_than_clean",
        "artefact_spike",
        "grey_matter_only",
    ]
    assert found.reasons[0].text.endswith("predicted to reach a Dice of 0.45 (0.40 to 0.50); 0.80 is required.")
    assert found.dominant_artefact == "spike"
    assert found.advice == (ADVICE["spike"],)


def test_weak_artefacts_are_not_named() -> None:
    """All comparable scores near those of clean scans: no dominant artefact, general advice."""
    found = judge(scores_at(-1.0), CARD)
    assert found.dominant_artefact is None
    assert [a.code for a in found.advice] == ["advice_repeat"]
    assert dominant_artefact(Scores({}, {n: {"uncertainty": 1.0} for n in ARTEFACTS}, (), {})) is None


def test_fewer_images_than_announced_are_never_pass() -> None:
    """An otherwise good scan becomes REVIEW with the counts in the reason; a bad one stays RESCAN."""
    found = judge(scores_at(-4.0), CARD, evidence=Evidence(100, 170))
    assert found.verdict is Verdict.REVIEW
    assert "Only 100 of 170" in found.reasons[1].text
    assert found.advice[0].code == "advice_send_all"
    assert judge(scores_at(-1.0), CARD, evidence=Evidence(100, 170)).verdict is Verdict.RESCAN
    assert judge(scores_at(-4.0), CARD, evidence=Evidence(170, 170)).verdict is Verdict.PASS
    assert judge(scores_at(-4.0), CARD, evidence=Evidence(170, None)).verdict is Verdict.PASS


def test_a_model_without_calibration_cannot_judge() -> None:
    """Scores without meaning never become PASS."""
    found = judge(scores_at(-4.0), made_up_card())
    assert (found.verdict, found.reasons[0].code) == (Verdict.CANNOT_JUDGE, "not_calibrated")
    assert found.required_dice is None


def test_a_gate_refuses_before_any_test() -> None:
    """A refused image is CANNOT_JUDGE with the gate's code, however good or bad its score."""
    gates = (Gate("unsupported_contrast", {"bright_ratio": -1.0}, -1.1), Gate("not_a_head", {"gm_ml": -1.0}, -200.0))
    card = made_up_card(replace(CALIBRATION, gates=gates))
    for risk in (-4.0, -1.0):
        assert judge(scores_at(risk, bright_ratio=1.0), card).reasons[0].code == "unsupported_contrast"
        assert judge(scores_at(risk, bright_ratio=1.3), card).verdict is not Verdict.CANNOT_JUDGE
    assert set(GATE_TEXT) <= set(REASONS)


def test_no_grey_matter_and_no_artefact_is_not_pass() -> None:
    """Where nothing was found there is nothing to pass."""
    found = judge(replace(scores_at(-4.0), gates={"gm_ml": 3.0}), CARD)
    assert (found.verdict, found.reasons[0].code) == (Verdict.CANNOT_JUDGE, "not_a_head")


def test_a_site_has_its_own_thresholds() -> None:
    """A scanner whose clean scans score higher is not accused; the level in force is named."""
    site = SiteCalibration("scanner", -1.5, 0.05, 0.95, 80, dice_high=0.3, dice_scans=40)
    assert judge(scores_at(-2.0), CARD).verdict is Verdict.RESCAN
    found = judge(scores_at(-2.0), CARD, site=site)
    assert found.verdict is Verdict.PASS
    assert found.calibration == "scanner, 80 clean scans"
    assert judge(scores_at(-4.0), CARD).calibration == "global, 120 clean scans"


def test_every_code_is_in_the_one_list() -> None:
    """Reasons and advice that the judge can give are documented codes."""
    assert {a.code for a in ADVICE.values()} <= set(ADVICE_CODES)
    found = [
        judge(scores_at(r, a), CARD, evidence=Evidence(1, 2)) for r in (-4.0, -2.9, -1.0) for a in (*ARTEFACTS, None)
    ]
    assert {r.code for j in found for r in j.reasons} <= set(REASONS)
    assert {a.code for j in found for a in j.advice} <= set(ADVICE_CODES)
