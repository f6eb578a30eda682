"""`rescan watch` as a user starts it: in a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_client import Site

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 120.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    ports = {"events": made.ports[0], "replay": made.ports[1]}
    (tmp_path / "ports.json").write_text(json.dumps(ports))
    yield made
    made.stop()


def test_in_a_terminal_it_shows_the_table_until_q(site: Site, tmp_path: Path) -> None:
    """What is open and what was judged before it started; then what comes; the terminal is given back."""
    site.record("before")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "watch", "--state", str(tmp_path)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
    )
    os.close(theirs)
    try:
        shown = until(ours, "", lambda text: "✖ RESCAN" in text and "Repeat series 5" in text)
        site.record("after")
        shown = until(ours, shown, lambda text: text.rpartition("\x1b[H")[2].count("✖ RESCAN") == 2)
        os.write(ours, b"q")
        shown = until(ours, shown, lambda text: "\x1b[?1049l" in text)
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "live" in shown
    assert "Not a medical device" in shown


def until(terminal: int, shown: str, done: Callable[[str], bool]) -> str:
    """Read the terminal until it shows something."""
    end = time.monotonic() + LIMIT_S
    while not done(shown):
        assert time.monotonic() < end, f"waited in vain; shown: {shown[-2000:]!r}"
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 65_536).decode(errors="replace")
    return shown


def test_in_a_pipe_it_prints_one_event_per_line(site: Site, tmp_path: Path) -> None:
    """From now on, as published; whether it is live stands on standard error."""
    site.record("before")
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "watch", "--state", str(tmp_path), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stderr.readline() == "live\n"
            site.record("after")
            events = [json.loads(process.stdout.readline()) for _ in range(2)]
        finally:
            process.kill()
    assert {(event["stream"], event["sequence"]) for event in events} == {("score", 2), ("alert", 2)}
