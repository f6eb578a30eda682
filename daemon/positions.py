"""How far a client has come: the last handled sequence of each stream, kept where a crash leaves it whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from daemon.config import ConfigError

POSITION_VERSION = 1


class ClientError(ConfigError):
    """A client that cannot go on; the message is one line with the remedy."""


class Positions:
    """The last handled sequence of each stream, in memory and, if asked, in a file that a crash leaves whole."""

    def __init__(self, file: Path | None, streams: Iterable[str]) -> None:
        """Read the file if it is there.

        Raises:
            ClientError: it holds something else.
        """
        self.file = file
        self.epoch: str | None = None
        self.past: set[str] = set()
        self.last = dict.fromkeys(streams, 0)
        self._dirty = False
        if file is not None and file.exists():
            self._read(file)

    def handled(self, stream: str, sequence: int) -> None:
        """An event was handled."""
        self.last[stream] = sequence
        self._dirty = True

    def restart(self, epoch: str) -> None:
        """The log is another one: every stream begins anew."""
        if self.epoch is not None and self.epoch != epoch:
            self.past.add(self.epoch)
        self.epoch = epoch
        self.last = dict.fromkeys(self.last, 0)
        self._dirty = True

    def save(self) -> None:
        """Write the file if anything has changed: whole, synced, then in place of the old one."""
        if self.file is None or not self._dirty:
            return
        fresh = self.file.with_name(f".{self.file.name}.part")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump({"version": POSITION_VERSION, "epoch": self.epoch, "last": self.last}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.file)
        self._dirty = False

    def _read(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["version"] != POSITION_VERSION:
                raise ValueError(found["version"])
            self.epoch = found["epoch"]
            self.last |= {name: int(found["last"][name]) for name in self.last if name in found["last"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ClientError(
                f"{file}: not a position written by this version; remove it to handle the whole log again"
            ) from None
