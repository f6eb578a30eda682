"""When a stack is judged: its states, what can happen to it, and the table of what follows."""

from __future__ import annotations

from enum import StrEnum


class Complete(StrEnum):
    """Why a stack was called complete; sentences in `daemon/reasons.py`."""

    COUNTED = "counted"
    RELEASED = "released"
    QUIET = "quiet"
    QUIET_FINAL = "quiet_final"
    TIMEOUT = "timeout"
    SCORE_NOW = "score_now"
    MPPS = "mpps"
    FILE = "file"


class State(StrEnum):
    """Where a stack stands."""

    OPEN = "open"
    PROVISIONAL = "provisional"
    FINAL = "final"


class Event(StrEnum):
    """What happens to a stack."""

    NEW = "a new image"
    DUPLICATE = "the same bytes again"
    CONFLICT = "other bytes under a known UID"
    COUNTED = Complete.COUNTED
    RELEASED = Complete.RELEASED
    QUIET = Complete.QUIET
    SCORE_NOW = Complete.SCORE_NOW
    MPPS = Complete.MPPS
    QUIET_FINAL = Complete.QUIET_FINAL
    TIMEOUT = Complete.TIMEOUT


class Effect(StrEnum):
    """What the table asks for."""

    NOTHING = "nothing"
    KEEP = "keep the image, wait on"
    REVISE = "keep the image, open the next revision"
    TELL = "judge, provisionally"
    CONFIRM = "judge, finally"


TABLE: dict[tuple[State, Event], tuple[Effect, State]] = {
    (State.OPEN, Event.NEW): (Effect.KEEP, State.OPEN),
    (State.OPEN, Event.DUPLICATE): (Effect.NOTHING, State.OPEN),
    (State.OPEN, Event.CONFLICT): (Effect.KEEP, State.OPEN),
    (State.OPEN, Event.COUNTED): (Effect.TELL, State.PROVISIONAL),
    (State.OPEN, Event.RELEASED): (Effect.TELL, State.PROVISIONAL),
    (State.OPEN, Event.QUIET): (Effect.TELL, State.PROVISIONAL),
    (State.OPEN, Event.SCORE_NOW): (Effect.TELL, State.PROVISIONAL),
    (State.OPEN, Event.MPPS): (Effect.CONFIRM, State.FINAL),
    (State.OPEN, Event.QUIET_FINAL): (Effect.CONFIRM, State.FINAL),
    (State.OPEN, Event.TIMEOUT): (Effect.CONFIRM, State.FINAL),
    (State.PROVISIONAL, Event.NEW): (Effect.KEEP, State.OPEN),
    (State.PROVISIONAL, Event.DUPLICATE): (Effect.NOTHING, State.PROVISIONAL),
    (State.PROVISIONAL, Event.CONFLICT): (Effect.KEEP, State.OPEN),
    (State.PROVISIONAL, Event.COUNTED): (Effect.NOTHING, State.PROVISIONAL),
    (State.PROVISIONAL, Event.RELEASED): (Effect.NOTHING, State.PROVISIONAL),
    (State.PROVISIONAL, Event.QUIET): (Effect.NOTHING, State.PROVISIONAL),
    (State.PROVISIONAL, Event.SCORE_NOW): (Effect.NOTHING, State.PROVISIONAL),
    (State.PROVISIONAL, Event.MPPS): (Effect.CONFIRM, State.FINAL),
    (State.PROVISIONAL, Event.QUIET_FINAL): (Effect.CONFIRM, State.FINAL),
    (State.PROVISIONAL, Event.TIMEOUT): (Effect.CONFIRM, State.FINAL),
    (State.FINAL, Event.NEW): (Effect.REVISE, State.OPEN),
    (State.FINAL, Event.DUPLICATE): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.CONFLICT): (Effect.REVISE, State.OPEN),
    (State.FINAL, Event.COUNTED): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.RELEASED): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.QUIET): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.SCORE_NOW): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.MPPS): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.QUIET_FINAL): (Effect.NOTHING, State.FINAL),
    (State.FINAL, Event.TIMEOUT): (Effect.NOTHING, State.FINAL),
}
"""(state, event) -> (effect, next state). MPPS has its place; no part of the daemon listens for it yet."""
