"""`rescan purge`: delete received images and pictures before their time. Results, alerts and events stay."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from daemon.config import ConfigError
from daemon.flags import add_settings_flags, settings_from


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan purge`."""
    parser = subparsers.add_parser(
        "purge",
        help="delete received images before their time",
        description="Delete received images and the pictures drawn from them. Results, alerts and events stay. While the "
        "daemon runs, what it may still have to judge is kept; when it is stopped, --all deletes everything received.",
        epilog="examples:\n  rescan purge --state /var/lib/rescan --older-than 2\n  rescan purge --state /var/lib/rescan --all",
    )
    add_settings_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--older-than", type=float, metavar="HOURS", help="what was received longer ago than this")
    what.add_argument("--all", action="store_true", help="everything received; the daemon must be stopped")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Delete, and say what was deleted."""
    settings = settings_from(args).settings
    if not settings.state.is_dir():
        raise ConfigError(f"state: {settings.state} is not there; name the daemon's state folder with --state")
    if args.older_than is not None and not args.older_than >= 0:
        raise ConfigError(f"--older-than: got {args.older_than:g}; give hours, 0 or more")
    segments, pictures = purge_all(settings.state) if args.all else purge_old(settings.state, 3600 * args.older_than)
    _tell_the_audit(settings.state, args, segments, pictures)
    print(f"rescan purge: {segments} spool segments and the pictures of {pictures} series deleted", file=sys.stderr)
    return 0


def _tell_the_audit(state: Path, args: argparse.Namespace, segments: int, pictures: int) -> None:
    """Write down what was deleted; a disk that is still full does not undo it."""
    from daemon.audit import FILE_NAME, Audit, Kind

    what = "all" if args.all else f"older than {args.older_than:g} h"
    try:
        Audit(state / FILE_NAME).write(Kind.PURGED, what=what, segments=segments, pictures=pictures)
    except OSError as error:
        print(f"rescan purge: not in the audit: {error.strerror}", file=sys.stderr)


def purge_old(state: Path, age_s: float) -> tuple[int, int]:
    """Delete judged segments and pictures that are older.

    Returns:
        How many segments, and how many series lost their pictures.
    """
    from daemon.app import read_judged
    from daemon.pictures import remove_older
    from daemon.spool import remove_segments

    return remove_segments(state / "spool", read_judged(state), age_s), remove_older(
        state / "pictures", time.time() - age_s
    )


def purge_all(state: Path) -> tuple[int, int]:
    """Delete the whole spool and all pictures of a daemon that does not run.

    Raises:
        ConfigError: it runs.
    """
    from daemon.app import lock_state
    from daemon.pictures import remove_older

    with lock_state(state):
        files = [path for path in (state / "spool").glob("*") if path.is_file()] if (state / "spool").is_dir() else []
        for path in files:
            path.unlink()
        segments = sum(path.suffix == ".segment" for path in files)
        return segments, remove_older(state / "pictures", time.time() + 1)
