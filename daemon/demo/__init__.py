"""`rescan demo`: made-up scans of a made-up head, pushed to a daemon of its own. Nothing is downloaded.

anatomy.py    the head, as labels, from the MNI152 template inside nilearn
paint.py      labels -> a T1-weighted scan
artefacts.py  motion and a spike
hosted.py     a daemon of its own, started and stopped
picture.py    one picture for each verdict
command.py    the flow: make, push, wait, tell
"""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan demo`; the parts are imported only here, so that the head can be drawn without them."""
    from daemon.demo.command import add_parser as add

    add(subparsers)
