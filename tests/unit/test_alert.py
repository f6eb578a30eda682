"""The life of an alert: every state with every input, what results mean for it, and what it says."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import pytest

from daemon.alert import (
    NOT_CONCLUDED,
    OPEN,
    PUBLISHED,
    TABLE,
    AckReason,
    Effect,
    Input,
    State,
    alert_id_of,
    message_of,
    own_input,
    repeat_input,
    step,
)
from daemon.config import AlertSettings
from daemon.words import ARTEFACTS, Verdict
from tests.event_builders import START, result

EXPECTED = """
input           quiet       suppressed  raised        acknowledged  resolved  superseded  expired  withdrawn
rescan          raised!     .           raised~       acknowledged~ .         .           .        raised!
rescan_final    raised!     .           raised~       acknowledged~ .         .           .        raised!
capped          suppressed+ .           raised~       acknowledged~ .         .           .        .
shadowed        .           .           raised~       acknowledged~ .         .           .        .
hold            .           .           raised~       acknowledged~ .         .           .        .
clear           .           .           raised~       acknowledged~ .         .           .        .
clear_final     .           .           withdrawn|    withdrawn|    .         .           .        .
repeat_better   .           .           superseded|   superseded|   .         .           .        .
repeat_passed   .           .           resolved|     resolved|     .         .           .        .
acknowledge     x           x           acknowledged@ acknowledged@ x         x           x        x
other_exam      .           .           expired|      expired|      .         .           .        .
time_up         .           .           expired|      expired|      .         .           .        .
"""
SIGNS = {
    "!": Effect.RAISE,
    "~": Effect.UPDATE,
    "|": Effect.END,
    "@": Effect.ACKNOWLEDGE,
    "+": Effect.COUNT,
}


def expected() -> dict[tuple[State, Input], tuple[State, Effect]]:
    head, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    table = {}
    for name, *cells in rows:
        for state, cell in zip(head[1:], cells, strict=True):
            here = State(state)
            if cell in (".", "x"):
                then = (here, Effect.NOTHING if cell == "." else Effect.REFUSE)
            else:
                then = (State(cell[:-1]), SIGNS[cell[-1]])
            table[here, Input(name)] = then
    return table


@pytest.mark.parametrize(("state", "happened"), list(itertools.product(State, Input)))
def test_every_state_with_every_input(state: State, happened: Input) -> None:
    """All 96 cells, against a table written by hand."""
    assert step(state, happened) == expected()[state, happened]


def test_the_table_is_whole() -> None:
    """No state and no input is missing, and none is there that is not on the list."""
    assert set(TABLE) == set(State)
    assert all(set(row) == set(Input) for row in TABLE.values())
    assert len(expected()) == len(State) * len(Input) == 96


def test_an_ended_alert_stays_ended_but_for_a_new_verdict_on_a_withdrawn_one() -> None:
    """Only `withdrawn` can be left, and only by a RESCAN of the stack itself."""
    ended = PUBLISHED - OPEN
    left = {(s, i) for s in ended for i in Input if step(s, i)[0] is not s}
    assert left == {(State.WITHDRAWN, Input.RESCAN), (State.WITHDRAWN, Input.RESCAN_FINAL)}


def test_what_changes_the_state_is_told() -> None:
    """No state changes in silence, and a refused acknowledgement changes nothing."""
    for state, happened in itertools.product(State, Input):
        after, effect = step(state, happened)
        if effect in (Effect.NOTHING, Effect.REFUSE, Effect.UPDATE):
            assert after is state
        else:
            assert after is not state or effect is Effect.ACKNOWLEDGE


@pytest.mark.parametrize(
    ("made", "state", "raised", "happened"),
    [
        (result(final=False), State.QUIET, 0, Input.RESCAN),
        (result(final=True), State.QUIET, 0, Input.RESCAN_FINAL),
        (result(), State.QUIET, 2, Input.RESCAN_FINAL),
        (result(), State.QUIET, 3, Input.CAPPED),
        (result(), State.RAISED, 3, Input.RESCAN_FINAL),
        (result(shadow=True), State.QUIET, 0, Input.SHADOWED),
        (result(shadow=True), State.WITHDRAWN, 0, Input.SHADOWED),
        (result(shadow=True), State.RAISED, 1, Input.RESCAN_FINAL),
        (result(verdict="CANNOT_JUDGE", final=False), State.RAISED, 1, Input.HOLD),
        (result(verdict="CANNOT_JUDGE"), State.RAISED, 1, Input.CLEAR_FINAL),
        (result(verdict="PASS"), State.RAISED, 1, Input.CLEAR_FINAL),
        (result(verdict="PASS", final=False), State.RAISED, 1, Input.CLEAR),
        (result(verdict="REVIEW", dice=0.859), State.RAISED, 1, Input.HOLD),
        (result(verdict="REVIEW", dice=0.86), State.RAISED, 1, Input.CLEAR_FINAL),
        (result(verdict="PASS", dice=0.855), State.RAISED, 1, Input.HOLD),
        (result(verdict="PASS", required=None), State.RAISED, 1, Input.CLEAR_FINAL),
        (result(verdict="REVIEW", required=None), State.RAISED, 1, Input.HOLD),
    ],
)
def test_what_a_result_means_for_its_own_alert(made: dict, state: State, raised: int, happened: Input) -> None:
    """Limit of 3 per exam; cleared only 0.01 above the required Dice; shadow and limit concern new alerts alone."""
    assert own_input(made, state, AlertSettings(), raised) is happened


@pytest.mark.parametrize(
    ("made", "happened"),
    [
        (result("r", "PASS", final=False), None),
        (result("r", "PASS"), Input.REPEAT_PASSED),
        (result("r", "REVIEW", dice=0.84), Input.REPEAT_BETTER),
        (result("r", "RESCAN", dice=0.72), Input.REPEAT_BETTER),
        (result("r", "RESCAN", dice=0.71), None),
        (result("r", "RESCAN", dice=0.60), None),
        (result("r", "CANNOT_JUDGE"), None),
    ],
)
def test_what_a_repeat_means(made: dict, happened: Input | None) -> None:
    """Only a final verdict ends another scan's alert: a PASS resolves it, a better score supersedes it."""
    assert repeat_input(made, result("first", dice=0.71)) is happened


def test_one_id_per_stack() -> None:
    """The id follows from the stack, so an alert is updated and never repeated."""
    assert alert_id_of("a") == alert_id_of("a") != alert_id_of("b")


def test_it_says_what_where_how_sure_what_to_do_and_what_not_to_conclude() -> None:
    """Everything that a person needs, in plain words."""
    made = result(final=False, dice=0.712, ended_at=START, duration_s=312.0)
    made["scores"]["predicted_dice_high"] = 0.78
    made["scores"]["predicted_dice_low"] = 0.64
    assert message_of(made, State.RAISED, START + 7.04) == {
        "headline": "Repeat series 5 on mr1: motion, upper third of the head (provisional)",
        "scanner": "mr1",
        "series_number": 5,
        "seconds_since_end": 7.0,
        "reason": "The sentence.",
        "place": "upper third of the head",
        "quality": "Predicted Dice 0.71 (0.64 to 0.78), 0.85 required",
        "advice": "Pad the head and repeat the scan.",
        "cost": "Repeating it takes 5 min 12 s.",
        "not_concluded": NOT_CONCLUDED,
        "basis": "Model student 1; rule t1, calibration global, 100 clean scans; revision 1, provisional",
    }


@pytest.mark.parametrize(
    ("duration", "cost"),
    [(45, "45 s"), ("312.4", "5 min 12 s"), (0, None), (-3, None), ("soon", None), (float("inf"), None), (None, None)],
)
def test_the_cost_is_told_only_where_the_header_tells(duration: object, cost: str | None) -> None:
    """A number of seconds, as number or text; anything else is silence."""
    said = message_of(result(duration_s=duration), State.RAISED, START).get("cost")
    assert said == (None if cost is None else f"Repeating it takes {cost}.")


def test_what_is_unknown_is_absent() -> None:
    """No number of the series, no place, no score: no empty sentence."""
    made = result(verdict="RESCAN", ended_at=None)
    del made["series"], made["worst_slices"]
    made |= {"scores": {}, "advice": [], "dominant_artefact": None}
    said = message_of(made, State.RAISED, START)
    assert set(said) == {"headline", "scanner", "reason", "not_concluded", "basis"}
    assert said["headline"] == "Repeat the scan on mr1: too uncertain for the measurement"


def test_an_alert_that_a_better_verdict_holds_does_not_ask_for_a_repeat() -> None:
    """Within the margin of clearing a person is asked to look."""
    head = message_of(result(verdict="REVIEW", dice=0.855), State.RAISED, START)["headline"]
    assert head.startswith("At the border, look at series 5 on mr1")


@pytest.mark.parametrize("state", sorted(PUBLISHED))
def test_every_published_state_has_its_headline(state: State) -> None:
    """A person can tell the states apart by the first words."""
    heads = {message_of(result(), each, START)["headline"] for each in PUBLISHED}
    assert len(heads) == len(PUBLISHED)
    assert "series 5 on mr1" in message_of(result(), state, START)["headline"]


def test_the_page_knows_every_word() -> None:
    """Reasons, published states, verdicts and artefacts: the page has words for each, and for no other."""
    words = (resources.files("daemon.page") / "static" / "words.js").read_text(encoding="utf-8")

    def keys(name: str) -> set[str]:
        (body,) = re.findall(rf"export const {name} = {{\n(.*?)\n}};", words, re.DOTALL)
        return set(re.findall(r"^  (\w+):", body, re.MULTILINE))

    assert keys("ACKNOWLEDGE") == set(AckReason)
    assert keys("ALERT_STATES") == PUBLISHED
    assert keys("VERDICTS") == {*Verdict, "SHADOW"}
    assert keys("ARTEFACTS") == set(ARTEFACTS)
