"""The command line as a user meets it: help that teaches, errors of one line, exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.__main__ import COMMANDS
from tests.serving import patience

ROOT = Path(__file__).resolve().parents[2]


def rescan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=patience(60),
        env={**os.environ, "XDG_STATE_HOME": "/proc/nowhere"},
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command: str) -> None:
    """Its help has a description and the notice, and exits with 0."""
    done = rescan(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"rescan {command}" in done.stdout
    assert "Not a medical device" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve", "--dicom", "nonsense"], 2, "--dicom: got 'nonsense'; write it as HOST:PORT"),
        (["serve", "--dicom", "0.0.0.0:0"], 2, "no scanner is allowed to send; list each one: [[scanners]]"),
        (["serve", "--events", "5556"], 2, "events.publish: got '5556'; write it as tcp://HOST:PORT"),
        (["serve", "--engine", "tpu"], 2, "invalid choice: 'tpu'"),
        (["serve", "--portt", "1"], 2, "unrecognized arguments: --portt 1"),
        (["serve", "--config", "/nonexistent/x.toml"], 2, "/nonexistent/x.toml: cannot read the configuration"),
        (["serve", "--state", "/proc/nothing"], 2, "state: /proc/nothing"),
        (["sevre"], 2, "did you mean serve?"),
        (["score", "/proc/no-scan"], 1, "/proc/no-scan: there is no such file or folder"),
        (["score"], 2, "the following arguments are required: path"),
        (["check", "/nonexistent.toml"], 1, "/nonexistent.toml: cannot read the configuration"),
        (["card", "/nonexistent.onnx"], 1, "/nonexistent.onnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_ends_with_one_line_that_names_value_and_remedy(arguments: list[str], status: int, words: str) -> None:
    """No traceback, nothing on standard output, status 2 for misuse and 1 for failure."""
    done = rescan(*arguments)
    assert words in one_line(done)
    assert done.returncode == status


def test_the_version_is_told() -> None:
    """As one line on standard output."""
    assert rescan("--version").stdout == "rescan 0.1.0\n"


def test_config_tells_value_and_origin() -> None:
    """A flag is a flag, the rest are defaults."""
    done = rescan("config", "--json", "--http", "127.0.0.1:0")
    told = json.loads(done.stdout)
    assert told["http.port"] == {"value": 0, "origin": "flag"}
    assert told["dicom.port"] == {"value": 11112, "origin": "default"}


def test_doctor_prints_findings_as_json() -> None:
    """Every finding has a name, a state and what was found."""
    findings = json.loads(rescan("doctor", "--json").stdout)["findings"]
    assert {"system", "onnxruntime", "disk", "clock"} <= {f["name"] for f in findings}
    assert all(f["state"] in {"ok", "warning", "failed"} for f in findings)
