"""The state folder of the first version: every later version reads it, and goes on from it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from daemon import ledger_file
from daemon.alert import State, alert_id_of
from daemon.calibration import FILE_NAME, in_force, load_site
from daemon.client import Positions
from daemon.keys import Client, KeyStore, Role
from daemon.ledger import Last, Ledger
from tests.event_builders import SHA256, START, reference, result

GOLDEN = Path(__file__).parent.parent / "golden" / "state-v1"
EPOCH = "6f1c2f0e-3a52-4b0f-9f2e-0d6f5d1c7a11"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A copy: opening brings the tables up to date."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "state"))


def test_the_ledger_of_the_first_version_is_read(state: Path) -> None:
    """Epoch, sequences, every event as it was sent, results, alerts, feedback."""
    sent = [json.loads(line) for line in (GOLDEN.parent / "events-v1" / "messages.jsonl").read_text().splitlines()]
    with contextlib.closing(Ledger(state / "ledger.db")) as ledger:
        assert ledger.epoch == EPOCH
        assert [json.loads(event.body) for event in ledger.events_since(0, 99)] == sent[:-1]
        assert ledger.last_sequences() == {"score": 6, "alert": 4, "series": 6, "health": 1}
        assert ledger.last_result(reference("a")) == Last(result("a")["id"], 1, True)
        assert ledger.results(newest_of_stack=False)[-1][1] == sent[1]["data"]
        alert = ledger.alert(alert_id_of(reference("a")))
        assert alert is not None
        assert (alert.state, alert.reason, alert.by) == (State.RESOLVED, "rescanning", "A.B.")
        assert [said["reason"] for said in ledger.feedback()] == ["rescanning"]
        assert ledger.strike(reference("crashing")) == 3


def test_it_goes_on_from_there(state: Path) -> None:
    """The next event follows densely; what was written is not written again."""
    with contextlib.closing(Ledger(state / "ledger.db", clock=lambda: START + 1000)) as ledger:
        assert not ledger.record(result("b", "PASS", ended_at=START + 300, protocol_ref=reference("p"))).new
        assert ledger.record(result("new", rule="t9")).new
        assert ledger.last_sequences()["alert"] == 5


def test_tables_are_brought_up_to_date_in_one_transaction(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next version's script runs once over the first version's file; one that fails leaves it as it was."""
    script = "ALTER TABLE alert ADD COLUMN note TEXT; CREATE TABLE extra (x INTEGER)"
    monkeypatch.setattr(ledger_file, "SCHEMA", 2)
    monkeypatch.setattr(ledger_file, "_MIGRATIONS", (*ledger_file._MIGRATIONS, f"{script}; CREATE NONSENSE"))
    with pytest.raises(ledger_file.LedgerError, match="backup"):
        Ledger(state / "ledger.db")
    with contextlib.closing(sqlite3.connect(state / "ledger.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1
        assert db.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'extra'").fetchone()[0] == 0
    monkeypatch.setattr(ledger_file, "_MIGRATIONS", (*ledger_file._MIGRATIONS[:1], script))
    for _ in range(2):
        with contextlib.closing(Ledger(state / "ledger.db")) as ledger:
            assert ledger.epoch == EPOCH
            assert ledger.last_sequences()["alert"] == 4
    with contextlib.closing(sqlite3.connect(state / "ledger.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2
        assert db.execute("SELECT COUNT(*) FROM extra").fetchone()[0] == 0


def test_the_other_files_of_the_first_version_are_read(state: Path) -> None:
    """A client's position, a site's calibration, an authorised key."""
    positions = Positions(state / "position.json", ("alert",))
    assert (positions.epoch, positions.last) == (EPOCH, {"alert": 3})
    found = in_force(load_site(state / FILE_NAME), SHA256, "mr1", "t1")
    assert found is not None
    assert (found.level, found.scans, found.alarm_risk) == ("protocol", 60, -3.41)
    (client,) = KeyStore(state / "keys").clients()
    assert client == Client("screen", "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", Role.ACK)
