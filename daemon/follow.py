"""Following one stream without losing an event: a table (state, input) -> (state, action). No socket, no clock.

Whoever writes a client in another language copies this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Follow(StrEnum):
    """Where a stream stands."""

    LOST = "lost"
    """Nothing was heard yet: not even the epoch is certain."""
    CATCHING_UP = "catching_up"
    """A replay was asked for."""
    LIVE = "live"
    """Everything that the log holds was handled."""


class Heard(StrEnum):
    """What can be heard of a stream."""

    OLD = "old"
    """A live event that was handled before."""
    NEXT = "next"
    """The live event that follows."""
    AHEAD = "ahead"
    """A live event beyond a gap."""
    BEAT_EVEN = "beat_even"
    """A heartbeat that knows no more than we do."""
    BEAT_AHEAD = "beat_ahead"
    """A heartbeat that knows of later events."""
    BEAT_BEHIND = "beat_behind"
    """A heartbeat that knows less than we do: it was waiting in a queue, or the log was put back."""
    OTHER_EPOCH = "other_epoch"
    """The log is another one."""
    PAGE_MORE = "page_more"
    """An answer to a replay, with more to come."""
    PAGE_LAST = "page_last"
    """An answer to a replay that ends where the log ends."""
    WENT_BACK = "went_back"
    """An answer that shows that the log ends before our position: it was put back from a backup."""
    GONE = "gone"
    """What we asked for was removed by retention."""
    NO_ANSWER = "no_answer"
    """A replay was not answered in time."""


class Action(StrEnum):
    """What to do then."""

    NOTHING = "nothing"
    HANDLE = "handle"
    """Handle the event, or those of the page in order, and move the position."""
    ASK = "ask"
    """Ask for a replay from the position on."""
    HANDLE_AND_ASK = "handle_and_ask"
    RESTART = "restart"
    """Forget the position, take the epoch that was heard, ask from the first event."""
    SKIP = "skip"
    """Say that events are lost, move to the first one that is left, ask."""


_Cell = tuple[Follow, Action]


def _row(state: Follow, **other: _Cell) -> dict[Heard, _Cell]:
    """One row of the table: what is not named changes nothing. Another log is begun anew in every state."""
    row = dict.fromkeys(Heard, (state, Action.NOTHING))
    row[Heard.OTHER_EPOCH] = (Follow.CATCHING_UP, Action.RESTART)
    return row | {Heard(name): then for name, then in other.items()}


_ASK = (Follow.CATCHING_UP, Action.ASK)

FOLLOW: Mapping[Follow, Mapping[Heard, _Cell]] = {
    # Not knowing the end of the log, it asks at the first word of any kind.
    Follow.LOST: _row(
        Follow.LOST,
        old=_ASK,
        next=(Follow.CATCHING_UP, Action.HANDLE_AND_ASK),
        ahead=_ASK,
        beat_even=(Follow.LIVE, Action.NOTHING),
        beat_ahead=_ASK,
        beat_behind=_ASK,
    ),
    Follow.CATCHING_UP: _row(
        Follow.CATCHING_UP,
        next=(Follow.CATCHING_UP, Action.HANDLE),
        page_more=(Follow.CATCHING_UP, Action.HANDLE_AND_ASK),
        page_last=(Follow.LIVE, Action.HANDLE),
        went_back=(Follow.CATCHING_UP, Action.RESTART),
        gone=(Follow.CATCHING_UP, Action.SKIP),
        no_answer=_ASK,
    ),
    Follow.LIVE: _row(
        Follow.LIVE,
        next=(Follow.LIVE, Action.HANDLE),
        ahead=_ASK,
        beat_ahead=_ASK,
        beat_behind=_ASK,
    ),
}


def hear_event(position: int, sequence: int) -> Heard:
    """What a live event is to a stream whose last handled event is `position`."""
    if sequence <= position:
        return Heard.OLD
    return Heard.NEXT if sequence == position + 1 else Heard.AHEAD


def hear_beat(position: int, last: int) -> Heard:
    """What a heartbeat is to a stream."""
    if last == position:
        return Heard.BEAT_EVEN
    return Heard.BEAT_AHEAD if last > position else Heard.BEAT_BEHIND


def hear_answer(position: int, answer: Mapping[str, Any]) -> Heard | None:
    """What an answer to REPLAY is to a stream; None where it is none (an error that asking again may mend)."""
    if answer.get("error") == "GONE":
        return Heard.GONE
    if "events" not in answer:
        return None
    if answer["last"] < position:
        return Heard.WENT_BACK
    return Heard.PAGE_MORE if answer["more"] else Heard.PAGE_LAST
