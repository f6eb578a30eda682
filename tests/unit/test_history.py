"""`rescan history`: the exported tables, and that `rescan calibrate` reads them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
from pathlib import Path

import pytest

from daemon.__main__ import main
from daemon.calibration import CalibrationError, read_history
from daemon.config import Settings
from daemon.history import ALERT_COLUMNS, FEEDBACK_COLUMNS, VERDICT_COLUMNS
from daemon.ledger import Ledger
from daemon.page.store import HistoryQuery, Table
from daemon.page_store import Board, Store
from daemon.site_calibrate import read_table
from tests.event_builders import SHA256, START, reference, result


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with a little history."""
    with contextlib.closing(Ledger(tmp_path / "ledger.db", clock=lambda: START + 10)) as ledger:
        ledger.record(result("a", final=False))
        ledger.record(result("a"))
        name = ledger.open_alerts()[0].alert_id
        ledger.displayed(name, START + 12)
        ledger.acknowledge(name, "rescanning", "=A.B.", START + 20)
        ledger.acknowledge(name, "wrong", "=A.B.", START + 25)
        ledger.record(result("b", "PASS", rule="t2", exam="e2", scanner="mr2"), now=START + 86_400)
        ledger.record(result("c", "CANNOT_JUDGE", rule="t2", exam="e3", scanner="mr2"), now=START + 86_401)
    return tmp_path


def table(capsys: pytest.CaptureFixture[str], state: Path, *words: str) -> list[dict[str, str]]:
    assert main(["history", *words, "--state", str(state)]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_verdicts(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every result, oldest first; unknown is empty; the alert and what was said of it stand beside."""
    rows = table(capsys, state, "verdicts")
    assert [(r["verdict"], r["final"], r["revision"]) for r in rows] == [
        ("RESCAN", "0", "1"),
        ("RESCAN", "1", "1"),
        ("PASS", "1", "1"),
        ("CANNOT_JUDGE", "1", "1"),
    ]
    assert tuple(rows[0]) == VERDICT_COLUMNS
    assert (rows[1]["alert_state"], rows[1]["feedback"], rows[1]["label"]) == ("acknowledged", "wrong", "")
    assert (rows[1]["predicted_dice"], rows[1]["motion_score"], rows[1]["model_sha256"]) == ("0.71", "0.1", SHA256)
    assert (rows[3]["predicted_dice"], rows[3]["engine"], rows[3]["reasons"]) == ("", "", "not_a_head")
    assert rows[0]["time"] == "2023-11-14T22:13:30.000Z"


def test_alerts(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the times that matter; what a person typed is no formula."""
    (row,) = table(capsys, state, "alerts")
    assert tuple(row) == ALERT_COLUMNS
    assert (row["state"], row["reason"], row["by"]) == ("acknowledged", "wrong", "'=A.B.")
    times = ("last_instance_to_alert_s", "alert_to_display_s", "alert_to_acknowledgement_s")
    assert [float(row[name]) for name in times] == [10.0, 2.0, 10.0]


def test_feedback(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every word, not the last alone."""
    rows = table(capsys, state, "feedback")
    assert tuple(rows[0]) == FEEDBACK_COLUMNS
    assert [r["reason"] for r in rows] == ["rescanning", "wrong"]


def test_filters(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By day (UTC) and by scanner."""
    assert len(table(capsys, state, "verdicts", "--since", "2023-11-15")) == 2
    assert len(table(capsys, state, "verdicts", "--until", "2023-11-15T00:00:00")) == 2
    assert len(table(capsys, state, "verdicts", "--scanner", "mr2")) == 2
    assert table(capsys, state, "alerts", "--scanner", "mr2") == []


def test_the_pages_export_is_the_same_file(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte, with the same filters."""
    filters = [
        ({}, []),
        ({"scanner": "mr2", "verdict": "PASS"}, ["--scanner", "mr2", "--verdict", "PASS"]),
        ({"rule": "t2", "since": START + 86_000}, ["--rule", "t2", "--since", "2023-11-15T22:00"]),
    ]
    with contextlib.closing(Ledger(state / "ledger.db")) as ledger:
        store = Store(Settings, ledger, Board(), lambda: 0.0, list, lambda: None)
        for page, words in filters:
            query = HistoryQuery(**{"protocol" if name == "rule" else name: value for name, value in page.items()})
            for each in Table:
                assert main(["history", each, "--state", str(state), *words]) == 0
                assert "".join(store.export(each, query)) == capsys.readouterr().out


def test_a_long_history_is_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result once, in order, across the pages."""
    monkeypatch.setattr("daemon.ledger_reader.PAGE_ROWS", 3)
    with contextlib.closing(Ledger(tmp_path / "ledger.db")) as ledger:
        for number in range(8):
            ledger.record(result(f"s{number}", "PASS"))
        assert [r["stack_ref"] for _, r in ledger.every_result()] == [reference(f"s{n}") for n in range(8)]


@pytest.mark.parametrize("content", [b"noise" * 100, b"SQLite format 3\0" + bytes(4080)], ids=["strange", "damaged"])
def test_what_is_no_ledger_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """Status 2, the remedy, and the file as it was."""
    (tmp_path / "ledger.db").write_bytes(content)
    assert main(["history", "verdicts", "--state", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "ledger.db").read_bytes() == content


def test_a_newer_ledger_is_refused_untouched(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names both versions; not one byte changes."""
    with contextlib.closing(sqlite3.connect(state / "ledger.db")) as db:
        db.execute("PRAGMA user_version = 99")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = {file.name: file.read_bytes() for file in state.iterdir()}
    assert main(["history", "verdicts", "--state", str(state)]) == 2
    assert "version 99" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in state.iterdir()} == before


def test_json_lines_are_final_results(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, as published."""
    assert main(["history", "--json", "--state", str(state)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["verdict"] for line in lines] == ["RESCAN", "PASS", "CANNOT_JUDGE"]
    assert lines[0] == result("a")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give one of a table"),
        (["alerts", "--json"], "give one of a table"),
        (["alerts", "--since", "yesterday"], "yesterday"),
        (["alerts", "--state", "/nowhere"], "--state"),
    ],
)
def test_misuse_is_one_line(state: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    """Status 2, the value and the remedy; no ledger is made where there is none."""
    rest = [] if "--state" in words else ["--state", str(state)]
    assert main(["history", *words, *rest]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def many(folder: Path, count: int) -> Path:
    """An exported history of clean scans."""
    with contextlib.closing(Ledger(folder / "ledger.db", clock=lambda: START)) as ledger:
        for n in range(count):
            ledger.record(result(f"s{n}", "PASS", exam=f"e{n}", dice=0.9 + n / 10_000))
    assert main(["history", "--to", str(folder / "out"), "--state", str(folder)]) == 0
    return folder / "out"


def test_calibrate_reads_what_history_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: 60 clean scans, exported, fitted, in force; it says how many scans it rests on."""
    exported = many(tmp_path, 60)
    assert {file.name for file in exported.iterdir()} == {"verdicts.csv", "alerts.csv", "feedback.csv"}
    assert main(["calibrate", str(exported), "--state", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "60 scans, 60 of them marked by nobody" in said.err
    assert "mr1 / t1: 60 exams; in force: protocol (60 scans)" in said.err
    document = json.loads((tmp_path / "calibration.json").read_text())
    assert document["models"][SHA256]["mr1"]["protocols"]["t1"]["scans"] == 60


def marked(exported: Path, **changes: dict[int, str]) -> Path:
    """The exported verdicts with some cells filled, as a site does in a spreadsheet."""
    file = exported / "verdicts.csv"
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    for column, cells in changes.items():
        for number, value in cells.items():
            rows[number][column] = value
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, VERDICT_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_which_scans_count_as_clean(tmp_path: Path) -> None:
    """Not those labelled artefact, not those repeated; a label outweighs what was said in haste."""
    file = marked(
        many(tmp_path, 6),
        label={0: "artefact", 1: "clean", 2: "clean"},
        feedback={2: "rescanning", 3: "patient_cannot", 4: "wrong"},
        dice={1: "0.88"},
    )
    found = read_table(file)
    assert {item.exam for item in found.items} == {reference(f"e{n}") for n in (1, 2, 4, 5)}
    assert [item.dice for item in found.items] == [0.88, None, None, None]
    assert found.text == (
        "4 scans, 1 of them marked by nobody; left out: 1 labelled artefact, 1 acknowledged as patient_cannot"
    )


def test_scans_of_an_older_model_are_left_out(tmp_path: Path) -> None:
    """Scores of different models cannot be pooled: the newest one's are taken."""
    file = marked(many(tmp_path, 4), model_sha256={0: "0" * 64, 1: "0" * 64})
    model, items = read_history(file)
    assert (model, len(items)) == (SHA256, 2)
    assert "2 of an older model" in read_table(file).text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no column"),
        ("a,b\n1,2\n", "no column exam_ref"),
        (",".join(VERDICT_COLUMNS) + "\n", "no final, scored result"),
    ],
)
def test_a_strange_table_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    """With the remedy."""
    (tmp_path / "verdicts.csv").write_text(content)
    with pytest.raises(CalibrationError, match=says):
        read_table(tmp_path)


def test_a_cell_that_is_no_number_is_named(tmp_path: Path) -> None:
    """So that it can be mended."""
    with pytest.raises(CalibrationError, match=r"high.*mend that row"):
        read_table(marked(many(tmp_path, 2), dice={0: "high"}))
