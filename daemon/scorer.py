"""The scorer process: stack -> volume -> prepare -> student -> scores, where a crash in native code hurts nothing else.

It loads the model, warms it and checks the golden case before it says `loaded`. A model that cannot be served is told in one
line and tried again when the file changes; the process stays.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from daemon.card import Card, CardError
from daemon.config import ModelSettings, Settings
from daemon.engines import EngineError
from daemon.log import Log
from daemon.prepare import Prepared, prepare
from daemon.reader import spool_folder
from daemon.score import Scores, score_maps
from daemon.spool import SpoolReader
from daemon.student import Student
from daemon.volume import build_volume
from daemon.words import Maps, Reason, Refusal, Volume

SHIPPED_MODEL = Path(__file__).parent / "models" / "student.onnx"
"""The student that comes with Rescan."""

_LOOK_AGAIN_S = 2.0


@dataclass(frozen=True)
class Scored:
    """What the scorer found: scores, or the reason why there are none.

    Attributes:
        scores: None where refused.
        refusal: None where scored.
        seconds: stage -> seconds that it took.
        provenance: facts of the volume worth keeping; never identifying.
    """

    scores: Scores | None
    refusal: Reason | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """One scored volume with everything that pictures and map files are made from."""

    scored: Scored
    volume: Volume | None = None
    prepared: Prepared | None = None
    maps: Maps | None = None


def model_file(settings: ModelSettings) -> Path:
    """The model to serve."""
    return settings.file or SHIPPED_MODEL


def open_student(settings: ModelSettings) -> Student:
    """Load, warm and check the model.

    Raises:
        CardError, EngineError: it cannot be served; one line with the remedy.
    """
    return Student.open(
        model_file(settings), settings.engine, settings.precision, threads=settings.threads, cache=settings.engine_cache
    )


def look_at(make_volume: Callable[[], Volume], student: Student, card: Card) -> Seen:
    """From a volume to its scores; a refusal on the way becomes the result."""
    seconds: dict[str, float] = {}
    volume: Volume | None = None
    try:
        with _Stopwatch(seconds, "volume"):
            volume = make_volume()
        with _Stopwatch(seconds, "prepare"):
            prepared = prepare(volume)
        with _Stopwatch(seconds, "infer"):
            maps = student.run(prepared)
        with _Stopwatch(seconds, "score"):
            scores = score_maps(maps, prepared, card)
    except Refusal as refusal:
        return Seen(Scored(None, refusal.reason, seconds, volume.provenance if volume else {}), volume)
    return Seen(Scored(scores, None, seconds, volume.provenance), volume, prepared, maps)


class _Stopwatch:
    """Adds the seconds of a block to a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start


def run_scorer(settings: Settings, control: Connection) -> None:
    """Say `loaded`, then answer `{"kind": "score", "job", "stack"}` with `{"kind": "scored", "job", "scored"}`, one at a time."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    student = _open_until_it_works(settings.model, control)
    if student is None:
        return
    card = student.card
    control.send({"kind": "loaded", "card": card, "sha256": student.sha256, "engine": student.describe()})
    spool, log = SpoolReader(spool_folder(settings)), Log(settings.log.format)
    while (message := _next(control)) is not None:
        stack = message["stack"]
        try:
            seen = look_at(lambda stack=stack: build_volume(stack, spool.read), student, card)  # type: ignore[misc]
            scored = seen.scored
        except Exception as error:  # border: one bad series must not end the process
            log.failure(error, process="scorer", step="score")
            scored = Scored(None, Reason("scorer_failed", ""))
        control.send({"kind": "scored", "job": message["job"], "scored": scored})


def _next(control: Connection) -> dict[str, Any] | None:
    """The next thing to do; None at the end."""
    try:
        message: dict[str, Any] = control.recv()
    except EOFError:
        return None
    return None if message["kind"] == "stop" else message


def _open_until_it_works(settings: ModelSettings, control: Connection) -> Student | None:
    """Open the model; after a failure say why, and try again when the file changed. None when told to stop."""
    while True:
        seen = _signature(model_file(settings))
        try:
            return open_student(settings)
        except (CardError, EngineError) as error:
            control.send({"kind": "unusable", "text": str(error)})
        while _signature(model_file(settings)) == seen:
            if control.poll(_LOOK_AGAIN_S) and _next(control) is None:
                return None


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
