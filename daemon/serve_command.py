"""`rescan serve`: the daemon. Settings are checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from typing import Any

from daemon.flags import add_settings_flags, flags_from, settings_from


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="receive series, judge them, publish verdicts",
        description="Receive series by DICOM C-STORE, judge them, and publish verdicts, alerts, metrics and a page.",
        epilog="examples:\n"
        "  rescan serve                                        on loopback, for trying it out\n"
        "  rescan serve --config /etc/rescan.toml              at a scanner; the file lists who may send\n"
        "  rescan serve --dicom 127.0.0.1:0 --http 127.0.0.1:0 ports picked by the system, told in STATE/ports.json",
    )
    add_settings_flags(parser)
    parser.set_defaults(func=serve)


def serve(args: argparse.Namespace) -> int:
    """Run the daemon until a signal."""
    effective = settings_from(args)
    from daemon.app import run

    return run(effective.settings, args.config, flags_from(args))
