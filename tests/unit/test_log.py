"""Log lines: one per event, fields from a list, no text of errors."""

from __future__ import annotations

import io
import json
import logging
import warnings

import pytest

from daemon.config import LogFormat
from daemon.log import Event, Log, line, quiet_libraries


def test_a_line_is_key_value_or_json() -> None:
    """The same fields in both forms; None is left out, spaces are quoted."""
    fields = {"verdict": "PASS", "seconds": 1.23456, "rule": "t1 head", "final": True, "artefact": None}
    assert line(Event.SERIES, 0.5, LogFormat.TEXT, dict(fields)) == (
        'time=1970-01-01T00:00:00.500Z event=series verdict=PASS seconds=1.235 rule="t1 head" final=true'
    )
    assert json.loads(line(Event.SERIES, 0, LogFormat.JSON, dict(fields)))["rule"] == "t1 head"


def test_a_field_that_is_not_on_the_list_is_refused() -> None:
    """Nobody can log a patient's name by adding a keyword."""
    with pytest.raises(ValueError, match="patient_name"):
        line(Event.SERIES, 0, LogFormat.TEXT, {"patient_name": "ZZZ"})


def test_a_value_cannot_start_a_line_of_its_own() -> None:
    """A line break inside a value is escaped."""
    assert "\n" not in line(Event.SERIES, 0, LogFormat.TEXT, {"reason": "a\nevent=forged"})


def test_a_failure_is_told_by_type_and_place_without_its_text() -> None:
    """Exception text can quote a patient's data."""
    out = io.StringIO()
    try:
        raise ValueError("ZZZ^CANARY")
    except ValueError as error:
        Log(stream=out).failure(error, process="main", step="test")
    assert "CANARY" not in out.getvalue()
    assert "error=ValueError" in out.getvalue()
    assert "test_log.py:" in out.getvalue()


def test_libraries_are_silent(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logging nor warnings of a library reach the output."""
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    handlers = logging.getLogger().handlers[:]
    with warnings.catch_warnings():
        quiet_libraries(Log(), "main")
        logging.getLogger("pydicom").error("ZZZ^CANARY")
        warnings.warn("ZZZ^CANARY", UserWarning, stacklevel=1)
    logging.getLogger().handlers[:] = handlers
    captured = capfd.readouterr()
    assert "CANARY" not in captured.err + captured.out
