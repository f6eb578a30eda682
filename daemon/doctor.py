"""`rescan doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from daemon import __version__
from daemon.config import Settings, split_endpoint
from daemon.flags import add_settings_flags, settings_from

MIN_FREE_BYTES = 10 << 30
MIN_MEMORY_BYTES = 3 << 30
MAX_CLOCK_YEARS = 20

RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-rocm",
    "onnxruntime-training",
    "onnxruntime-qnn",
)
"""Distributions that all install the folder `onnxruntime`; two of them overwrite each other."""


class State(StrEnum):
    """What was found of one thing."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and how to mend it where it is not well."""

    name: str
    state: State
    found: str
    remedy: str = ""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is missing on this machine and how to mend it",
        description="Look at engine, model, ports, disk, memory, clock and installation; exit 1 where something must be mended.",
        epilog="examples:\n  rescan doctor\n  rescan doctor --config /etc/rescan.toml --json",
    )
    add_settings_flags(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, for a support request")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print findings; 1 where one failed."""
    findings = examine(settings_from(args).settings)
    if args.json:
        print(json.dumps({"version": __version__, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        for f in findings:
            print(f"{f.state.upper():8} {f.name:14} {f.found}")
            if f.remedy:
                print(f"{'':8} {'':14} -> {f.remedy}")
    return int(any(f.state is State.FAILED for f in findings))


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; a look that fails is itself a finding."""
    looks: list[Callable[[], Iterable[Finding]]] = [
        _python,
        lambda: [runtimes(installed())],
        lambda: _engine(settings),
        lambda: _ports(settings),
        lambda: [_state_folder(settings.state)],
        lambda: [_disk(settings)],
        lambda: [_memory()],
        lambda: [_clock(time.time())],
        lambda: [_descriptors()],
    ]
    return [finding for look in looks for finding in look()]


def _python() -> list[Finding]:
    text = (
        f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {os.cpu_count()} processors"
    )
    if not sys.platform.startswith("linux"):
        return [Finding("system", State.FAILED, text, "run it on Linux")]
    return [Finding("system", State.OK, text)]


def installed() -> list[str]:
    """ONNX Runtime distributions that are installed, with their versions."""
    found = []
    for name in RUNTIMES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def runtimes(found: list[str]) -> Finding:
    """Whether exactly one ONNX Runtime is installed, and whole."""
    if not found:
        return Finding(
            "onnxruntime", State.FAILED, "not installed", "install the extra cpu or gpu: pip install 'rescan[cpu]'"
        )
    if len(found) > 1:
        names = " ".join(text.split()[0] for text in found)
        remedy = f"pip uninstall {names}, then install one extra: rescan[cpu] or rescan[gpu]"
        return Finding(
            "onnxruntime", State.FAILED, f"{len(found)} variants overwrite each other: {', '.join(found)}", remedy
        )
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding(
            "onnxruntime", State.FAILED, f"{found[0]}, but its files are gone", "pip install --force-reinstall it"
        )
    return Finding("onnxruntime", State.OK, found[0])


def _engine(settings: Settings) -> list[Finding]:
    """Open the model as the daemon would."""
    from daemon.card import CardError
    from daemon.engines import EngineError
    from daemon.scorer import open_student

    started = time.monotonic()
    try:
        student = open_student(settings.model)
    except (CardError, EngineError) as error:
        text, _, remedy = str(error).rpartition("; ")
        return [Finding("model", State.FAILED, text or str(error), remedy if text else "")]
    card, facts = student.card, student.describe()
    engine = (
        f"{facts['provider']}, {facts['precision']}, {facts['device']}; checked in {time.monotonic() - started:.1f} s"
    )
    uncalibrated = "every verdict is CANNOT_JUDGE; serve a calibrated model" if card.calibration is None else ""
    return [
        Finding(
            "model",
            State.WARNING if uncalibrated else State.OK,
            f"{card.name} {card.version}, sha256 {student.sha256[:12]}{', not calibrated' if uncalibrated else ''}",
            uncalibrated,
        ),
        Finding("engine", State.OK, engine),
    ]


def _ports(settings: Settings) -> list[Finding]:
    doors = {
        "dicom": (settings.dicom.host, settings.dicom.port),
        "http": (settings.http.host, settings.http.port),
        "events": split_endpoint(settings.events.publish, "events.publish"),
        "replay": split_endpoint(settings.events.replay, "events.replay"),
    }
    return [_port(name, host, port) for name, (host, port) in doors.items()]


def _port(name: str, host: str, port: int) -> Finding:
    from daemon.web import listen

    try:
        listen(host, port).close()
    except OSError as error:
        if _answers(host, port):
            return Finding(
                f"port {name}", State.WARNING, f"{host}:{port} is in use", "fine if it is a running rescan serve"
            )
        return Finding(f"port {name}", State.FAILED, str(error.strerror), "choose another address or port")
    return Finding(f"port {name}", State.OK, f"{host}:{port} is free")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _state_folder(state: Path) -> Finding:
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=state) as file:
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "state", State.FAILED, f"{state}: {error.strerror}", "give a folder that this user may write: --state DIR"
        )
    if state.stat().st_mode & 0o077:
        return Finding("state", State.WARNING, f"{state} can be read by others", f"chmod 700 {state}")
    return Finding("state", State.OK, f"{state} can be written")


def _disk(settings: Settings) -> Finding:
    folder = next(p for p in (settings.state, *settings.state.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.0f} GiB free for a spool of up to {settings.spool.quota_bytes / 2**30:.0f} GiB"
    if free < settings.spool.reserve_bytes:
        return Finding(
            "disk", State.FAILED, text, "C-STORE would answer 0xA700: free space or lower spool.reserve_bytes"
        )
    if free < max(MIN_FREE_BYTES, settings.spool.quota_bytes):
        return Finding("disk", State.WARNING, text, "free space, or set spool.quota_bytes to what there is")
    return Finding("disk", State.OK, text)


def _memory() -> Finding:
    from daemon.engines import available_memory_bytes

    free = available_memory_bytes()
    text = f"{free / 2**30:.1f} GiB free"
    if free < MIN_MEMORY_BYTES:
        return Finding("memory", State.WARNING, text, f"scoring wants up to {MIN_MEMORY_BYTES / 2**30:.0f} GiB in all")
    return Finding("memory", State.OK, text)


def _clock(now: float) -> Finding:
    """Whether the clock is set at all, and whether something keeps it right."""
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    built = Path(__file__).stat().st_mtime
    if not built - 86400 < now < built + MAX_CLOCK_YEARS * 365.25 * 86400:
        return Finding("clock", State.FAILED, text, "set the clock and run a time service (chrony, systemd-timesyncd)")
    if Path("/run/systemd/timesync").is_dir() and not Path("/run/systemd/timesync/synchronized").exists():
        return Finding("clock", State.WARNING, f"{text}, not synchronised", "timedatectl set-ntp true")
    return Finding("clock", State.OK, text)


def _descriptors() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding("open files", State.WARNING, f"limit {soft} (hard {hard})", "raise LimitNOFILE to 4096 or more")
    return Finding("open files", State.OK, f"limit {soft}")
