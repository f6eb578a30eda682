"""From records to results, without a process: each result once, newest exam first, nothing repeated after a restart."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.config import AlertMode, CompletenessSettings, Settings
from daemon.flow import Flow, Served, Shared, Verdicts
from daemon.header import CLASSIC, Frame, Header
from daemon.ledger import Last
from daemon.result import SiteKey
from daemon.rules import load_rules
from daemon.score import Scores
from daemon.scorer import Scored
from daemon.series import Assembly
from daemon.spool import AssociationEnded, StoredInstance
from daemon.words import Reason

SETTINGS = Settings(completeness=CompletenessSettings(quiet_provisional_s=5, quiet_final_s=60, max_open_s=900))
SCORED = Scored(Scores({"snr": 10.0}, {}, (), {}), None, {"prepare": 0.1, "infer": 0.2, "score": 0.1})
SERVED = Served(SimpleNamespace(name="n", version="1", calibration=None), "f" * 64, {"provider": "cpu"})  # type: ignore[arg-type]
SLICES = 80


class Book:
    """A ledger in memory."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []
        self.strikes: dict[str, int] = {}

    def last_result(self, stack_ref: str) -> Last | None:
        found = [r for r in self.results if r["stack_ref"] == stack_ref]
        return Last(found[-1]["id"], found[-1]["revision"], found[-1]["final"]) if found else None

    def seen(self, result_id: str) -> bool:
        return any(r["id"] == result_id for r in self.results)

    def strike(self, stack_ref: str) -> int:
        self.strikes[stack_ref] = self.strikes.get(stack_ref, 0) + 1
        return self.strikes[stack_ref]


class Table:
    """A flow with a clock that the test moves, a log of records, and a ledger that outlives restarts."""

    def __init__(self) -> None:
        self.book, self.records, self.now = Book(), [], 1000.0  # type: ignore[var-annotated]
        self.headers: dict[int, Header | Reason] = {}
        self.restart()

    def restart(self) -> None:
        self.flow = Flow(
            SETTINGS,
            SiteKey(bytes(32)),
            load_rules(()),
            Assembly(SETTINGS),
            self.book,
            lambda *_: None,
            served=SERVED,
        )
        for record in self.records:
            self.flow.add(record)
            self.answer(record)
        self.write(self.flow.apply(self.now))
        self.write(self.flow.end_replay(self.now))

    def answer(self, record: StoredInstance | AssociationEnded) -> None:
        if record.position in self.headers:
            self.flow.add_header(record.position, self.headers[record.position])

    def write(self, verdicts: Any) -> list[Verdicts]:
        told = list(verdicts)
        self.book.results += [v.result for v in told]
        return told

    def arrive(self, slices: range, series: str = "1.1", study: str = "1", association: int = 1) -> None:
        for number in slices:
            self.take(
                stored(len(self.records) + 1, self.now, f"{series}.{number}", association),
                header(number, series, study),
            )

    def take(self, record: StoredInstance, facts: Header | Reason) -> None:
        self.records.append(record)
        self.headers[record.position] = facts
        self.flow.add(record)
        self.answer(record)
        self.write(self.flow.apply(self.now))

    def release(self, association: int) -> None:
        for number in {1, association}:
            ended = AssociationEnded(len(self.records) + 1, number, "unknown", self.now, released=True)
            self.records.append(ended)
            self.flow.add(ended)
        self.write(self.flow.apply(self.now))

    def wait(self, seconds: float) -> list[Verdicts]:
        self.now += seconds
        return self.write(self.flow.apply_time(self.now))

    def score(self, scored: Scored = SCORED) -> list[Verdicts]:
        job = self.flow.next_job()
        assert job is not None
        return self.write(self.flow.scored(job.number, scored, self.now))

    def told(self) -> list[tuple[bool, int]]:
        return [(r["final"], r["revision"]) for r in self.book.results]


def stored(position: int, at: float, uid: str, association: int) -> StoredInstance:
    sha256 = hashlib.sha256(uid.encode()).hexdigest()
    return StoredInstance(position, 1, 0, 100, sha256, CLASSIC, uid, "1.2.840.10008.1.2.1", "unknown", association, at)


def header(number: int, series: str, study: str, **attributes: str | float) -> Header:
    frame = Frame(
        position_mm=(2.0 * number, 0.0, 0.0),
        orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
        pixel_spacing_mm=(2.0, 2.0),
        thickness_mm=2.0,
        image_type=("ORIGINAL", "PRIMARY", "M"),
        component="M",
    )
    return Header(
        sop_class_uid=CLASSIC,
        sop_instance_uid=f"{series}.{number}",
        series_uid=series,
        study_uid=study,
        frame_of_reference_uid=study,
        rows=128,
        columns=128,
        bits_allocated=16,
        photometric="MONOCHROME2",
        frames=(frame,),
        series_number=4,
        acquisition_type="3D",
        scanning=frozenset({"GR", "IR"}),
        attributes=attributes,
    )


def test_a_final_result_reuses_the_scores_of_the_provisional_one() -> None:
    """One inference, two results; the final one supersedes the provisional one."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(6)
    assert [v.result["final"] for v in table.score()] == [False]
    (final,) = table.wait(60)
    assert table.flow.next_job() is None
    assert final.result["supersedes"] == table.book.results[0]["id"]
    assert final.result["series"] == {
        "number": 4,
        "instances": SLICES,
        "began_at": 1000.0,
        "ended_at": 1000.0,
    }
    assert table.told() == [(False, 1), (True, 1)]


def test_a_late_instance_opens_the_next_revision() -> None:
    """Its final result supersedes the old one."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(6)
    table.score()
    table.wait(60)
    first = table.book.results[-1]["id"]
    table.arrive(range(SLICES, SLICES + 1))
    table.wait(61)
    table.score()
    assert table.told()[-1] == (True, 2)
    assert table.book.results[-1]["supersedes"] == first


def test_a_provisional_job_that_waits_is_merged_into_the_final_one() -> None:
    """A busy scorer does not say twice what it could not say in time."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(6)
    table.wait(60)
    table.score()
    assert table.flow.next_job() is None
    assert table.told() == [(True, 1)]


def test_a_running_provisional_job_answers_the_final_question_of_the_same_stack() -> None:
    """The final evidence comes while the scorer works: one result, final."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(6)
    job = table.flow.next_job()
    assert job is not None
    table.wait(60)
    table.write(table.flow.scored(job.number, SCORED, table.now))
    assert table.told() == [(True, 1)]
    assert table.flow.next_job() is None


def test_scores_of_a_stack_that_has_grown_meanwhile_are_not_told() -> None:
    """A late instance makes the running job stale; the larger stack is scored instead."""
    table = Table()
    table.arrive(range(SLICES - 1))
    table.wait(6)
    job = table.flow.next_job()
    assert job is not None
    table.arrive(range(SLICES - 1, SLICES))
    table.wait(61)
    assert table.write(table.flow.scored(job.number, SCORED, table.now)) == []
    (told,) = table.score()
    assert told.result["evidence"]["instances"] == SLICES


def test_nothing_is_repeated_after_a_restart() -> None:
    """The same records, a ledger that knows their results: no job, no result."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(6)
    table.score()
    table.wait(60)
    before = list(table.book.results)
    table.restart()
    table.wait(120)
    assert table.flow.next_job() is None
    assert table.book.results == before


def test_what_was_not_told_before_a_crash_is_told_after_it() -> None:
    """Killed after the provisional result: the restart asks for the final one alone."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(6)
    table.score()
    table.now += 600
    table.restart()
    table.score()
    assert table.told() == [(False, 1), (True, 1)]


def test_a_restart_between_final_and_late_instance_keeps_the_revision() -> None:
    """The assembly is rebuilt, and the late instance still opens revision 2."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(66)
    table.score()
    table.now += 100
    table.restart()
    table.arrive(range(SLICES, SLICES + 1))
    table.wait(61)
    table.score()
    assert table.told() == [(True, 1), (True, 2)]


def test_a_series_that_crashes_the_scorer_is_set_aside_after_three_times() -> None:
    """The count survives a restart; others are scored meanwhile."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(66)
    for _ in range(2):
        assert table.flow.next_job() is not None
        assert table.write(table.flow.scorer_died(table.now)) == []
        table.restart()
    assert table.flow.next_job() is not None
    (told,) = table.write(table.flow.scorer_died(table.now))
    assert told.result["verdict"] == "CANNOT_JUDGE"
    assert told.result["reasons"][0]["code"] == "scorer_crashed"
    assert table.flow.next_job() is None


def test_machines_without_a_configured_name_are_told_apart() -> None:
    """By what their headers name, as a keyed hash; a configured scanner needs none, a silent header gives none."""
    table = Table()
    for number, (study, station) in enumerate((("1", "MR1"), ("2", "MR2"), ("3", "MR1"), ("4", "")), 1):
        table.take(stored(number, table.now, f"{study}.1", 1), header(1, f"{study}.1", study, StationName=station))
    named = dataclasses.replace(stored(5, table.now, "5.1", 1), scanner="mr1")
    table.take(named, header(1, "5.1", "5", StationName="MR1"))
    first, second, third, silent, configured = (exam.device for exam in table.flow.new_exams)
    assert first == third != second
    assert first is not None
    assert "MR1" not in first
    assert (silent, configured) == (None, None)


def test_the_newest_exam_is_scored_first() -> None:
    """The patient on the table comes before the backlog."""
    table = Table()
    table.arrive(range(SLICES), series="1.1", study="1", association=1)
    table.now += 1
    table.arrive(range(SLICES), series="2.1", study="2", association=2)
    table.wait(66)
    job = table.flow.next_job()
    assert job is not None
    assert job.stack.study_uid == "2"


def test_time_does_not_pass_beyond_records_that_wait() -> None:
    """A slow header must not look like a silence of the scanner."""
    table = Table()
    table.arrive(range(SLICES))
    record = stored(len(table.records) + 1, table.now, "1.1.80", 1)
    table.flow.add(record)
    table.wait(100)
    assert table.flow.next_job() is None
    assert table.book.results == []
    table.flow.add_header(record.position, header(80, "1.1", "1"))
    table.write(table.flow.apply(table.now))
    table.wait(1)
    (told,) = table.score()
    assert told.result["evidence"]["instances"] == SLICES + 1


def test_a_flood_of_records_does_not_stop_the_clock() -> None:
    """While there is always a record that waits, a series that has gone quiet is still judged in time."""
    table = Table()
    table.arrive(range(SLICES))
    for number in range(70):
        table.now += 1
        table.arrive(range(number, number + 1), series="9.9", association=9)
        table.flow.add(stored(10_000 + number, table.now, f"8.{number}", 8))
        table.wait(0)
        table.flow.add_header(10_000 + number, header(number, "8", "8"))
        table.write(table.flow.apply(table.now))
        if table.flow.queue:
            break
    assert number == 4
    job = table.flow.next_job()
    assert job is not None
    assert job.stack.series_uid == "1.1"


def test_a_step_of_the_wall_clock_is_neither_silence_nor_future() -> None:
    """Records stamped an hour back or ahead count as just arrived."""
    for step in (-3600.0, 3600.0):
        table = Table()
        table.flow.clock_step_s = step
        for number in range(SLICES):
            table.take(stored(number + 1, table.now + step, f"1.1.{number}", 1), header(number, "1.1", "1"))
        table.wait(4)
        assert table.flow.next_job() is None
        table.wait(2)
        assert table.flow.next_job() is not None


def test_an_unreadable_instance_ends_as_a_refusal() -> None:
    """Nothing that was answered with success goes without a word."""
    table = Table()
    table.take(stored(1, table.now, "9", 1), Reason("bad_header", "The header cannot be read."))
    (told,) = table.wait(66)
    assert (told.result["verdict"], told.result["reasons"][0]["code"]) == ("CANNOT_JUDGE", "bad_header")
    assert told.result["final"]


def test_a_refusal_of_the_scorer_is_a_result() -> None:
    """What is not a head is CANNOT_JUDGE with its code, and no pictures."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(66)
    (told,) = table.score(Scored(None, Reason("not_a_head", "No head.")))
    assert told.result["reasons"][0]["code"] == "not_a_head"
    assert "pictures" not in told.result
    assert told.result["scores"] == {}


def test_a_shadow_scanner_is_marked_in_its_results() -> None:
    """Scored and recorded, and nothing is raised."""
    table = Table()
    scanner = SimpleNamespace(slug="unknown", alerts=AlertMode.SHADOW)
    table.flow.settings = SimpleNamespace(scanner=lambda _: scanner, completeness=SETTINGS.completeness)  # type: ignore[assignment]
    table.arrive(range(SLICES))
    table.wait(66)
    (told,) = table.score()
    assert told.result["shadow"] is True


def test_only_settled_records_may_be_removed() -> None:
    """Not before the longest time that a stack may stay open, and not while one of its jobs waits."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(66)
    assert table.flow.judged_before(table.now) == 1
    table.now += 2000
    assert table.flow.judged_before(table.now) == 1
    table.score()
    assert table.flow.judged_before(table.now) == SLICES + 1


def test_progress_says_what_a_scanner_is_doing() -> None:
    """Receiving, then judging, then nothing."""
    table = Table()
    assert table.flow.progress() == {}
    table.arrive(range(SLICES))
    (now,) = table.flow.progress().values()
    assert now.progress is not None
    assert (now.progress.phase, now.progress.instances, now.progress.series_number) == ("receiving", SLICES, 4)
    table.wait(66)
    (now,) = table.flow.progress().values()
    assert now.progress is not None
    assert now.progress.phase == "judging"
    table.score()
    (now,) = table.flow.progress().values()
    assert now.progress is None


def test_the_protocol_is_told_as_a_keyed_hash() -> None:
    """A repeat of the same protocol is recognised without its name."""
    table = Table()
    for number in range(SLICES):
        facts = dataclasses.replace(header(number, "1.1", "1"), attributes={"ProtocolName": "CANARY"})
        table.take(stored(number + 1, table.now, f"1.1.{number}", 1), facts)
    table.wait(66)
    (told,) = table.score()
    assert len(told.result["series"]["protocol_ref"]) == 32
    assert "CANARY" not in str(told.result)


def test_a_restart_in_the_middle_of_a_revision_does_not_repeat_the_one_before() -> None:
    """The ledger ends with a provisional result of revision 2; the final one of revision 1 is not told again."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(66)
    table.score()
    table.now += 100
    table.arrive(range(SLICES, SLICES + 1), association=2)
    table.release(association=2)
    table.wait(10)
    table.score()
    assert table.told() == [(True, 1), (False, 2)]
    table.restart()
    table.wait(61)
    table.score()
    assert table.told() == [(True, 1), (False, 2), (True, 2)]


def test_an_answer_that_the_ledger_cannot_take_yet_is_told_later() -> None:
    """A ledger that cannot be read for a moment loses no verdict."""
    table = Table()
    table.arrive(range(SLICES))
    table.wait(66)
    job = table.flow.next_job()
    assert job is not None
    healthy, table.flow.book = table.flow.book, Broken()
    with pytest.raises(OSError, match="locked"):
        table.write(table.flow.scored(job.number, SCORED, table.now))
    table.flow.book = healthy
    table.wait(1)
    assert table.told() == [(True, 1)]


class Broken(Book):
    def last_result(self, stack_ref: str) -> Last | None:
        raise OSError("locked")


def test_a_header_that_breaks_the_assembly_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One strange instance does not end the main loop."""
    table = Table()
    failures: list[BaseException] = []
    table.flow.on_failure = failures.append
    whole = table.flow.assembly.on_instance

    def breaks(record: StoredInstance, facts: Any, now: float) -> Any:
        if record.position == 1:
            raise ZeroDivisionError
        return whole(record, facts, now)

    monkeypatch.setattr(table.flow.assembly, "on_instance", breaks)
    table.arrive(range(SLICES))
    table.wait(66)
    (told,) = table.score()
    assert len(failures) == 1
    assert told.result["evidence"]["instances"] == SLICES - 1


def test_equal_values_of_headers_are_one_object() -> None:
    """A day of series fits into memory; what is shared is equal, so nothing else changes."""
    shared = Shared()
    copies = [pickle.loads(pickle.dumps(header(n, "1.1", "1"))) for n in range(2)]
    one, two = (shared.header(each, stored(1, 0.0, each.sop_instance_uid, 1)) for each in copies)
    assert (one, two) == tuple(copies)
    assert one.frames[0].orientation is two.frames[0].orientation
    assert one.series_uid is two.series_uid
    record = stored(1, 0.0, "1", 1)
    assert shared.record(record) == record
