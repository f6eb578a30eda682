"""The command-line flags that set settings, for every command that needs the daemon's settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from daemon.config import Effective, Engine, Settings, load, split_address

DEFAULT = Settings()


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; each beats the file, which beats the default shown."""
    d = DEFAULT
    flag = parser.add_argument
    flag("--config", type=Path, metavar="FILE", help="TOML file with settings; `rescan config` prints them all")
    flag("--state", type=Path, metavar="DIR", help=f"folder for spool, ledger and keys (default: {d.state})")
    flag("--dicom", metavar="HOST:PORT", help=f"where scanners send (default: {d.dicom.host}:{d.dicom.port})")
    flag("--ae", metavar="TITLE", help=f"AE title that scanners call (default: {d.dicom.ae_title})")
    flag("--events", metavar="tcp://HOST:PORT", help=f"live events (default: {d.events.publish})")
    flag("--replay", metavar="tcp://HOST:PORT", help=f"replay and acknowledgement (default: {d.events.replay})")
    flag("--http", metavar="HOST:PORT", help=f"page, probes, metrics (default: {d.http.host}:{d.http.port})")
    flag("--model", type=Path, metavar="FILE", help="the student (default: the one that ships)")
    flag("--engine", choices=[*Engine], help=f"what runs the student (default: {d.model.engine})")


def settings_from(args: argparse.Namespace) -> Effective:
    """The settings that the flags and the file they name give.

    Raises:
        ConfigError: a value that cannot be used; one line.
    """
    return load(args.config, flags_from(args))


def flags_from(args: argparse.Namespace) -> dict[str, Any]:
    """Dotted path -> value, for the flags that were given."""
    direct = {
        "state": args.state,
        "dicom.ae_title": args.ae,
        "events.publish": args.events,
        "events.replay": args.replay,
        "model.file": args.model,
        "model.engine": args.engine,
    }
    found = {path: value for path, value in direct.items() if value is not None}
    for name, value in (("dicom", args.dicom), ("http", args.http)):
        if value is not None:
            found[f"{name}.host"], found[f"{name}.port"] = split_address(value, f"--{name}")
    return found
