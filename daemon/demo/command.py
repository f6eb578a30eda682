"""`rescan demo`: make a head, push three scans of it by C-STORE as a scanner would, tell what the daemon says of each."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from daemon.config import Engine
from daemon.demo.anatomy import AnatomyMissing, Stream, draw_head, head_seed
from daemon.demo.artefacts import SPIKE_MAGNITUDE, mean_displacement_mm, with_motion, with_spike
from daemon.demo.hosted import LOG_FILE, QUIET_FINAL_S, DemoError, Hosted, Verdicts
from daemon.demo.paint import paint
from daemon.demo.picture import write_picture
from daemon.dicom_write import Plan, classic_series
from daemon.send import SUCCESS, Caller, SendError, Sent, store
from daemon.words import Verdict, Volume

HEAD, SCAN = 0, 1
"""Indices in the demo's stream of seeds: the head, and how it was scanned. Chosen once, never by a verdict."""

VERDICT_LIMIT_S = 300.0
PICTURE_LIMIT_S = 60.0
CALLING = "DEMO_MR"
TRIES = 5
ANSWER_LIMIT_S = 20.0
"""Without an answer for so long, an image is sent again."""


@dataclass(frozen=True)
class Scan:
    """One scan of the demo and what the daemon should say of it."""

    name: str
    text: str
    volume: Volume
    verdict: Verdict
    artefact: str | None


@dataclass(frozen=True)
class Outcome:
    """What the daemon said of one scan.

    Attributes:
        result: the final result object.
        first_s: from the last answered image to the first verdict; `final_s` to the final one.
    """

    scan: Scan
    result: dict[str, Any]
    first_s: float
    final_s: float

    @property
    def right(self) -> bool:
        """Whether verdict and artefact are what was made."""
        said = (self.result["verdict"], self.result["dominant_artefact"] if self.scan.artefact else None)
        return said == (self.scan.verdict, self.scan.artefact)


class Progress:
    """One line on standard error: rewritten on a terminal, printed once elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._open = False

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A line that the next one replaces; nothing where that is not possible."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
            self._open = True

    def clear(self) -> None:
        """Take the line away."""
        if self._open:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
            self._open = False


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="see it work: made-up series pushed to a daemon of its own",
        description="Start a daemon on loopback, make three scans of a made-up head (clean, with patient motion, with an RF "
        "spike), push each by C-STORE as a scanner would, and print what the daemon says of them. Nothing is downloaded. "
        "The status is 0 only if the clean scan is PASS and the others are RESCAN for the right artefact.",
        epilog="examples:\n"
        "  rescan demo                  three scans, three verdicts\n"
        "  rescan demo --keep           and leave the daemon running, to push to it and watch it",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="pictures (default: demo-out)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the daemon running afterwards")
    parser.add_argument("--model", type=Path, metavar="FILE", help="the student (default: the one that ships)")
    parser.add_argument("--engine", choices=[*Engine], help="what runs the student (default: auto)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    progress = Progress()
    missing = [name for name in ("nilearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        progress.say(f"rescan demo: needs {' and '.join(missing)}; install the extra `demo`")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    flags = [
        part for name in ("model", "engine") if (value := getattr(args, name)) for part in (f"--{name}", str(value))
    ]
    hosted = Hosted(Path(tempfile.mkdtemp(prefix="rescan-demo-")), flags)
    keep = False
    try:
        outcomes = show(hosted, args.out, progress)
        keep = args.keep
    except (DemoError, SendError, AnatomyMissing) as error:
        progress.say(f"rescan demo: {error}")
        log = hosted.state / LOG_FILE
        if log.is_file():
            shutil.copyfile(log, args.out / LOG_FILE)
            progress.say(f"the daemon's log is in {args.out / LOG_FILE}")
        return 1
    finally:
        if not keep:
            hosted.stop()
            shutil.rmtree(hosted.state, ignore_errors=True)
    if keep:
        print(how_to_go_on(hosted))
    return 0 if all(outcome.right for outcome in outcomes) else 1


def show(hosted: Hosted, out: Path, progress: Progress) -> list[Outcome]:
    """Everything between the start and the end of the daemon."""
    started = time.monotonic()
    progress.say("starting the daemon on loopback")
    hosted.start()
    progress.say("making a head from the MNI152 template")
    scans = make_scans()
    hosted.wait_ready()
    progress.say(
        f"ready after {time.monotonic() - started:.0f} s; a verdict is final after {QUIET_FINAL_S:g} s of silence"
    )
    verdicts = Verdicts(hosted.ports.events)
    try:
        verdicts.wait_connected()
        outcomes = []
        for number, scan in enumerate(scans, 1):
            outcomes.append(judge(scan, number, hosted, verdicts, progress))
            tell(outcomes[-1], number, out, hosted, progress)
    finally:
        verdicts.close()
    right = sum(outcome.right for outcome in outcomes)
    print(
        f"\n{right} of {len(outcomes)} as expected; {hosted.metric_lines()} metrics told; {time.monotonic() - started:.0f} s in all"
    )
    return outcomes


def make_scans() -> list[Scan]:
    """The same head three times: as it is, while the patient moves, with a spike."""
    clean = paint(draw_head(head_seed(Stream.DEMO, HEAD)), head_seed(Stream.DEMO, SCAN)).volume
    motion = f"the patient nods four times, {mean_displacement_mm():.1f} mm on average over the brain"
    spike = f"one sample of k-space off by {SPIKE_MAGNITUDE:g} x the largest"
    return [
        Scan("clean", "no artefact", clean, Verdict.PASS, None),
        Scan("motion", motion, with_motion(clean), Verdict.RESCAN, "motion"),
        Scan("spike", spike, with_spike(clean), Verdict.RESCAN, "spike"),
    ]


def judge(scan: Scan, number: int, hosted: Hosted, verdicts: Verdicts, progress: Progress) -> Outcome:
    """Push one scan in an association of its own, wait for its first and its final verdict."""
    datasets = classic_series(scan.volume, Plan(seed=f"rescan demo {scan.name}", series_number=number + 1))
    last = push(datasets, Caller("127.0.0.1", hosted.ports.dicom, calling=CALLING), scan.name, progress)
    first_s: float | None = None
    while True:
        progress.show(f"{scan.name}: {'waiting for more images' if first_s else 'judging'}")
        result = verdicts.next(VERDICT_LIMIT_S)
        if result["evidence"].get("instances") != len(datasets):
            continue  # said while images were still on their way
        elapsed_s = time.monotonic() - last
        first_s = elapsed_s if first_s is None else first_s
        if result["final"]:
            verdicts.forget(result["series_ref"])
            return Outcome(scan, result, first_s, elapsed_s)


def push(datasets: list[Dataset], caller: Caller, name: str, progress: Progress) -> float:
    """C-STORE every image in one association; what was not answered is sent again in a new one, as scanners do.

    Returns:
        When the last image was answered (`time.monotonic`).

    Raises:
        SendError: an image was not answered with success, again and again.
    """
    started = time.monotonic()
    waiting, tries = list(datasets), 0
    while waiting:
        if tries == TRIES:
            raise SendError(
                f"{len(waiting)} of {len(datasets)} images were not answered 0x0000 in {tries} associations"
            )
        tries += 1
        assoc = caller.associate(waiting[:1])
        assoc.dimse_timeout = ANSWER_LIMIT_S
        while waiting and store(assoc, waiting[0], Sent()) == SUCCESS:
            waiting.pop(0)
            progress.show(f"{name}: pushed {len(datasets) - len(waiting)} of {len(datasets)} images")
        last = time.monotonic()
        if waiting:
            assoc.abort()
        else:
            assoc.release()
    progress.say(f"{name}: pushed {len(datasets)} images in {last - started:.1f} s")
    return last


def tell(outcome: Outcome, number: int, out: Path, hosted: Hosted, progress: Progress) -> None:
    """Print one verdict and write its picture."""
    scan, result = outcome.scan, outcome.result
    file = out / f"{number}-{scan.name}.png"
    deadline = time.monotonic() + PICTURE_LIMIT_S
    progress.show(f"{scan.name}: drawing")
    while not (drawn := write_picture(hosted.state / "pictures", result, f"{scan.name} scan", file)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    progress.clear()
    expected = (
        "as expected"
        if outcome.right
        else f"expected {scan.verdict}" + (f" for {scan.artefact}" if scan.artefact else "")
    )
    rows = [
        ("verdict", f"{result['verdict']} ({expected})"),
        ("artefact", artefact(result)),
        ("predicted Dice", predicted(result)),
        ("advice", " ".join(advice["text"] for advice in result["advice"]) or "none"),
        ("time", f"{outcome.first_s:.1f} s from the last image to the verdict, {outcome.final_s:.1f} s until final"),
        ("picture", str(file) if drawn else "none was drawn"),
    ]
    print(f"{number}. {scan.name} scan: {scan.text}")
    for label, text in rows:
        print(f"   {label:<15} {text}")
    sys.stdout.flush()


def artefact(result: dict[str, Any]) -> str:
    """What it looks most like; a trace that spoils nothing is called so."""
    name: str | None = result["dominant_artefact"]
    if name is None:
        return "none"
    return f"a trace of {name}, which spoils nothing" if result["verdict"] == Verdict.PASS else name


def predicted(result: dict[str, Any]) -> str:
    """The predicted Dice with its interval, and what is required."""
    scores = result["scores"]
    if "predicted_dice" not in scores:
        return "unknown: " + "; ".join(reason["text"] for reason in result["reasons"])
    text = f"{scores['predicted_dice']:.3f}"
    if "predicted_dice_low" in scores and "predicted_dice_high" in scores:
        text += f" ({scores['predicted_dice_low']:.3f} to {scores['predicted_dice_high']:.3f})"
    if "required_dice" in result:
        text += f", required {result['required_dice']:.3f}"
    return text


def how_to_go_on(hosted: Hosted) -> str:
    """What can be done with a daemon that was left running."""
    ports, state = hosted.ports, hosted.state
    return f"""
The daemon goes on running (process {hosted.pid}):
  push a folder    rescan send FOLDER 127.0.0.1:{ports.dicom}
  or with DCMTK    storescu -aec RESCAN +sd 127.0.0.1 {ports.dicom} FOLDER
  watch            rescan watch --state {state}
  page             http://127.0.0.1:{ports.http}/
  metrics          http://127.0.0.1:{ports.http}/metrics
  events           tcp://127.0.0.1:{ports.events}, topics v1/score/ v1/alert/ v1/series/ v1/health/
  stop             kill {hosted.pid}
Its state and log are in {state}; remove that folder afterwards."""
