"""The life of an alert: a table (state, input) -> (state, effect), and the words it says to a person. No clock, no disk.

One alert per stack, updated and never repeated. It is raised on a provisional `RESCAN` and confirmed or withdrawn by the
final verdict; superseded when a repeat of the same protocol in the same exam scores better, resolved when that repeat
passes; expired when another exam starts on the scanner or nobody says anything for too long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from daemon.config import AlertSettings
from daemon.words import Verdict


class State(StrEnum):
    """Where the alert of a stack stands. `quiet` and `suppressed` are never published."""

    QUIET = "quiet"
    SUPPRESSED = "suppressed"
    RAISED = "raised"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


OPEN = frozenset({State.RAISED, State.ACKNOWLEDGED})
"""States in which something may still be done about it."""

PUBLISHED = frozenset(set(State) - {State.QUIET, State.SUPPRESSED})


class Input(StrEnum):
    """What can happen to the alert of a stack."""

    RESCAN = "rescan"
    """Its provisional verdict is RESCAN."""
    RESCAN_FINAL = "rescan_final"
    """Its final verdict is RESCAN."""
    CAPPED = "capped"
    """Its verdict is RESCAN, and the exam has had as many alerts as it may have."""
    SHADOWED = "shadowed"
    """Its verdict is RESCAN, and its scanner is in shadow mode."""
    HOLD = "hold"
    """Its verdict is better than RESCAN, but not by enough to clear."""
    CLEAR = "clear"
    """Its provisional verdict clears it."""
    CLEAR_FINAL = "clear_final"
    """Its final verdict clears it."""
    REPEAT_BETTER = "repeat_better"
    """A later scan of the same protocol in the same exam scores better."""
    REPEAT_PASSED = "repeat_passed"
    """A later scan of the same protocol in the same exam passes."""
    ACKNOWLEDGE = "acknowledge"
    """A person has decided."""
    OTHER_EXAM = "other_exam"
    """Another exam has started on the scanner."""
    TIME_UP = "time_up"
    """Nothing was said about it for too long."""


class Effect(StrEnum):
    """What follows."""

    NOTHING = "nothing"
    RAISE = "raise"
    UPDATE = "update"
    ACKNOWLEDGE = "acknowledge"
    END = "end"
    COUNT = "count"
    """Count it as suppressed, and say so with the exam's newest alert."""
    REFUSE = "refuse"
    """Tell the person that there is nothing to acknowledge."""


class AckReason(StrEnum):
    """What the person decided."""

    RESCANNING = "rescanning"
    ACCEPTABLE = "acceptable"
    PATIENT_CANNOT = "patient_cannot"
    WRONG = "wrong"


def _row(default: State, **other: tuple[State, Effect]) -> dict[Input, tuple[State, Effect]]:
    """One row of the table: what is not named leaves the state as it is; an acknowledgement is then refused."""
    row = dict.fromkeys(Input, (default, Effect.NOTHING))
    row[Input.ACKNOWLEDGE] = (default, Effect.REFUSE)
    return row | {Input(name): then for name, then in other.items()}


def _open_row(state: State) -> dict[Input, tuple[State, Effect]]:
    """The row of an open alert: its own verdicts update it, whatever they were limited by when it was new."""
    update = (state, Effect.UPDATE)
    return _row(
        state,
        rescan=update,
        rescan_final=update,
        capped=update,
        shadowed=update,
        hold=update,
        clear=update,
        clear_final=(State.WITHDRAWN, Effect.END),
        repeat_better=(State.SUPERSEDED, Effect.END),
        repeat_passed=(State.RESOLVED, Effect.END),
        acknowledge=(State.ACKNOWLEDGED, Effect.ACKNOWLEDGE),
        other_exam=(State.EXPIRED, Effect.END),
        time_up=(State.EXPIRED, Effect.END),
    )


_RAISE = (State.RAISED, Effect.RAISE)

TABLE: Mapping[State, Mapping[Input, tuple[State, Effect]]] = {
    State.QUIET: _row(State.QUIET, rescan=_RAISE, rescan_final=_RAISE, capped=(State.SUPPRESSED, Effect.COUNT)),
    State.SUPPRESSED: _row(State.SUPPRESSED),
    State.RAISED: _open_row(State.RAISED),
    State.ACKNOWLEDGED: _open_row(State.ACKNOWLEDGED),
    State.RESOLVED: _row(State.RESOLVED),
    State.SUPERSEDED: _row(State.SUPERSEDED),
    State.EXPIRED: _row(State.EXPIRED),
    # The one end that the stack's own verdict decided: a later revision may decide otherwise.
    State.WITHDRAWN: _row(State.WITHDRAWN, rescan=_RAISE, rescan_final=_RAISE),
}


def step(state: State, happened: Input) -> tuple[State, Effect]:
    """The table."""
    return TABLE[state][happened]


# --- From results to inputs -------------------------------------------------------------------------------------------


def own_input(result: Mapping[str, Any], state: State, settings: AlertSettings, raised_in_exam: int) -> Input:
    """What a stack's own result means for its alert.

    Args:
        result: the result object.
        state: of the stack's alert.
        settings: limit per exam and margin of clearing.
        raised_in_exam: alerts raised so far in this exam on this scanner.
    """
    final = bool(result["final"])
    if result["verdict"] == Verdict.RESCAN:
        if state in (State.QUIET, State.WITHDRAWN) and result.get("shadow"):
            return Input.SHADOWED
        if state is State.QUIET and raised_in_exam >= settings.max_per_exam:
            return Input.CAPPED
        return Input.RESCAN_FINAL if final else Input.RESCAN
    if result["verdict"] == Verdict.CANNOT_JUDGE:
        return Input.CLEAR_FINAL if final else Input.HOLD
    if not _clears(result, settings.clear_margin_dice):
        return Input.HOLD
    return Input.CLEAR_FINAL if final else Input.CLEAR


def repeat_input(result: Mapping[str, Any], alerted: Mapping[str, Any]) -> Input | None:
    """What a later final result of the same protocol and exam means for an open alert; None: nothing.

    Args:
        result: of the repeat.
        alerted: the result that the alert is about.
    """
    if not result["final"]:
        return None
    if result["verdict"] == Verdict.PASS:
        return Input.REPEAT_PASSED
    new, old = (r["scores"].get("predicted_dice") for r in (result, alerted))
    judged = result["verdict"] != Verdict.CANNOT_JUDGE
    return Input.REPEAT_BETTER if judged and new is not None and old is not None and new > old else None


def _clears(result: Mapping[str, Any], margin: float) -> bool:
    """Whether a verdict better than RESCAN is better by enough; a PASS without numbers is."""
    dice, required = result["scores"].get("predicted_dice"), result.get("required_dice")
    if dice is None or required is None:
        return bool(result["verdict"] == Verdict.PASS)
    return bool(dice >= required + margin - 1e-9)


def alert_id_of(stack_ref: str) -> str:
    """Id of the one alert that a stack can have."""
    return hashlib.sha256(f"alert {stack_ref}".encode()).hexdigest()[:24]


# --- What it says -----------------------------------------------------------------------------------------------------

ARTEFACT_NAMES = {
    "noise": "noise",
    "spike": "RF spike",
    "blur": "blur",
    "wrap": "wrap-around or ghosts",
    "motion": "motion",
}

TOLD_REASONS = 3
"""The two tests and the artefact; what the judge adds after them is said by `not_concluded` and `basis`."""

NOT_CONCLUDED = "Only grey matter was judged: artefacts elsewhere in the image are not, and no anatomy or disease is."


@dataclass(frozen=True)
class Told:
    """What an alert event adds to the result object.

    Attributes:
        alert_id: of the stack's one alert.
        state: as published.
        confirmed: whether a final verdict stands behind it.
        raised_at: unix seconds.
        changed_at: unix seconds of this change.
        expires_at: unix seconds after which it ends by itself; None once ended.
        acknowledged: {reason, by, at}, or None.
        ended_by: id of the result that ended it, or None.
        suppressed_in_exam: alerts of this exam that the limit held back.
    """

    alert_id: str
    state: State
    confirmed: bool
    raised_at: float
    changed_at: float
    expires_at: float | None
    acknowledged: Mapping[str, Any] | None
    ended_by: str | None
    suppressed_in_exam: int


def severity_of(confirmed: bool) -> str:
    """`medium` once a final verdict stands behind it, `low` before; advice to repeat a scan is never urgent."""
    return "medium" if confirmed else "low"


def alert_data(result: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """The `data` of an alert event: the result object and what the alert adds."""
    return {
        **result,
        "alert_id": told.alert_id,
        "state": str(told.state),
        "severity": severity_of(told.confirmed),
        "confirmed": told.confirmed,
        "raised_at": told.raised_at,
        "changed_at": told.changed_at,
        "expires_at": told.expires_at,
        "acknowledged": None if told.acknowledged is None else dict(told.acknowledged),
        "ended_by": told.ended_by,
        "suppressed_in_exam": told.suppressed_in_exam,
        "message": message_of(result, told.state, told.changed_at),
    }


def message_of(result: Mapping[str, Any], state: State, now: float) -> dict[str, Any]:
    """What an alert says to a person, sentence by sentence; a sentence whose ground is unknown is absent.

    Args:
        result: the result object that the alert is about.
        state: of the alert.
        now: unix seconds; `seconds_since_end` is counted up to it.
    """
    series, place = result.get("series", {}), place_of(result)
    ended_at = series.get("ended_at")
    parts: dict[str, Any] = {
        "headline": _headline(result, state, place),
        "scanner": result["scanner"],
        "series_number": series.get("number"),
        "seconds_since_end": None if ended_at is None else round(max(now - ended_at, 0.0), 1),
        "reason": " ".join(reason["text"] for reason in result["reasons"][:TOLD_REASONS]),
        "place": place,
        "quality": _quality(result),
        "advice": " ".join(advice["text"] for advice in result["advice"]) or None,
        "cost": _cost(series.get("duration_s")),
        "not_concluded": NOT_CONCLUDED,
        "basis": _basis(result),
    }
    return {name: part for name, part in parts.items() if part is not None}


def place_of(result: Mapping[str, Any]) -> str | None:
    """Where it is worst, in words; None where the result does not say."""
    slices = result.get("worst_slices") or result.get("slices") or []
    return slices[0].get("place") if slices else None


def _headline(result: Mapping[str, Any], state: State, place: str | None) -> str:
    """Such as `Repeat scan 5 on mr1: motion, upper third of the head`."""
    number = result.get("series", {}).get("number")
    scan = "the scan" if number is None else f"series {number}"
    artefact = ARTEFACT_NAMES.get(result["dominant_artefact"] or "", "too uncertain for the measurement")
    what = artefact if place is None else f"{artefact}, {place}"
    heads = {
        State.RAISED: "Repeat" if result["verdict"] == Verdict.RESCAN else "At the border, look at",
        State.ACKNOWLEDGED: "Seen:",
        State.RESOLVED: "Resolved by a repeat:",
        State.SUPERSEDED: "A repeat was better than",
        State.EXPIRED: "Expired:",
        State.WITHDRAWN: "Withdrawn:",
    }
    unsure = "" if result["final"] or state is not State.RAISED else " (provisional)"
    return f"{heads.get(state, 'Repeat')} {scan} on {result['scanner']}: {what}{unsure}"


def _quality(result: Mapping[str, Any]) -> str | None:
    scores, required = result["scores"], result.get("required_dice")
    if "predicted_dice" not in scores:
        return None
    text = f"Predicted Dice {scores['predicted_dice']:.2f}"
    if "predicted_dice_low" in scores and "predicted_dice_high" in scores:
        text += f" ({scores['predicted_dice_low']:.2f} to {scores['predicted_dice_high']:.2f})"
    return text if required is None else f"{text}, {required:.2f} required"


def _cost(duration_s: object) -> str | None:
    """Such as `Repeating it takes 5 min 12 s.`; None where the header does not tell, or not in numbers."""
    try:
        whole = round(float(str(duration_s)))
    except (ValueError, OverflowError):
        return None
    if whole <= 0:
        return None
    minutes, seconds = divmod(whole, 60)
    return f"Repeating it takes {minutes} min {seconds} s." if minutes else f"Repeating it takes {seconds} s."


def _basis(result: Mapping[str, Any]) -> str:
    """Model, policy and revision that it rests on."""
    model, policy = result["model"], result["policy"]
    kind = "final" if result["final"] else "provisional"
    named = f"Model {model.get('name', 'none')} {model.get('version', '')}".strip()
    return (
        f"{named}; rule {policy.get('rule') or 'none'}, calibration {policy.get('calibration') or 'none'}; "
        f"revision {result['revision']}, {kind}"
    )
