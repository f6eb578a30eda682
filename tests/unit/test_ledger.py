"""The ledger: one transaction for a result and what follows; nothing twice, nothing lost, nothing newer touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.alert import Effect, State, alert_id_of
from daemon.config import AlertSettings
from daemon.ledger import Alert, AlertChange, AlertClosed, Last, Ledger, NoSuchAlert
from daemon.ledger_file import SCHEMA, LedgerError
from tests.event_builders import START, reference, result


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.db", clock=lambda: START + 10)
    with contextlib.closing(made):
        yield made


def states(ledger: Ledger) -> list[str]:
    """The published states of the stream `alert`, in order."""
    return [json.loads(event.body)["data"]["state"] for event in ledger.events_after("alert", 0, 1000)]


def alert(ledger: Ledger, stack: str = "s1") -> Alert:
    found = ledger.alert(alert_id_of(reference(stack)))
    assert found is not None
    return found


def test_a_result_its_alert_and_their_events_are_written_together(ledger: Ledger) -> None:
    """One RESCAN: one event in each of score, series and alert, dense from 1, in the order of the log."""
    assert ledger.record(result()).new
    assert [(e.number, e.stream, e.sequence) for e in ledger.events_since(0, 10)] == [
        (1, "score", 1),
        (2, "series", 1),
        (3, "alert", 1),
    ]
    assert ledger.last_sequences() == {"score": 1, "alert": 1, "series": 1, "health": 0}
    assert json.loads(ledger.events_after("score", 0, 1)[0].body)["data"] == result()


def test_an_error_in_the_middle_leaves_nothing(ledger: Ledger) -> None:
    """A result that cannot be published is not in the history either, and no sequence is used up."""
    broken = result()
    broken["scores"]["predicted_dice"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        ledger.record(broken)
    halfway = result()
    halfway["reasons"] = [{"code": "no text"}]
    with pytest.raises(KeyError):
        ledger.record(halfway)
    assert ledger.last_sequences() == {"score": 0, "alert": 0, "series": 0, "health": 0}
    assert ledger.results() == []
    ledger.record(result())
    assert ledger.last_sequences()["alert"] == 1


def test_the_same_result_again_changes_nothing(ledger: Ledger) -> None:
    """A repeat after a crash is recognised by its id."""
    ledger.record(result())
    before = ledger.last_number()
    assert not ledger.record(result()).new
    assert ledger.last_number() == before


def test_one_final_result_per_stack_and_revision(ledger: Ledger) -> None:
    """A second final result of the same revision is not written, whatever it says; the next revision is."""
    ledger.record(result(final=True))
    assert not ledger.record(result(verdict="PASS")).new
    assert ledger.record(result(verdict="PASS", revision=2)).new
    with pytest.raises(sqlite3.IntegrityError), ledger._transaction() as db:
        db.execute("UPDATE result SET revision = 1")


def test_the_newest_result_of_a_stack(ledger: Ledger) -> None:
    """Id, revision and whether it was final; None for an unknown stack."""
    assert ledger.last_result(reference("s1")) is None
    ledger.record(result(final=False))
    made = result()
    ledger.record(made)
    assert ledger.last_result(reference("s1")) == Last(made["id"], 1, True)
    assert ledger.seen(made["id"])
    assert not ledger.seen("another")


def test_raised_then_confirmed(ledger: Ledger) -> None:
    """One alert: raised on the provisional verdict, confirmed by the final one."""
    raised = ledger.record(result(final=False)).changes
    assert [(c.effect, c.severity, c.seconds) for c in raised] == [(Effect.RAISE, "low", 10.0)]
    assert not alert(ledger).confirmed
    confirmed = ledger.record(result()).changes
    assert [(c.effect, c.severity) for c in confirmed] == [(Effect.UPDATE, "medium")]
    assert alert(ledger).confirmed
    assert states(ledger) == ["raised", "raised"]
    assert len({json.loads(e.body)["data"]["alert_id"] for e in ledger.events_after("alert", 0, 9)}) == 1


def test_raised_then_withdrawn_then_raised_by_a_late_instance(ledger: Ledger) -> None:
    """The final verdict withdraws it; revision 2 may raise it again, under the same id."""
    ledger.record(result(final=False))
    ledger.record(result(verdict="PASS"))
    assert alert(ledger).state is State.WITHDRAWN
    ledger.record(result(revision=2))
    assert states(ledger) == ["raised", "withdrawn", "raised"]
    assert ledger.all_alerts()[0].alert_id == alert(ledger).alert_id


def test_a_verdict_within_the_margin_holds_the_alert(ledger: Ledger) -> None:
    """Predicted Dice must exceed the requirement by 0.01 to clear it."""
    ledger.record(result(final=False))
    ledger.record(result(verdict="REVIEW", dice=0.855))
    assert alert(ledger).state is State.RAISED
    assert not alert(ledger).confirmed
    ledger.record(result(verdict="REVIEW", dice=0.861, revision=2))
    assert alert(ledger).state is State.WITHDRAWN


def test_a_repeat_that_scores_better_supersedes_and_one_that_passes_resolves(ledger: Ledger) -> None:
    """Same protocol, same exam, later: two bad scans and a good one leave no alert open."""
    ledger.record(result("first", dice=0.6))
    ledger.record(result("second", dice=0.7, ended_at=START + 400))
    assert alert(ledger, "first").state is State.SUPERSEDED
    good = result("third", "PASS", ended_at=START + 800)
    ledger.record(good)
    assert alert(ledger, "second").state is State.RESOLVED
    assert alert(ledger, "second").ended_by == good["id"]
    assert ledger.open_alerts() == []


@pytest.mark.parametrize(
    "other",
    [
        {"exam": "e2", "scanner": "mr2"},
        {"rule": "t2"},
        {"protocol_ref": "another"},
        {"ended_at": START - 1},
        {"final": False},
        {"verdict": "CANNOT_JUDGE"},
    ],
)
def test_what_is_no_repeat_ends_nothing(ledger: Ledger, other: dict[str, Any]) -> None:
    """Another scanner, another protocol, an earlier scan, a provisional verdict, a refusal."""
    ledger.record(result("first"))
    ledger.record(result("second", **{"verdict": "PASS", "ended_at": START + 100, **other}))
    assert alert(ledger, "first").state is State.RAISED


def test_a_scan_that_is_judged_after_its_repeat_passed_is_resolved_at_once(ledger: Ledger) -> None:
    """The newest series of an exam is scored first; its verdict is not forgotten."""
    ledger.record(result("second", "PASS", ended_at=START + 100))
    ledger.record(result("first", ended_at=START))
    assert states(ledger) == ["raised", "resolved"]


def test_another_exam_on_the_scanner_expires_what_is_open(ledger: Ledger) -> None:
    """At its first instance; alerts of other scanners stay."""
    ledger.record(result("a"))
    ledger.record(result("b", scanner="mr2", exam="e9"))
    ledger.exam_started("mr1", reference("e1"))
    assert alert(ledger, "a").state is State.RAISED
    ledger.exam_started("mr1", reference("e2"))
    assert alert(ledger, "a").state is State.EXPIRED
    assert alert(ledger, "b").state is State.RAISED


def test_an_alert_of_an_exam_that_is_over_ends_as_it_is_raised(ledger: Ledger) -> None:
    """Nobody is called to a patient who has left."""
    ledger.exam_started("mr1", reference("e1"), START)
    ledger.exam_started("mr1", reference("e2"), START + 5)
    ledger.record(result("late", exam="e1"))
    assert states(ledger) == ["raised", "expired"]


def test_callers_without_a_name_share_no_exam(ledger: Ledger) -> None:
    """`unknown` may be several scanners: where no machine is named, alerts end by time alone."""
    ledger.record(result("a", scanner="unknown"))
    ledger.record(result("b", scanner="unknown", exam="e2"))
    ledger.exam_started("unknown", reference("e3"), START, "some machine")
    assert [a.state for a in ledger.open_alerts()] == [State.RAISED, State.RAISED]


def test_an_exam_on_an_unknown_machine_ends_the_alerts_of_that_machine_alone(ledger: Ledger) -> None:
    """At its first instance, and again when its result comes first; another machine under the same name is left alone."""
    for stack, exam, machine in (("a", "e1", "x"), ("b", "e2", "y"), ("c", "e3", "x")):
        ledger.record(result(stack, scanner="unknown", exam=exam, device_ref=reference(machine)))
    assert [alert(ledger, stack).state for stack in "abc"] == [State.EXPIRED, State.RAISED, State.RAISED]
    ledger.exam_started("unknown", reference("e4"), START + 20, reference("y"))
    assert [alert(ledger, stack).state for stack in "bc"] == [State.EXPIRED, State.RAISED]
    ledger.exam_started("unknown", reference("e1"), START + 30, reference("x"))
    assert alert(ledger, "c").state is State.RAISED, "what comes late of an earlier exam begins none"


def test_an_alert_of_an_unknown_machine_whose_exam_is_over_ends_as_it_is_raised(ledger: Ledger) -> None:
    """As on a scanner that has a name."""
    ledger.exam_started("unknown", reference("e1"), START, reference("x"))
    ledger.exam_started("unknown", reference("e2"), START + 5, reference("x"))
    ledger.record(result("late", exam="e1", scanner="unknown", device_ref=reference("x")))
    assert states(ledger) == ["raised", "expired"]


def test_silence_expires_an_alert(ledger: Ledger) -> None:
    """20 minutes after it was raised, or after the last acknowledgement."""
    ledger.record(result("a"))
    ledger.record(result("b", rule="t2"))
    ledger.acknowledge(alert(ledger, "b").alert_id, "rescanning", "", START + 700)
    assert ledger.tick(START + 10 + 1199) == 0
    assert ledger.tick(START + 10 + 1200) == 1
    assert alert(ledger, "a").state is State.EXPIRED
    assert alert(ledger, "b").state is State.ACKNOWLEDGED
    assert ledger.tick(START + 1900) == 1


def test_the_limit_per_exam_holds_back_and_says_how_many(ledger: Ledger) -> None:
    """The fourth alert is not raised; the newest one says so, again for the fifth."""
    for number in range(5):
        ledger.record(result(f"s{number}", rule=f"r{number}"))
    assert [a.state for a in ledger.all_alerts()].count(State.SUPPRESSED) == 2
    assert ledger.suppressed("mr1", reference("e1")) == 2
    told = [json.loads(e.body)["data"]["suppressed_in_exam"] for e in ledger.events_after("alert", 0, 99)]
    assert told == [0, 0, 0, 1, 2]
    with pytest.raises(NoSuchAlert):
        ledger.acknowledge(alert_id_of(reference("s4")), "wrong", "")
    assert ledger.alert_of_stack(reference("s4")) is None


def test_shadow_scores_and_raises_nothing(ledger: Ledger) -> None:
    """The result says so; the stream `alert` stays empty."""
    ledger.record(result(shadow=True))
    assert states(ledger) == []
    assert json.loads(ledger.events_after("score", 0, 1)[0].body)["data"]["shadow"] is True


def test_an_acknowledgement_is_written_with_reason_and_name(ledger: Ledger) -> None:
    """First time counts, last word stands, every word is kept; control characters and length are cut."""
    ledger.record(result())
    name = alert(ledger).alert_id
    ledger.acknowledge(name, "rescanning", "A.\x1b[2J" + "x" * 100, START + 30)
    after = ledger.acknowledge(name, "wrong", "B", START + 60)
    assert (after.state, after.acknowledged_at, after.reason, after.by) == (
        State.ACKNOWLEDGED,
        START + 30,
        "wrong",
        "B",
    )
    first, second = ledger.feedback()
    assert (first["reason"], first["at"], second["reason"]) == ("rescanning", START + 30, "wrong")
    assert "\x1b" not in first["by"]
    assert len(first["by"]) == 64
    told = json.loads(ledger.events_after("alert", 1, 1)[0].body)["data"]["acknowledged"]
    assert told == {"reason": "rescanning", "by": first["by"], "at": START + 30}


def test_what_cannot_be_acknowledged(ledger: Ledger) -> None:
    """Unknown, ended, or with another reason: refused with words, and nothing is written."""
    ledger.record(result(final=False))
    name = alert(ledger).alert_id
    with pytest.raises(NoSuchAlert):
        ledger.acknowledge("nothing", "wrong", "")
    with pytest.raises(ValueError, match="rescanning, acceptable, patient_cannot, wrong"):
        ledger.acknowledge(name, "because", "")
    ledger.record(result(verdict="PASS"))
    with pytest.raises(AlertClosed, match="withdrawn already"):
        ledger.acknowledge(name, "wrong", "")
    assert ledger.feedback() == []


def test_the_first_display_is_noted_once(ledger: Ledger) -> None:
    """Later displays change nothing; an unknown alert is refused."""
    changes: list[AlertChange] = []
    ledger.on_change = changes.append
    ledger.record(result())
    name = alert(ledger).alert_id
    ledger.displayed(name, START + 12)
    ledger.displayed(name, START + 99)
    assert alert(ledger).shown_at == START + 12
    assert [c.seconds for c in changes if c.happened is None] == [2.0]
    with pytest.raises(NoSuchAlert):
        ledger.displayed("nothing")


def test_whoever_counts_is_told_after_it_is_durable(ledger: Ledger) -> None:
    """Raised with the seconds since the last instance, acknowledged with the seconds since raising."""
    told: list[tuple[Effect, float | None, str | None, int]] = []

    def note(change: AlertChange) -> None:
        told.append((change.effect, change.seconds, change.artefact, len(ledger.open_alerts())))

    ledger.on_change = note
    ledger.record(result())
    ledger.acknowledge(alert(ledger).alert_id, "acceptable", "", START + 40)
    assert told == [(Effect.RAISE, 10.0, "motion", 1), (Effect.ACKNOWLEDGE, 30.0, "motion", 1)]


def test_the_facts_tell_what_alerts_are_worth(ledger: Ledger) -> None:
    """Counts by state, median times, the share called wrong."""
    for n in range(3):
        ledger.record(result(f"s{n}", rule=f"r{n}"))
    ledger.displayed(alert(ledger, "s0").alert_id, START + 11)
    ledger.acknowledge(alert(ledger, "s0").alert_id, "wrong", "", START + 20)
    ledger.acknowledge(alert(ledger, "s1").alert_id, "rescanning", "", START + 30)
    assert ledger.facts() == {
        "alerts": {"raised": 1, "acknowledged": 2},
        "acknowledged": 2,
        "wrong": 1,
        "wrong_share": 0.5,
        "last_instance_to_alert_s": 10.0,
        "alert_to_display_s": 1.0,
        "alert_to_acknowledgement_s": 20.0,
    }


def test_old_events_are_cut_and_sequences_go_on(ledger: Ledger) -> None:
    """Alerts are kept longer; an emptied stream still knows its last sequence."""
    ledger.record(result("a"), now=START)
    ledger.record(result("b"), now=START + 100)
    assert ledger.cut(50, 1000, START + 101) == 2
    assert ledger.first_sequence("score") == 2
    assert ledger.first_sequence("alert") == 1
    assert ledger.cut(0, 0, START + 200) > 0
    assert ledger.first_sequence("score") == ledger.last_sequences()["score"] + 1 == 3
    ledger.record(result("c"))
    assert ledger.events_after("score", 0, 9)[0].sequence == 3


def test_health_is_written_when_it_changes(ledger: Ledger) -> None:
    """The same word twice is one event."""
    assert ledger.record_health({"ready": False})
    assert not ledger.record_health({"ready": False})
    assert ledger.record_health({"ready": True})
    assert ledger.last_sequences()["health"] == 2


def test_strikes_are_counted_across_restarts_and_cleared_by_a_final_result(tmp_path: Path) -> None:
    """A stack that kills the scorer is remembered."""
    with contextlib.closing(Ledger(tmp_path / "l.db")) as first:
        assert first.strike(reference("s1")) == 1
    with contextlib.closing(Ledger(tmp_path / "l.db")) as second:
        assert second.strike(reference("s1")) == 2
        second.record(result(final=False))
        assert second.strike(reference("s1")) == 3
        second.record(result())
        assert second.strike(reference("s1")) == 1


def test_results_by_filter(ledger: Ledger) -> None:
    """Newest first; replaced results only if asked for."""
    ledger.record(result("a", final=False), now=START)
    ledger.record(result("a", "PASS"), now=START + 1)
    ledger.record(result("b", scanner="mr2", rule="t2", exam="e2"), now=START + 2)
    assert [r["stack_ref"] for _, r in ledger.results()] == [reference("b"), reference("a")]
    assert len(ledger.results(newest_of_stack=False)) == 3
    assert [at for at, _ in ledger.results(since=START + 1, until=START + 2)] == [START + 1]
    for query, count in (({"scanner": "mr2"}, 1), ({"rule": "t1"}, 1), ({"verdict": "PASS"}, 1), ({"limit": 1}, 1)):
        assert len(ledger.results(**query)) == count
    assert ledger.facets() == (["mr1", "mr2"], ["t1", "t2"])
    at, made = ledger.result(result("b")["id"]) or (0.0, {})
    assert (at, made["scanner"]) == (START + 2, "mr2")
    assert ledger.result("another") is None


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    """Epoch, sequences, alerts: a restart changes nothing."""
    with contextlib.closing(Ledger(tmp_path / "l.db")) as first:
        first.record(result())
        epoch, before = first.epoch, [e.body for e in first.events_since(0, 99)]
    with contextlib.closing(Ledger(tmp_path / "l.db")) as second:
        assert second.epoch == epoch
        assert [e.body for e in second.events_since(0, 99)] == before
        assert [a.state for a in second.open_alerts()] == [State.RAISED]
    with contextlib.closing(Ledger(tmp_path / "other.db")) as third:
        assert third.epoch != epoch


def test_it_is_synchronised_to_the_disk(ledger: Ledger) -> None:
    """WAL with synchronous=FULL (2): what is committed survives a power cut; readable by its owner alone."""
    assert ledger._writer.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert ledger._writer.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_a_newer_schema_is_refused_untouched(tmp_path: Path) -> None:
    """The message names both versions and the remedy; not one byte of the folder changes."""
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    data = bytearray(path.read_bytes())
    data[60:64] = struct.pack(">I", SCHEMA + 1)
    path.write_bytes(data)
    before = digest(tmp_path)
    with pytest.raises(LedgerError, match=f"version {SCHEMA + 1}, this one knows {SCHEMA}.*backup"):
        Ledger(path)
    assert digest(tmp_path) == before


def test_a_newer_schema_that_stands_in_the_journal_alone_is_refused(tmp_path: Path) -> None:
    """Even where a newer version crashed before its number reached the file itself."""
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    newer = sqlite3.connect(path, isolation_level=None)
    newer.execute("PRAGMA wal_autocheckpoint = 0")
    newer.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    copy = tmp_path / "crashed"
    copy.mkdir()
    for name in ("ledger.db", "ledger.db-wal"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    newer.close()
    with pytest.raises(LedgerError, match="newer"):
        Ledger(copy / "ledger.db")


@pytest.mark.parametrize(
    ("content", "words"), [(b"not a database at all", "not a ledger"), (b"PK\x03\x04" * 50, "not a ledger")]
)
def test_a_strange_file_is_refused_untouched(tmp_path: Path, content: bytes, words: str) -> None:
    """Something else lies where the ledger should be."""
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=words):
        Ledger(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    """A database without our number is not made ours."""
    path = tmp_path / "ledger.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
        db.commit()
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger(path)


def test_a_damaged_ledger_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    """Its pages are noise."""
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xff" * (len(data) - 100))
    with pytest.raises(LedgerError, match="backup"):
        Ledger(path)


def test_another_thread_reads_while_one_writes(ledger: Ledger) -> None:
    """It reads through a connection of its own; what it sees is whole."""
    stop = threading.Event()
    seen: list[tuple[int, int]] = []

    def read() -> None:
        while not stop.is_set():
            last = ledger.last_sequences()["score"]
            seen.append((last, len(ledger.events_after("score", 0, 100))))
            stop.wait(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(5):
        ledger.record(result(f"s{number}", exam=f"e{number}"))
    stop.set()
    reader.join()
    assert seen
    assert all(last <= events <= 5 for last, events in seen)
    assert ledger.last_sequences()["score"] == 5


def test_settings_can_change_while_it_runs(ledger: Ledger) -> None:
    """A new limit holds from the next result on."""
    ledger.alerts = AlertSettings(max_per_exam=1)
    ledger.record(result("a"))
    ledger.record(result("b", rule="t2"))
    assert ledger.suppressed("mr1", reference("e1")) == 1
