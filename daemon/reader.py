"""The reader process: headers of what was received, parsed where a hostile file can hurt nothing else.

The main process sends instances in the order of arrival, and gets one answer for each in that order. It ends this process
when an answer takes too long; memory and CPU seconds are limited by the kernel.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from daemon.config import Settings
from daemon.header import Header, read_header
from daemon.reasons import REASONS
from daemon.spool import SpoolError, SpoolReader, StoredInstance
from daemon.words import Reason, Refusal

CPU_LIMIT_S = 20
"""CPU seconds for one header; a large one takes milliseconds."""

MEMORY_PER_INSTANCE = 3
"""Address space allowed, as a multiple of the largest instance, above what the process needs to start."""

_BASE_BYTES = 2 << 30


def spool_folder(settings: Settings) -> Path:
    """Where the spool lies."""
    return settings.state / "spool"


def run_reader(settings: Settings, control: Connection) -> None:
    """Answer `{"kind": "read", "instances": [...]}` with one `{"kind": "header", "position", "header"}` each."""
    memory = _BASE_BYTES + MEMORY_PER_INSTANCE * settings.dicom.max_instance_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spool = SpoolReader(spool_folder(settings))
    while True:
        try:
            message = control.recv()
        except EOFError:
            return
        if message["kind"] == "stop":
            return
        for stored in message["instances"]:
            control.send({"kind": "header", "position": stored.position, "header": _header(stored, spool.part10)})


def _header(stored: StoredInstance, part10: Callable[[StoredInstance], bytes]) -> Header | Reason:
    """The header, or why there is none."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_LIMIT_S, hard))
    try:
        return read_header(part10(stored))
    except Refusal as refusal:
        return refusal.reason
    except SpoolError:
        return Reason("bad_header", REASONS["bad_header"])
