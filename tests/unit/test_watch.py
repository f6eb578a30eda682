"""The terminal's table: what it shows, how it fits, and that no colour stands alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from daemon.client import ClientError, Endpoints
from daemon.keys import new_pair
from daemon.ledger import Ledger
from daemon.watch import Board, endpoints_of, render
from tests.event_builders import START, result


def board_of(tmp_path: Path, *results: dict[str, Any], **facts: Any) -> Board:
    """What a board shows after these results."""
    board = Board(**{"live": True, "ready": True, **facts})
    with contextlib.closing(Ledger(tmp_path / "l.db", clock=lambda: START + 5)) as ledger:
        for made in results:
            ledger.record(made)
        for event in ledger.events_since(0, 999):
            if event.stream in ("score", "alert"):
                board.take(json.loads(event.body))
    return board


def text_of(board: Board, width: int = 140, height: int = 40) -> str:
    return "\n".join(render(board, width, height, START + 65, colour=False))


def test_an_alert_says_everything(tmp_path: Path) -> None:
    """What, where, since when, what to do and its cost, what it rests on, what not to conclude."""
    text = text_of(board_of(tmp_path, result(final=False, duration_s=312)))
    for words in (
        "Repeat series 5 on mr1: motion, upper third of the head (provisional), 1 min 5 s after the last image",
        "Pad the head and repeat the scan. Repeating it takes 5 min 12 s.",
        "Model student 1; rule t1",
        "Only grey matter was judged",
    ):
        assert words in text


def test_one_line_per_stack_newest_first(tmp_path: Path) -> None:
    """The final result takes the place of the provisional one; every verdict has a sign, not a colour alone."""
    made = board_of(
        tmp_path,
        result("a", "PASS", final=False),
        result("b", "REVIEW", rule="t2"),
        result("c", "CANNOT_JUDGE", rule="t3"),
        result("a", "PASS", revision=2),
    )
    lines = [line for line in text_of(made).splitlines() if "mr1" in line]
    assert [line.split()[4] for line in lines] == ["PASS", "CANNOT_JUDGE", "REVIEW"]
    assert "✔ PASS" in lines[0]
    assert "final r2" in lines[0]
    assert "? CANNOT_JUDGE" in lines[1]
    assert "▲ REVIEW" in lines[2]


def test_an_ended_alert_is_gone_and_an_acknowledged_one_says_by_whom(tmp_path: Path) -> None:
    """The board follows the life of the alert."""
    with contextlib.closing(Ledger(tmp_path / "x.db", clock=lambda: START)) as ledger:
        ledger.record(result())
        ledger.acknowledge(ledger.open_alerts()[0].alert_id, "rescanning", "A.B.")
        events = [json.loads(e.body) for e in ledger.events_after("alert", 0, 9)]
        ledger.record(result("again", "PASS", ended_at=START + 300))
        ended = [json.loads(e.body) for e in ledger.events_after("alert", 2, 9)]
    board = Board(live=True)
    for event in events:
        board.take(event)
    assert "Seen: series 5 on mr1" in text_of(board)
    assert "[rescanning by A.B.]" in text_of(board)
    for event in ended:
        board.take(event)
    assert "No open alert." in text_of(board)


@pytest.mark.parametrize(
    ("live", "ready", "words"),
    [
        (None, None, "connecting"),
        (True, True, "live  ready"),
        (True, False, "live  NOT READY"),
        (False, True, "STALE: the daemon is silent"),
    ],
)
def test_the_first_line_says_whether_it_is_live(live: bool | None, ready: bool | None, words: str) -> None:
    """In words; a silent daemon is not called ready."""
    first = render(Board(live=live, ready=ready), 100, 10, START, colour=False)[0]
    assert first.endswith(words) or words in first
    assert not (live is False and "ready" in first)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("height", [3, 10, 60])
def test_it_fits_whatever_the_size(tmp_path: Path, width: int, height: int) -> None:
    """No line is longer than the terminal, and there are not more lines than it has."""
    board = board_of(tmp_path, *(result(f"s{n}", rule=f"r{n}") for n in range(4)), lost=3)
    for colour in (False, True):
        lines = render(board, width, height, START, colour=colour)
        assert len(lines) <= height
        assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= width for line in lines)


def test_nothing_that_was_sent_moves_the_cursor(tmp_path: Path) -> None:
    """Control characters of an event do not reach the terminal."""
    made = result()
    made["reasons"][0]["text"] = "bad \x1b[2J news \x07"
    text = text_of(board_of(tmp_path, made))
    assert "\x1b" not in text
    assert "\x07" not in text


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**dict.fromkeys(("state", "events", "replay", "server_key", "key")), **given})


def test_where_to_connect(tmp_path: Path) -> None:
    """What is given, else the ports in the state folder; a folder without a daemon is one line with the remedy."""
    (tmp_path / "ports.json").write_text('{"events": 1, "replay": 2}')
    assert endpoints_of(arguments(state=tmp_path)) == Endpoints("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    mixed = endpoints_of(arguments(state=tmp_path, events="tcp://mr:5556"))
    assert mixed == Endpoints("tcp://mr:5556", "tcp://127.0.0.1:2")
    with pytest.raises(ClientError, match="start the daemon with `rescan serve"):
        endpoints_of(arguments(state=tmp_path / "nothing"))
    (tmp_path / "ports.json").write_text("{}")
    with pytest.raises(ClientError, match="not written by a daemon"):
        endpoints_of(arguments(state=tmp_path))


def test_keys_come_in_pairs(tmp_path: Path) -> None:
    """Both, or neither."""
    ends = {"events": "tcp://a:1", "replay": "tcp://a:2"}
    server, mine = new_pair(tmp_path, "server"), new_pair(tmp_path, "mine")
    with pytest.raises(ClientError, match="give both"):
        endpoints_of(arguments(**ends, server_key=server.public.decode()))
    found = endpoints_of(arguments(**ends, server_key=str(tmp_path / "server.key"), key=tmp_path / "mine.key_secret"))
    assert (found.server_key, found.pair) == (server.public, mine)
