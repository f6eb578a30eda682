"""The audit: appended, chained, complete after a crash, and free of secrets."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from daemon import audit as module
from daemon.__main__ import main
from daemon.audit import Audit, AuditBroken, Kind, entries, verify
from daemon.config import TOKEN_VARIABLE, load

NOW = 1_800_000_000.0


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path / "audit.jsonl", clock=lambda: NOW)


def test_each_line_follows_from_the_one_before(audit: Audit) -> None:
    """Numbers are dense, the chain holds, and the file is the owner's alone."""
    for n in range(5):
        audit.write(Kind.STARTED, version=str(n))
    assert [e.number for e in entries(audit.path)] == [1, 2, 3, 4, 5]
    assert verify(audit.path) == 5
    assert audit.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [lines[0].replace(b'"0"', b'"9"'), *lines[1:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:1], lines[0], *lines[1:]],
        lambda lines: [lines[0], b"{}", *lines[2:]],
    ],
    ids=["changed", "removed", "swapped", "doubled", "replaced"],
)
def test_a_line_that_was_tampered_with_is_named(audit: Audit, spoil: object) -> None:
    """Changed, removed, put elsewhere or put in between."""
    for n in range(4):
        audit.write(Kind.STARTED, version=str(n))
    lines = audit.path.read_bytes().splitlines()
    audit.path.write_bytes(b"".join(line + b"\n" for line in spoil(lines)))  # type: ignore[operator]
    with pytest.raises(AuditBroken, match=r"line [123]"):
        verify(audit.path)
    assert main(["audit", "--state", str(audit.path.parent)]) == 1


def test_a_line_torn_by_a_crash_is_replaced_by_the_next(audit: Audit) -> None:
    """What was never whole was never said."""
    audit.write(Kind.STARTED, version="1")
    with audit.path.open("ab") as file:
        file.write(b'{"number":2,"at":"20')
    audit.write(Kind.STARTED, version="2")
    assert verify(audit.path) == 2


def test_many_writers_make_one_chain(audit: Audit) -> None:
    """The page's thread, the main loop and `rescan purge` append at the same time."""
    others = [Audit(audit.path) for _ in range(4)]
    threads = [threading.Thread(target=lambda a=a: [a.write(Kind.STARTED) for _ in range(20)]) for a in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(audit.path) == 80


def test_what_a_full_disk_refuses_is_written_later(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry waits, in order, with the time at which it happened; a part of a line does not stay."""
    audit.write(Kind.STARTED, version="1")
    real = module.os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: real(fd, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        audit.write(Kind.RELOAD_REFUSED, reason="x")
    assert audit.pending == 1
    monkeypatch.undo()
    assert verify(audit.path) == 1
    audit.write(Kind.STARTED, version="2")
    assert [e.kind for e in entries(audit.path)] == [Kind.STARTED, Kind.RELOAD_REFUSED, Kind.STARTED]
    assert audit.pending == 0


def test_settings_are_written_when_they_differ_with_what_changed(audit: Audit) -> None:
    """The same settings twice are one entry; a change names the setting, the old value and the new one."""
    audit.settings(load(None, {"state": "s"}).settings)
    audit.settings(load(None, {"state": "s"}).settings)
    audit.settings(load(None, {"state": "s", "spool.retention_s": 5}).settings)
    first, second = entries(audit.path)
    assert first.data["changed"] == {}
    assert second.data["changed"] == {"spool.retention_s": [86400.0, 5.0]}
    assert second.data["settings"]["state"] == "s"


def test_a_model_is_written_when_it_is_another(audit: Audit) -> None:
    """Its hash decides."""
    for sha in ("a", "a", "b"):
        audit.differing(Kind.MODEL, name="m", sha256=sha)
    assert [e.data["sha256"] for e in entries(audit.path)] == ["a", "b"]


def test_acknowledgements_that_a_crash_kept_out_are_caught_up(audit: Audit) -> None:
    """What the ledger holds and the audit lacks is added, once."""
    row = {"alert_id": "1", "at": NOW, "scanner": "mr1", "reason": "wrong", "by": "KL"}
    audit.acknowledged("1", "mr1", "wrong", "KL", NOW)
    for _ in range(2):
        audit.catch_up([row, {**row, "at": NOW + 1, "reason": "acceptable"}])
    assert [e.data["reason"] for e in entries(audit.path)] == ["wrong", "acceptable"]


def test_the_page_token_is_nowhere_in_it(audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the environment nor from its file; only the file's name."""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret-from-the-environment")
    (tmp_path / "token").write_text("secret-from-the-file")
    audit.settings(load(None, {"http.host": "10.0.0.1", "http.token_file": tmp_path / "token"}).settings)
    text = audit.path.read_text()
    assert "secret" not in text
    assert str(tmp_path / "token") in text


def test_the_command_prints_it(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for a reader, the lines themselves with --json, and a state folder without one is told."""
    audit.acknowledged("1", "mr1", "wrong", "KL", NOW)
    assert main(["audit", "--state", str(audit.path.parent)]) == 0
    assert "acknowledged" in capsys.readouterr().out
    assert main(["audit", "--state", str(audit.path.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["by"] == "KL"
    assert main(["audit", "--state", str(audit.path.parent / "nowhere")]) == 2


def test_a_purge_is_written_down(tmp_path: Path) -> None:
    """Who deletes images before their time leaves a line."""
    (tmp_path / "spool").mkdir()
    assert main(["purge", "--state", str(tmp_path), "--all"]) == 0
    (entry,) = entries(tmp_path / "audit.jsonl")
    assert (entry.kind, entry.data["what"]) == (Kind.PURGED, "all")
