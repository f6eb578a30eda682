"""The log: one line per thing that happened, its fields from a fixed list, never a name, a UID or a path of a patient's data.

Text of exceptions and of libraries does not reach the log, because pydicom quotes values in it. A failure is told by its
type and the places in the code that it passed.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import TextIO

from daemon.config import LogFormat


class Event(StrEnum):
    """Everything that a log line can say happened."""

    STARTED = "started"
    READY = "ready"
    NOT_READY = "not_ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    PROCESS_ENDED = "process_ended"
    PROCESS_STARTED = "process_started"
    SERIES = "series"
    QUARANTINED = "quarantined"
    FAILED = "failed"
    RESTORED = "restored"
    RELOADED = "reloaded"
    RELOAD_REFUSED = "reload_refused"
    ENGINE = "engine"
    RETENTION = "retention"
    RECEIVER = "receiver"


FIELDS = frozenset(
    """
    advice alert artefact association completeness count device dicom engine error events expected final http instances
    level model next position precision predicted_dice process provider reason reasons received_s replay required_dice
    restarts revision rule scanner seconds series_ref settings shadow signal size_bytes status step trace verdict version where
    """.split()
)
"""The only field names that a line may carry; whoever adds one answers for its values being free of patient data."""

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Log:
    """Writes lines.

    Attributes:
        format: key=value text, or JSON.
        stream: where lines go; standard error where None, looked up at each line.
        clock: seconds since 1970.
    """

    format: LogFormat = LogFormat.TEXT
    stream: TextIO | None = None
    clock: Callable[[], float] = time.time

    def write(self, event: Event, **fields: Value) -> None:
        """One line. Fields that are None are left out.

        Raises:
            ValueError: a field that is not on the list; the message names it.
        """
        stream = self.stream or sys.stderr
        stream.write(line(event, self.clock(), self.format, fields) + "\n")
        stream.flush()

    def failure(self, error: BaseException, *, process: str, step: str) -> None:
        """One line for an error caught at a border: its type and the way it came, not its text."""
        self.write(
            Event.FAILED, level="error", process=process, step=step, error=type(error).__name__, trace=trace(error)
        )


def line(event: Event, now: float, form: LogFormat, fields: dict[str, Value]) -> str:
    """One log line without its end.

    Raises:
        ValueError: a field that is not on the list; the message names it.
    """
    strange = sorted(fields.keys() - FIELDS)
    if strange:
        raise ValueError(
            f"log field {strange[0]!r} is not on the list in daemon/log.py; add it there if it is free of patient data"
        )
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
    known = {"time": stamp, "event": str(event)} | {k: _short(v) for k, v in fields.items() if v is not None}
    if form is LogFormat.JSON:
        return json.dumps(known)
    return " ".join(f"{key}={_quoted(value)}" for key, value in known.items())


def _short(value: Value) -> Value:
    return round(value, 3) if isinstance(value, float) and abs(value) >= 1e-3 else value


def _quoted(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if text and not any(c in text for c in ' "=\n') else json.dumps(text)


def trace(error: BaseException) -> str:
    """The innermost places an error passed, outermost first, such as `app.py:90 run < volume.py:12 build_volume`."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)


def quiet_libraries(log: Log, process: str) -> None:
    """Keep the words of libraries and of uncaught errors out of this process's output; they can quote patient data."""
    root = logging.getLogger()
    root.handlers[:] = [logging.NullHandler()]
    logging.lastResort = None
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    warnings.simplefilter("ignore")

    def hook(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
        log.failure(error, process=process, step="uncaught")

    sys.excepthook = hook
