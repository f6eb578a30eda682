"""The `rescan` command. Each subcommand lives in its own module, imported only when it is asked for."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from daemon import NOTICE, __version__
from daemon.config import ConfigError

COMMANDS = {
    "serve": ("daemon.serve_command", "receive series, judge them, publish verdicts"),
    "score": ("daemon.score_command", "judge a DICOM folder or file, or a NIfTI file"),
    "watch": ("daemon.watch", "live table of verdicts and alerts"),
    "send": ("daemon.send", "push a DICOM folder as a scanner would"),
    "simulate": ("daemon.simulate", "send a head as a given vendor and habit would"),
    "explain": ("daemon.explain", "show the stacks found, the rule that matches, what would be refused and why"),
    "demo": ("daemon.demo", "see it work: made-up series pushed to a daemon of its own"),
    "doctor": ("daemon.doctor", "say what is missing on this machine and how to mend it"),
    "check": ("daemon.config_command", "check a configuration file"),
    "config": ("daemon.config_command", "print the effective settings and where each came from"),
    "card": ("daemon.card", "print the card inside a model file"),
    "keys": ("daemon.keys", "make and authorise the keys that protect events"),
    "history": ("daemon.history", "export verdicts, alerts and feedback"),
    "audit": ("daemon.audit", "show who acknowledged what, and which settings and model were in force"),
    "calibrate": ("daemon.calibration", "fit the thresholds of this site to its own history"),
    "purge": ("daemon.purge", "delete received images before their time"),
}
"""Name -> the module whose `add_parser(subparsers)` makes it, and one line of help."""

EXAMPLES = """\
examples:
  rescan demo                                   see it work, nothing needed
  rescan serve --state /var/lib/rescan          run at a scanner
  rescan score scan.nii.gz --json               judge one file
  rescan score dicom_folder --maps maps         and write the uncertainty maps
  rescan check /etc/rescan.toml                 find mistakes before a restart
"""

DONE, FAILED, MISUSE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Errors are one line that names the value and where to read on."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(MISUSE, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def make_parser(command: str | None) -> Parser:
    """The whole command line, with the arguments of one subcommand alone.

    Raises:
        ImportError: the module of that subcommand needs something that is not installed.
    """
    parser = Parser(
        prog="rescan",
        description="Tells whether the MRI scan that just finished is good enough, while the patient is still there.",
        epilog=EXAMPLES + "\n" + textwrap.fill(NOTICE, 100),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rescan {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (module, text) in COMMANDS.items():
        if name != command:
            subparsers.add_parser(name, help=text, add_help=False)
            continue
        found = importlib.import_module(module)
        (getattr(found, f"add_{name}_parser", None) or found.add_parser)(subparsers)
        chosen = subparsers.choices[name]
        chosen.epilog = f"{chosen.epilog or ''}\n\n{textwrap.fill(NOTICE, 100)}".strip()
        chosen.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 misuse.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in given if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        known = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        return _complain(command, f"no such command; {known}", MISUSE)
    try:
        parser = make_parser(command)
    except ImportError as error:
        return _complain(
            command, f"needs the package {error.name!r}, which is not installed; see the extras in the README"
        )
    parsed = parser.parse_args(given)
    try:
        return int(parsed.func(parsed) or DONE)
    except ConfigError as error:
        return _complain(command, str(error), MISUSE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _complain(command, f"{name}{error.strerror or error}; check that it exists and may be used")
    except KeyboardInterrupt:
        return INTERRUPTED


def _complain(command: str | None, text: str, status: int = FAILED) -> int:
    print(f"rescan {command}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
