"""The ledger's file: its tables, how older ones are brought up to date, and what is refused untouched."""

from __future__ import annotations

import sqlite3
import struct
import uuid
from pathlib import Path

from daemon.config import ConfigError

SCHEMA = 1
"""Version of the tables, in `PRAGMA user_version`."""

APPLICATION_ID = 0x52534341
"""Marks the file as a Rescan ledger, in `PRAGMA application_id`."""

BUSY_S = 10.0
_HEADER_BYTES = 100
_USER_VERSION_AT = 60
_MAGIC = b"SQLite format 3\x00"

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE stream (name TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE event (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        stream TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        id TEXT NOT NULL,
        at REAL NOT NULL,
        topic TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (stream, sequence)
    );
    CREATE TABLE result (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        at REAL NOT NULL,
        ended_at REAL,
        stack_ref TEXT NOT NULL,
        exam_ref TEXT NOT NULL,
        scanner TEXT NOT NULL,
        protocol TEXT NOT NULL,
        rule TEXT NOT NULL,
        revision INTEGER NOT NULL,
        final INTEGER NOT NULL,
        verdict TEXT NOT NULL,
        body TEXT NOT NULL
    );
    CREATE UNIQUE INDEX result_one_final ON result (stack_ref, revision) WHERE final = 1;
    CREATE INDEX result_of_stack ON result (stack_ref, number);
    CREATE INDEX result_of_exam ON result (exam_ref, scanner);
    CREATE INDEX result_at ON result (at);
    CREATE TABLE alert (
        alert_id TEXT PRIMARY KEY,
        stack_ref TEXT NOT NULL UNIQUE,
        exam_ref TEXT NOT NULL,
        scanner TEXT NOT NULL,
        protocol TEXT NOT NULL,
        result_id TEXT NOT NULL,
        state TEXT NOT NULL,
        confirmed INTEGER NOT NULL,
        ended_at REAL,
        raised_at REAL NOT NULL,
        changed_at REAL NOT NULL,
        shown_at REAL,
        acknowledged_at REAL,
        reason TEXT,
        by TEXT,
        ended_by TEXT,
        sequence INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX alert_of_exam ON alert (exam_ref, scanner);
    CREATE INDEX alert_by_state ON alert (state);
    CREATE TABLE feedback (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        alert_id TEXT NOT NULL,
        at REAL NOT NULL,
        reason TEXT NOT NULL,
        by TEXT NOT NULL
    );
    CREATE TABLE exam (
        scanner TEXT NOT NULL,
        exam_ref TEXT NOT NULL,
        started_at REAL NOT NULL,
        PRIMARY KEY (scanner, exam_ref)
    ) WITHOUT ROWID;
    CREATE TABLE strike (stack_ref TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
    """,
)
"""Script n takes the tables from version n to n + 1. A landed script is never edited."""


class LedgerError(ConfigError):
    """A ledger that must not be used; the message is one line that ends with the remedy."""


def open_writer(path: Path) -> sqlite3.Connection:
    """Open or make the file and bring it up to date.

    Raises:
        LedgerError: not a ledger, damaged, held by another program, or written by a newer version.
    """
    refuse_strange(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    db = connect(path)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        _migrate(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        raise unusable(path, error) from None
    except LedgerError:
        db.close()
        raise
    path.chmod(0o600)
    return db


def unusable(path: Path, error: sqlite3.DatabaseError) -> LedgerError:
    """What to do depends on whether someone else holds it or it is damaged."""
    if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LedgerError(f"{path}: another program holds it ({error}); stop that one first")
    return LedgerError(
        f"{path}: cannot be used ({error}); restore it from a backup, or move it away to begin a new log"
    )


def refuse_strange(path: Path) -> None:
    """Refuse what is not ours or is newer, from its first bytes alone: nothing is written, not even a journal."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise LedgerError(f"{path}: not a ledger; move it away, or give another state folder")
    (version,) = struct.unpack_from(">I", header, _USER_VERSION_AT)
    if version > SCHEMA:
        raise _newer(path, version)


def _newer(path: Path, version: int) -> LedgerError:
    return LedgerError(
        f"{path}: written by a newer Rescan (tables of version {version}, this one knows {SCHEMA}); "
        "install that version again, or restore the ledger from a backup made before the upgrade"
    )


def connect(path: Path) -> sqlite3.Connection:
    """A connection that commits by itself unless told to begin."""
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    """Run the scripts that this file has not seen, all in one transaction."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA:
        raise _newer(path, version)
    if version == SCHEMA:
        return
    if version == 0 and db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
        raise LedgerError(f"{path}: a database, but not a ledger; move it away, or give another state folder")
    db.execute("BEGIN IMMEDIATE")
    for script in _MIGRATIONS[version:]:
        for statement in filter(str.strip, script.split(";")):
            db.execute(statement)
    db.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (str(uuid.uuid4()),))
    db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("COMMIT")
    # The version must stand in the file itself, where an older program looks for it, not only in the journal.
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
