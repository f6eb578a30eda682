"""`rescan watch`: what the daemon says, live in a terminal; one JSON line per event where the output is no terminal.

It is the reference client with a face: it begins with the open alerts and the last results, and says STALE within 6 s of
silence.
"""

from __future__ import annotations

import argparse
import calendar
import json
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.alert import OPEN
from daemon.client import Client, ClientError, Endpoints, Start, ask
from daemon.config import EventsSettings, default_state_folder
from daemon.keys import read_pair, read_public

KEPT_RESULTS = 200
TURN_S = 0.25
"""How late a key is noticed and the age of things is shown."""

_MARKS = {"PASS": ("✔", "32"), "REVIEW": ("▲", "33"), "RESCAN": ("✖", "31"), "CANNOT_JUDGE": ("?", "36")}
"""Verdict -> sign and ANSI colour: never the colour alone."""


@dataclass
class Board:
    """What is shown.

    Attributes:
        results: newest first, one per stack.
        alerts: open alerts by id, in order of raising.
        live: whether the daemon is heard; None until the first word or the first silence.
        ready: whether a verdict would come now.
        heard_at: unix seconds of the last event.
        lost: events that retention had removed.
    """

    results: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_RESULTS))
    alerts: dict[str, dict[str, Any]] = field(default_factory=dict)
    live: bool | None = None
    ready: bool | None = None
    heard_at: float | None = None
    lost: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the streams `score` and `alert`."""
        data, stream = event["data"], event["stream"]
        if stream == "alert":
            if data["state"] in OPEN:
                self.alerts[data["alert_id"]] = data
            else:
                self.alerts.pop(data["alert_id"], None)
        elif stream == "score":
            kept = [r for r in self.results if r["stack_ref"] != data["stack_ref"]]
            self.results.clear()
            self.results.extend([{**data, "_time": event["time"]}, *kept][:KEPT_RESULTS])


def render(board: Board, width: int, height: int, now: float, *, colour: bool = True) -> list[str]:
    """The lines of the screen.

    Args:
        board: what to show.
        width: columns, at least 40.
        height: rows; older results are left out to fit.
        now: unix seconds.
        colour: ANSI colours, else plain text.

    Returns:
        At most `height` lines, none longer than `width` columns without its colours.
    """
    paint = _painter(colour)
    state = {None: ("connecting", "33"), True: ("live", "32"), False: ("STALE: the daemon is silent", "7;31")}[
        board.live
    ]
    ready = {None: "", True: "ready", False: "NOT READY"}[board.ready] if board.live else ""
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    lines = [
        paint(_fit(f"rescan watch  {clock}  {state[0]}  {ready}", width), state[1]),
        _fit("Research and quality-assurance software. Not a medical device.  q: quit", width),
        "",
    ]
    alerts = list(board.alerts.values())
    room = max(height - 6, 3)
    for alert in reversed(alerts[-max(room // 8, 1) :]):
        lines += _alert_lines(alert, width, now, paint)
    hidden = len(alerts) - max(room // 8, 1)
    if hidden > 0:
        lines.append(_fit(f"and {hidden} older open alerts", width))
    if not alerts:
        lines.append(_fit("No open alert.", width))
    lines += ["", paint(_fit(_HEAD, width), "1")]
    for result in board.results:
        lines.append(_result_line(result, width, paint))
    if not board.results:
        lines.append(_fit("No result yet.", width))
    if board.lost:
        lines.insert(2, paint(_fit(f"{board.lost} events were removed before they could be read", width), "31"))
    return lines[:height]


_HEAD = f"{'time':<9}{'scanner':<12}{'series':>6}  {'verdict':<15}{'artefact':<9}{'Dice':>5}{'of':>6}  {'state':<14}first reason"


def _result_line(result: Mapping[str, Any], width: int, paint: Callable[[str, str], str]) -> str:
    sign, colour = _MARKS.get(result["verdict"], ("?", "36"))
    clock = _clock(result.get("_time", ""))
    number = result.get("series", {}).get("number", "")
    state = f"{'final' if result['final'] else 'provisional'}{' r' + str(result['revision']) if result['revision'] > 1 else ''}"
    reason = result["reasons"][0]["text"] if result["reasons"] else ""
    before = f"{clock:<9}{result['scanner'][:11]:<12}{number!s:>6}  "
    verdict = f"{sign} {result['verdict']:<13}"
    after = (
        f"{result['dominant_artefact'] or '-':<9}{_number(result['scores'].get('predicted_dice')):>5}"
        f"{_number(result.get('required_dice')):>6}  {state + (' shadow' if result['shadow'] else ''):<14}{reason}"
    )
    room = max(width - len(before), 0)
    return _fit(before, width) + paint(_fit(verdict, room), colour) + _fit(after, max(room - len(verdict), 0))


def _alert_lines(alert: Mapping[str, Any], width: int, now: float, paint: Callable[[str, str], str]) -> list[str]:
    """One open alert: what, why, how sure, what to do, what not to conclude."""
    message = alert["message"]
    ended_at = alert.get("series", {}).get("ended_at")
    since = "" if ended_at is None else f", {_age(now - ended_at)} after the last image"
    acknowledged = alert["acknowledged"]
    seen = "" if acknowledged is None else f"  [{acknowledged['reason']} by {acknowledged['by'] or 'someone'}]"
    held = alert["suppressed_in_exam"]
    lines = [
        paint(_fit(f"✖ {message['headline']}{since}{seen}", width), "33" if seen else "1;31"),
        _fit(f"  {message['reason']}", width),
        _fit("  " + " ".join(filter(None, (message.get("advice"), message.get("cost")))), width),
        _fit(f"  {message['basis']}", width),
        _fit(f"  {message['not_concluded']}", width),
    ]
    if held:
        lines.append(_fit(f"  {held} more of this exam were held back.", width))
    return [line for line in lines if line.strip()]


def _painter(colour: bool) -> Callable[[str, str], str]:
    return (lambda text, code: f"\x1b[{code}m{text}\x1b[0m") if colour else (lambda text, _code: text)


def _fit(text: str, width: int) -> str:
    """Cut to the width, with a sign that it was cut; control characters are left out."""
    clean = "".join(c for c in text if c.isprintable())
    return clean if len(clean) <= width else (clean[: width - 1] + "…" if width else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _clock(timestamp: str) -> str:
    """Local time of an RFC 3339 time in UTC."""
    try:
        seconds = calendar.timegm(time.strptime(timestamp[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return ""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _age(seconds: float) -> str:
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


# --- the command ------------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan watch`."""
    parser = subparsers.add_parser("watch", help="live table of verdicts and alerts")
    add_endpoint_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON event per line, also in a terminal")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after so many seconds")
    parser.set_defaults(func=_watch)


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes to reach a daemon's events."""
    parser.add_argument("--state", type=Path, help="state folder of a daemon on this machine; its ports are read there")
    parser.add_argument("--events", metavar="tcp://HOST:PORT", help="live events, default tcp://127.0.0.1:5556")
    parser.add_argument("--replay", metavar="tcp://HOST:PORT", help="replay, default tcp://127.0.0.1:5557")
    parser.add_argument("--server-key", metavar="KEY", help="public key of the daemon or its server.key file (CURVE)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="this client's NAME.key_secret file (CURVE)")


def endpoints_of(args: argparse.Namespace) -> Endpoints:
    """Where to connect: what was given, else the ports in the state folder, else the defaults.

    Raises:
        ClientError: keys that do not fit together or a daemon that is not running there.
    """
    publish, replay = args.events, args.replay
    if publish is None or replay is None:
        found = _ports(args.state)
        publish, replay = publish or found[0], replay or found[1]
    if args.server_key is None and args.key is None:
        return Endpoints(publish, replay)
    if args.server_key is None or args.key is None:
        raise ClientError("--server-key and --key: give both for CURVE, or neither")
    return Endpoints(publish, replay, read_public(args.server_key).encode(), read_pair(args.key))


def _ports(state: Path | None) -> tuple[str, str]:
    """Endpoints of the daemon on this machine."""
    defaults = EventsSettings()
    file = (state or default_state_folder()) / "ports.json"
    try:
        ports = json.loads(file.read_text(encoding="utf-8"))
        return f"tcp://127.0.0.1:{ports['events']}", f"tcp://127.0.0.1:{ports['replay']}"
    except FileNotFoundError:
        if state is not None:
            raise ClientError(f"{file}: not there; start the daemon with `rescan serve --state {state}`") from None
        return defaults.publish, defaults.replay
    except (ValueError, KeyError, TypeError):
        raise ClientError(f"{file}: not written by a daemon; restart it") from None


def _watch(args: argparse.Namespace) -> int:
    endpoints = endpoints_of(args)
    if args.seconds is not None and args.seconds <= 0:
        raise ClientError(f"--seconds: got {args.seconds:g}; give a number above 0")
    until = None if args.seconds is None else time.monotonic() + args.seconds
    if args.json or not sys.stdout.isatty():
        return _watch_lines(endpoints, until)
    return _watch_screen(endpoints, until)


def _watch_lines(endpoints: Endpoints, until: float | None) -> int:
    """Events from now on, one JSON object per line; what is wrong goes to standard error."""

    def show(event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False), flush=True)

    def tell(live: bool) -> None:
        print("live" if live else "STALE: the daemon is silent", file=sys.stderr, flush=True)

    client = Client(endpoints, show, streams=("score", "alert"), start=Start.NOW, on_live=tell)
    try:
        while until is None or time.monotonic() < until:
            client.turn(TURN_S)
    finally:
        client.close()
    return 0


def _watch_screen(endpoints: Endpoints, until: float | None) -> int:
    """The table, drawn again a few times a second, until `q`."""
    board = Board()
    client = Client(
        endpoints,
        board.take,
        streams=("score", "alert"),
        start=Start.NOW,
        on_live=lambda live: _go_live(board, endpoints, live),
    )
    with _Screen() as screen:
        try:
            while (until is None or time.monotonic() < until) and not screen.quit_asked():
                client.turn(TURN_S)
                board.live, board.ready = client.live, client.ready
                size = shutil.get_terminal_size()
                screen.draw(
                    render(
                        board, max(size.columns, 40), size.lines - 1, time.time(), colour="NO_COLOR" not in os.environ
                    )
                )
        except KeyboardInterrupt:
            pass
        finally:
            client.close()
    return 0


def _go_live(board: Board, endpoints: Endpoints, live: bool) -> None:
    """Once the daemon is heard: begin with what is open there and with the last results."""
    if not live:
        return
    try:
        snapshot = ask(endpoints, {"op": "SNAPSHOT"})
        last = snapshot["last"]["score"]
        recent = ask(endpoints, {"op": "REPLAY", "stream": "score", "from": max(last - KEPT_RESULTS, 0) + 1})
    except (ClientError, KeyError):
        return
    board.alerts.clear()
    for event in (*recent.get("events", []), *snapshot["alerts"]):
        board.take(event)


class _Screen:
    """The terminal while the table is on it."""

    def __enter__(self) -> _Screen:
        self._input = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before = None if self._input is None else termios.tcgetattr(self._input)
        if self._input is not None:
            tty.setcbreak(self._input)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        sys.stdout.flush()
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        if self._input is not None and self._before is not None:
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)

    def draw(self, lines: list[str]) -> None:
        """Replace what is shown, without a blank moment."""
        sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()

    def quit_asked(self) -> bool:
        """Whether `q` was pressed."""
        if self._input is None or not select.select([self._input], [], [], 0)[0]:
            return False
        return os.read(self._input, 64).lower().startswith(b"q")
