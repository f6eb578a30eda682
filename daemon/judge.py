"""Scores -> verdict, with its reasons and what to do about it.

Two tests with stated error rates, both from the card's calibration (a site may have its own):

* Test A: the risk exceeds an order statistic of the scans that reach what the rule requires (docs/decisions/0091).
* Test B: the risk exceeds an order statistic of clean scans.

Both fire: `RESCAN`. One of them: `REVIEW`. None: `PASS`. An image that is no head of a known contrast, or a model without
a calibration, is `CANNOT_JUDGE`. What is incomplete or unknown is never `PASS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from daemon.calibration import SiteCalibration
from daemon.card import Calibration, Card, Gate
from daemon.score import MIN_GM_ML, Scores, interpolate
from daemon.words import Reason, Verdict

MIN_DOMINANT_SCORE = 0.25
"""Comparable score below which no artefact is named: a third of the strength of a typical visible one."""

MAX_GM_AT_EDGE_CM2 = 4.0
"""More grey matter than this in the outermost planes: the brain goes on beyond them. A whole head has none there; one that is
cut 8 mm into the brain has 5 or more, on whichever side."""

GM_ONLY = Reason(
    "grey_matter_only",
    "Only grey matter is judged: artefacts elsewhere in the image (skull, neck, white matter alone) are not.",
)

ARTEFACT_WORDS = {
    "noise": "noise",
    "spike": "an RF spike (stripes across the image)",
    "blur": "blur or missing resolution",
    "wrap": "wrap-around or undersampling ghosts",
    "motion": "patient motion",
}

ADVICE = {
    "noise": Reason(
        "advice_noise",
        "Check that the head coil is plugged in, selected and closed around the head, then repeat the scan.",
    ),
    "spike": Reason(
        "advice_spike",
        "Repeat the scan once. If the stripes come back, call the service engineer: look for sparking, loose metal, lamps.",
    ),
    "blur": Reason(
        "advice_blur",
        "Check matrix, partial Fourier and acceleration against the protocol, then repeat the scan.",
    ),
    "wrap": Reason(
        "advice_wrap",
        "Enlarge the field of view or the phase oversampling, check the phase direction and the head's position, then repeat.",
    ),
    "motion": Reason(
        "advice_motion",
        "Talk to the patient, pad the head, and repeat the scan; use the fast or motion-corrected protocol if there is one.",
    ),
}

ADVICE_REPEAT = Reason(
    "advice_repeat",
    "Look at the images; repeat the scan while the patient is still on the table.",
)
ADVICE_LOOK = Reason(
    "advice_look",
    "Look at the images before the patient leaves: the scan is at the border.",
)
ADVICE_SEND_ALL = Reason("advice_send_all", "Send the missing images again; the verdict is then renewed.")
ADVICE_BY_HAND = Reason("advice_by_hand", "Judge this scan by eye.")

GATE_TEXT = {
    "not_a_head": "The image does not look like a whole head to the model.",
    "unsupported_contrast": "The contrast is not that of a T1-weighted head.",
}


class Policy(Protocol):
    """What a rule says about the requirement; `daemon.rules.Rule` is one."""

    @property
    def required_dice(self) -> float | None:
        """Dice that the measurement needs; None takes the card's default."""


class Completeness(Protocol):
    """What is known about the images that should have come; `daemon.series.Evidence` is one."""

    @property
    def instances(self) -> int:
        """How many images came."""

    @property
    def expected(self) -> int | None:
        """How many the header announced; None where it does not tell."""


@dataclass(frozen=True)
class Judgement:
    """What is said of one scan.

    Attributes:
        verdict: the verdict.
        reasons: most important first.
        advice: most important first; empty for `PASS`.
        dominant_artefact: name from `ARTEFACTS`, or None.
        required_dice: the requirement that was applied; None where there is none yet (no calibration).
        calibration: which calibration was in force, in words: `global`, `scanner` or `protocol`, and its sample size.
    """

    verdict: Verdict
    reasons: tuple[Reason, ...]
    advice: tuple[Reason, ...]
    dominant_artefact: str | None
    required_dice: float | None
    calibration: str


def judge(
    scores: Scores,
    card: Card,
    rule: Policy | None = None,
    site: SiteCalibration | None = None,
    evidence: Completeness | None = None,
) -> Judgement:
    """Say what a scan is worth.

    Args:
        scores: of the scan.
        card: of the model that made them.
        rule: gives the required Dice; None takes the card's default.
        site: the site's own numbers for this scanner or protocol; None takes the card's.
        evidence: of completeness; None where the whole volume is known to be there (a file).

    Returns:
        A verdict with at least one reason.
    """
    calibration = card.calibration
    if calibration is None or scores.risk is None:
        text = f"The model {card.name} {card.version} has no calibration: its scores have no meaning yet."
        return Judgement(
            Verdict.CANNOT_JUDGE,
            (Reason("not_calibrated", text),),
            (ADVICE_BY_HAND,),
            None,
            None,
            "none",
        )
    required = _required(rule, calibration)
    in_force = "global" if site is None else site.level
    scans = calibration.alarm_scans if site is None else site.scans
    level = f"{in_force}, {scans} clean scans"
    gate = refusing_gate(scores.gates, calibration.gates)
    if gate is not None:
        reason = Reason(gate.code, GATE_TEXT.get(gate.code, gate.code))
        return Judgement(Verdict.CANNOT_JUDGE, (reason,), (ADVICE_BY_HAND,), None, required, level)
    below = test_a(scores, required, calibration, site)
    unusual = test_b(scores, calibration, site)
    missing = _missing(evidence)
    verdict = _verdict(below, unusual, missing)
    if verdict is Verdict.PASS and scores.gates.get("gm_ml", 0.0) < MIN_GM_ML:
        reason = Reason(
            "not_a_head",
            "Hardly any grey matter was found, and no artefact that would explain it.",
        )
        return Judgement(Verdict.CANNOT_JUDGE, (reason,), (ADVICE_BY_HAND,), None, required, level)
    if verdict is Verdict.PASS and scores.gates.get("gm_at_edge_cm2", 0.0) > MAX_GM_AT_EDGE_CM2:
        reason = Reason(
            "partial_coverage",
            "Grey matter reaches the edge of the image: part of the brain may lie outside the field of view.",
        )
        return Judgement(Verdict.CANNOT_JUDGE, (reason,), (ADVICE_BY_HAND,), None, required, level)
    dominant = dominant_artefact(scores)
    reasons = [
        *_test_reasons(scores, calibration, site, required, below, unusual),
        *(_artefact_reason(scores, dominant) if verdict is not Verdict.PASS else ()),
        *([missing] if missing is not None else []),
        GM_ONLY,
    ]
    return Judgement(
        verdict,
        tuple(reasons),
        _advice(verdict, dominant, missing),
        dominant,
        required,
        level,
    )


def test_a(scores: Scores, required_dice: float, calibration: Calibration, site: SiteCalibration | None = None) -> bool:
    """Whether the scan looks worse than those that reach the requirement.

    Fires on an acceptable scan with at most the probability `Calibration.bound_rate`, in the population of the calibration.
    Where a site knows Dice, or too few scans of the calibration reach the requirement for an order statistic, the upper bound
    of predicted Dice is compared instead.
    """
    if site is not None and site.dice_high is not None:
        return scores.values["predicted_dice"] + site.dice_high < required_dice
    table = calibration.acceptable_risk
    if table is None or required_dice > table.x[-1]:
        return scores.values["predicted_dice_high"] < required_dice
    return scores.risk is not None and scores.risk > interpolate(table, required_dice)


def test_b(scores: Scores, calibration: Calibration, site: SiteCalibration | None = None) -> bool:
    """Whether the risk exceeds the order statistic of clean scans in force."""
    limit = calibration.alarm_risk if site is None else site.alarm_risk
    return scores.risk is not None and scores.risk > limit


def refusing_gate(features: dict[str, float], gates: tuple[Gate, ...]) -> Gate | None:
    """The first gate that refuses these features, or None.

    Raises:
        KeyError: a gate names a feature that this daemon does not compute.
    """
    for gate in gates:
        if sum(weight * features[name] for name, weight in gate.weights.items()) > gate.limit:
            return gate
    return None


def dominant_artefact(scores: Scores) -> str | None:
    """The artefact with the highest comparable score, None where all are below `MIN_DOMINANT_SCORE`."""
    ranked = [(parts["score"], name) for name, parts in scores.artefacts.items() if "score" in parts]
    best, name = max(ranked, default=(0.0, ""))
    return name if best >= MIN_DOMINANT_SCORE else None


def _required(rule: Policy | None, calibration: Calibration) -> float:
    if rule is None or rule.required_dice is None:
        return calibration.required_dice
    return rule.required_dice


def _verdict(below: bool, unusual: bool, missing: Reason | None) -> Verdict:
    if below and unusual:
        return Verdict.RESCAN
    if below or unusual or missing is not None:
        return Verdict.REVIEW
    return Verdict.PASS


def _missing(evidence: Completeness | None) -> Reason | None:
    if evidence is None or evidence.expected is None or evidence.instances >= evidence.expected:
        return None
    return Reason(
        "incomplete",
        f"Only {evidence.instances} of {evidence.expected} images have come.",
    )


def _test_reasons(
    scores: Scores,
    calibration: Calibration,
    site: SiteCalibration | None,
    required: float,
    below: bool,
    unusual: bool,
) -> list[Reason]:
    v = scores.values
    predicted = (
        f"predicted to reach a Dice of {v['predicted_dice']:.2f} "
        f"({v['predicted_dice_low']:.2f} to {v['predicted_dice_high']:.2f}); {required:.2f} is required"
    )
    reasons = []
    if below:
        text = f"The grey-matter segmentation of this scan is {predicted}."
        if v["predicted_dice_high"] >= required:
            text += f" Of scans that reach it, at most {100 * calibration.bound_rate:.0f} % are this uncertain."
        reasons.append(Reason("dice_below_required", text))
    if unusual:
        rate = calibration.alarm_rate if site is None else site.alarm_rate
        text = f"It is more uncertain than {100 * (1 - rate):.0f} % of clean scans."
        reasons.append(Reason("worse_than_clean", text))
    if not reasons:
        reasons.append(
            Reason(
                "good_enough",
                f"The grey-matter segmentation of this scan is {predicted}.",
            )
        )
    return reasons


def _artefact_reason(scores: Scores, dominant: str | None) -> tuple[Reason, ...]:
    if dominant is None:
        return ()
    share = scores.values.get("gm_affected_share")
    where = f", worst in the {scores.slices[0].place}" if scores.slices else ""
    extent = "" if share is None else f", {100 * share:.0f} % of grey matter affected"
    return (
        Reason(
            f"artefact_{dominant}",
            f"It looks most like {ARTEFACT_WORDS[dominant]}{where}{extent}.",
        ),
    )


def _advice(verdict: Verdict, dominant: str | None, missing: Reason | None) -> tuple[Reason, ...]:
    advice: list[Reason] = []
    if verdict is Verdict.RESCAN:
        advice.append(ADVICE_REPEAT if dominant is None else ADVICE[dominant])
    elif verdict is Verdict.REVIEW:
        advice += [ADVICE_LOOK, *([ADVICE[dominant]] if dominant is not None else [])]
    if missing is not None:
        advice.insert(0, ADVICE_SEND_ALL)
    return tuple(advice)
