"""The stream table of the reference client: every state with every input, and what its positions survive."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.client import Client, ClientError, Endpoints, Positions
from daemon.follow import FOLLOW, Action, Follow, Heard, hear_answer, hear_beat, hear_event
from daemon.keys import Pair

EXPECTED = """
input        lost                        catching_up                  live
old          catching_up:ask             .                            .
next         catching_up:handle_and_ask  catching_up:handle           live:handle
ahead        catching_up:ask             .                            catching_up:ask
beat_even    live:nothing                .                            .
beat_ahead   catching_up:ask             .                            catching_up:ask
beat_behind  catching_up:ask             .                            catching_up:ask
other_epoch  catching_up:restart         catching_up:restart          catching_up:restart
page_more    .                           catching_up:handle_and_ask   .
page_last    .                           live:handle                  .
went_back    .                           catching_up:restart          .
gone         .                           catching_up:skip             .
no_answer    .                           catching_up:ask              .
"""


def expected() -> dict[tuple[Follow, Heard], tuple[Follow, Action]]:
    head, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    table = {}
    for name, *cells in rows:
        for state, cell in zip(head[1:], cells, strict=True):
            then, _, action = cell.partition(":")
            here = Follow(state)
            table[here, Heard(name)] = (here, Action.NOTHING) if cell == "." else (Follow(then), Action(action))
    return table


@pytest.mark.parametrize(("state", "heard"), list(itertools.product(Follow, Heard)))
def test_every_state_with_every_input(state: Follow, heard: Heard) -> None:
    """All 36 cells, against a table written by hand."""
    assert FOLLOW[state][heard] == expected()[state, heard]


def test_the_table_is_whole() -> None:
    """No state and no input is missing."""
    assert set(FOLLOW) == set(Follow)
    assert all(set(row) == set(Heard) for row in FOLLOW.values())
    assert len(expected()) == 36


def test_it_never_stops_asking() -> None:
    """Whoever waits for an answer asks again without one; whoever is behind asks; nothing else handles a gap."""
    assert FOLLOW[Follow.CATCHING_UP][Heard.NO_ANSWER][1] is Action.ASK
    for state, heard in itertools.product((Follow.LOST, Follow.LIVE), (Heard.AHEAD, Heard.BEAT_AHEAD)):
        assert FOLLOW[state][heard] == (Follow.CATCHING_UP, Action.ASK)
    asks = {Action.ASK, Action.HANDLE_AND_ASK, Action.RESTART, Action.SKIP}
    for state, heard in itertools.product(Follow, Heard):
        after, action = FOLLOW[state][heard]
        if after is Follow.CATCHING_UP and state is not Follow.CATCHING_UP:
            assert action in asks


@pytest.mark.parametrize(("sequence", "heard"), [(4, Heard.OLD), (5, Heard.OLD), (6, Heard.NEXT), (7, Heard.AHEAD)])
def test_what_a_live_event_is(sequence: int, heard: Heard) -> None:
    """Against the last handled one."""
    assert hear_event(5, sequence) is heard


@pytest.mark.parametrize(("last", "heard"), [(4, Heard.BEAT_BEHIND), (5, Heard.BEAT_EVEN), (6, Heard.BEAT_AHEAD)])
def test_what_a_heartbeat_is(last: int, heard: Heard) -> None:
    """Against the last handled one."""
    assert hear_beat(5, last) is heard


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_whatever_is_lost_every_event_is_handled_once_and_in_order(data: st.DataObject) -> None:
    """A stream of up to 12 events through random loss, silence and unanswered requests; at the end nothing is missing."""
    last = data.draw(st.integers(0, 12), "events in the log")
    state, position, written, asked = Follow.LOST, 0, 0, False
    handled: list[int] = []

    def hear(heard: Heard, events: list[int]) -> None:
        nonlocal state, position, asked
        state, action = FOLLOW[state][heard]
        if action in (Action.HANDLE, Action.HANDLE_AND_ASK):
            for sequence in events:
                if sequence > position:
                    handled.append(sequence)
                    position = sequence
        asked = asked or action in (Action.ASK, Action.HANDLE_AND_ASK, Action.RESTART)

    for _ in range(data.draw(st.integers(0, 40), "turns")):
        move = data.draw(st.sampled_from(["event", "lost event", "beat", "answer", "lost answer"]))
        if move in ("event", "lost event") and written < last:
            written += 1
            if move == "event":
                hear(hear_event(position, written), [written])
        elif move == "beat":
            hear(hear_beat(position, written), [])
        elif move in ("answer", "lost answer") and asked:
            asked = False
            page = list(range(position + 1, written + 1))[:3]
            more = bool(page) and page[-1] < written
            answer = {"events": page, "last": written, "more": more}
            heard = hear_answer(position, answer) if move == "answer" else Heard.NO_ANSWER
            assert heard is not None
            hear(heard, page if move == "answer" else [])
    for _ in range(2 * last + 4):
        hear(hear_beat(position, last), [])
        if asked:
            asked = False
            page = list(range(position + 1, last + 1))[:3]
            hear(Heard.PAGE_MORE if page and page[-1] < last else Heard.PAGE_LAST, page)
    assert handled == list(range(1, last + 1))
    assert state is Follow.LIVE


def test_a_position_is_kept_for_the_next_start(tmp_path: Path) -> None:
    """Epoch and sequences; a stream that is new begins at its first event."""
    first = Positions(tmp_path / "p", ("alert",))
    first.restart("epoch")
    first.handled("alert", 7)
    first.save()
    second = Positions(tmp_path / "p", ("alert", "score"))
    assert (second.epoch, second.last) == ("epoch", {"alert": 7, "score": 0})


def test_a_position_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while writing leaves the old one."""
    made = Positions(tmp_path / "p", ("alert",))
    made.restart("epoch")
    made.save()
    before = (tmp_path / "p").read_bytes()
    made.handled("alert", 1)

    def crash(_descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="no space"):
        made.save()
    assert (tmp_path / "p").read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "epoch": "e", "last": {"alert": "x"}}']
)
def test_a_strange_position_is_one_line(tmp_path: Path, text: str) -> None:
    """The remedy stands in it."""
    (tmp_path / "p").write_text(text)
    with pytest.raises(ClientError, match="remove it to handle the whole log again"):
        Positions(tmp_path / "p", ("alert",))


def test_another_log_begins_anew(tmp_path: Path) -> None:
    """Every stream at its first event; the epoch that was is not believed again."""
    made = Positions(tmp_path / "p", ("alert",))
    made.restart("old")
    made.handled("alert", 9)
    made.restart("new")
    made.save()
    assert made.past == {"old"}
    assert json.loads((tmp_path / "p").read_text()) == {"version": 1, "epoch": "new", "last": {"alert": 0}}


def test_what_cannot_be_followed_is_one_line() -> None:
    """An unknown stream, half a set of keys."""
    with pytest.raises(ClientError, match="known are score, alert, series, health"):
        Client(Endpoints("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"), lambda _event: None, streams=("alarm",))
    with pytest.raises(ClientError, match="or neither"):
        Endpoints("a", "b", None, Pair(b"", b""))
