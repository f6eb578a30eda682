"""The scorer process: stack -> volume -> prepare -> student -> scores, where a crash in native code hurts nothing else.

It loads the model, warms it and checks the golden case before it says `loaded`. A model that cannot be served is told in one
line and tried again when the file changes; the process stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from daemon import pictures
from daemon.card import CardError
from daemon.config import ModelSettings, Settings
from daemon.decode import cpu_limit
from daemon.engines import EngineError
from daemon.log import Log
from daemon.page_store import pictures_folder
from daemon.prepare import Prepared, prepare
from daemon.reader import spool_folder
from daemon.reasons import REASONS
from daemon.score import Scores, score_maps, score_reduced
from daemon.spool import SpoolReader
from daemon.stack import Stack
from daemon.student import Student
from daemon.volume import build_volume
from daemon.words import Maps, Reason, Refusal, Volume

ON_GPU = ("cuda", "tensorrt")

DECODE_CPU_S = 60.0
"""CPU seconds for decoding one volume; 600 million compressed voxels take about half of it."""

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


def open_student(settings: ModelSettings) -> Student:
    """Load, warm and check the model.

    Raises:
        CardError, EngineError: it cannot be served; one line with the remedy.
    """
    return Student.open(
        settings.path, settings.engine, settings.precision, threads=settings.threads, cache=settings.engine_cache
    )


def look_at(make_volume: Callable[[], Volume], student: Student) -> Seen:
    """From a volume to its scores; a refusal on the way becomes the result.

    On a GPU the maps are reduced where they are, and are absent from what is returned: `maps_of` fetches them afterwards.
    """
    seconds: dict[str, float] = {}
    volume: Volume | None = None
    maps: Maps | None = None
    try:
        with _Stopwatch(seconds, "volume"):
            volume = make_volume()
        with _Stopwatch(seconds, "prepare"):
            prepared = prepare(volume)
        if student.facts.provider in ON_GPU:
            with _Stopwatch(seconds, "infer"):
                reduced = student.reduce(prepared)
            with _Stopwatch(seconds, "score"):
                scores = score_reduced(reduced, prepared, student.card)
        else:
            with _Stopwatch(seconds, "infer"):
                maps = student.run(prepared)
            with _Stopwatch(seconds, "score"):
                scores = score_maps(maps, prepared, student.card)
    except Refusal as refusal:
        return Seen(Scored(None, refusal.reason, seconds, volume.provenance if volume else {}), volume)
    return Seen(Scored(scores, None, seconds, volume.provenance), volume, prepared, maps)


def maps_of(seen: Seen, student: Student) -> Maps | None:
    """The maps of a scored volume; None for one that was refused."""
    if seen.prepared is None:
        return None
    return seen.maps or student.run(seen.prepared)


class _Stopwatch:
    """Adds the seconds of a block to a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start


def run_scorer(settings: Settings, control: Connection) -> None:
    """Say `loaded`, then answer each `{"kind": "score", "job", "stack", "picture"}`, one at a time.

    The answer is `{"kind": "scored", "job", "scored"}`; when the pictures of that scan are drawn, `{"kind": "drawn", "job"}`.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    student = _open_until_it_works(settings.model, control)
    if student is None:
        return
    control.send(_loaded(student))
    spool, log = SpoolReader(spool_folder(settings)), Log(settings.log.format)
    while (message := _next(control)) is not None:
        seen = Seen(Scored(None, Reason("scorer_failed", REASONS["scorer_failed"])))
        try:
            seen = look_at(lambda stack=message["stack"]: _build(stack, spool), student)  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001  (border: one bad series must not end the process)
            log.failure(error, process="scorer", step="score")
        control.send({"kind": "scored", "job": message["job"], "scored": seen.scored})
        try:
            if message["picture"] is not None:
                _draw(seen, student, pictures_folder(settings), message["picture"])
        except Exception as error:  # noqa: BLE001  (border: a verdict without a picture is still a verdict)
            log.failure(error, process="scorer", step="draw")
        control.send({"kind": "drawn", "job": message["job"]})
        del seen
        give_back_memory()


def _build(stack: Stack, spool: SpoolReader) -> Volume:
    """Decode a stack; a decoder that hangs on damaged pixels ends this process, not the patience of the next series."""
    with cpu_limit(DECODE_CPU_S):
        return build_volume(stack, spool.read)


def _loaded(student: Student) -> dict[str, Any]:
    skipped = [f"{each.engine}: {each.reason}" for each in student.skipped]
    return {
        "kind": "loaded",
        "card": student.card,
        "sha256": student.sha256,
        "engine": student.describe(),
        "fallback": "; ".join(skipped) if has_gpu() and student.facts.provider not in ON_GPU else "",
    }


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that its driver shows."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _draw(seen: Seen, student: Student, folder: Path, name: str) -> None:
    """Draw the worst slices of a scored volume."""
    maps = maps_of(seen, student)
    if maps is None or seen.volume is None or seen.prepared is None or seen.scored.scores is None:
        return
    slices = seen.scored.scores.slices
    pictures.write(pictures.draw(seen.volume, seen.prepared, maps, slices, student.card.calibration), folder, name)


def give_back_memory() -> None:
    """Return what was freed to the system, so that memory does not creep up with every series (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
        seen = _signature(settings.path)
        try:
            return open_student(settings)
        except (CardError, EngineError) as error:
            control.send({"kind": "unusable", "text": str(error)})
        while _signature(settings.path) == seen:
            if control.poll(_LOOK_AGAIN_S) and _next(control) is None:
                return None


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
