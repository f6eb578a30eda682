"""Faults while it runs: each leads to the alert, the log line and the recovery that the runbook tells; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daemon.audit import FILE_NAME, Kind, entries, verify
from tests.conftest import ROOT
from tests.deploy.watching import Prometheus, until
from tests.pushing import echo, head, push
from tests.serving import QUICK, Serving, fields

RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


@dataclass
class Site:
    """A daemon that Prometheus watches, and what was acknowledged to its senders."""

    daemon: Serving
    prometheus: Prometheus
    model: Path
    pushed: list[str] = field(default_factory=list)

    def push(self, seed: str) -> None:
        """A whole head, every image of it answered with success."""
        assert set(push(self.daemon.ports["dicom"], head(seed))) == {SUCCESS}
        self.pushed.append(seed)

    def finals(self) -> int:
        return len([f for f in self.daemon.results() if f["final"] == "true"])

    def alert(self, name: str) -> None:
        """Wait until Prometheus sees what this rule asks for; its entry stands in the runbook."""
        assert f"## {name}\n" in RUNBOOK
        self.prometheus.until(lambda: name in self.prometheus.firing(), what=name)

    def alert_over(self, name: str) -> None:
        self.prometheus.until(lambda: name not in self.prometheus.firing(), what=f"{name} over")

    def log(self, start: int, **expected: str) -> dict[str, str]:
        """A line of the log with these fields."""
        return self.daemon.log.wait(lambda f: all(f.get(k) == v for k, v in expected.items()), start=start)

    def ready(self) -> None:
        until(lambda: self.daemon.get("/readyz")[0] == 200, lambda: self.daemon.get("/readyz")[1], 60)

    def all_judged(self) -> None:
        """Every acknowledged series has exactly one final result."""
        until(lambda: self.finals() >= len(self.pushed), lambda: f"{self.finals()} of {self.pushed}", 60)
        assert self.finals() == len(self.pushed)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("faults")
    model = Path(shutil.copy(student, folder / "model.onnx"))
    with (
        Serving(folder / "state", model=model, config=QUICK) as daemon,
        Prometheus(folder / "prometheus", free_port(), daemon.ports["http"]) as prometheus,
    ):
        yield Site(daemon, prometheus, model)


def test_a_configuration_that_is_broken_and_reloaded(site: Site) -> None:
    """Refused whole, told in log, metric, alert and audit; the daemon goes on; the mended file ends it."""
    good = site.daemon.config.read_text(encoding="utf-8")
    assert site.daemon.process is not None
    for broken, words in (
        (good + "[spool]\nretention = 5\n", "did you mean retention_s?"),
        (good + "[spool]\nretention_s = 5.0\n[dicom]\nmax_associations = 3\n", "needs a restart"),
        ("not = [toml", "not TOML"),
    ):
        start = len(site.daemon.log.all)
        site.daemon.config.write_text(broken, encoding="utf-8")
        site.daemon.process.send_signal(signal.SIGHUP)
        assert words in site.log(start, event="reload_refused")["reason"]
    site.alert("RescanReloadRefused")
    assert echo(site.daemon.ports["dicom"]) == SUCCESS
    start = len(site.daemon.log.all)
    site.daemon.config.write_text(good + "[alerts]\nmax_per_exam = 5\n", encoding="utf-8")
    site.daemon.process.send_signal(signal.SIGHUP)
    site.log(start, event="reloaded")
    site.alert_over("RescanReloadRefused")
    audit = list(entries(site.daemon.state / FILE_NAME))
    assert [e.kind for e in audit].count(Kind.RELOAD_REFUSED) == 3
    last = [e for e in audit if e.kind is Kind.SETTINGS][-1]
    assert last.data["changed"] == {"alerts.max_per_exam": [3, 5]}


def test_the_scorer_killed_in_a_loop(site: Site) -> None:
    """It starts again each time; the alerts name it; what comes meanwhile is judged afterwards."""
    for number in range(3):
        start = len(site.daemon.log.all)
        until(lambda: "scorer" in site.daemon.children(), lambda: "no scorer")
        os.kill(site.daemon.children()["scorer"], signal.SIGKILL)
        line = site.log(start, event="process_ended", process="scorer")
        assert line["status"] == str(-signal.SIGKILL)
        if number == 1:
            site.push("while the scorer dies")
        site.log(start, event="process_started", process="scorer")
    site.alert("RescanProcessRestarting")
    site.alert("RescanInferenceFailures")
    site.ready()
    site.all_judged()


def test_a_model_replaced_by_a_bad_one(site: Site) -> None:
    """The one in memory goes on; when the process dies the bad one is refused, loudly; a good one mends it without a restart."""
    good = site.model.read_bytes()
    bad = site.model.with_suffix(".bad")
    bad.write_bytes(good[: len(good) // 2])
    bad.replace(site.model)
    site.push("with the model in memory")
    site.all_judged()
    start = len(site.daemon.log.all)
    os.kill(site.daemon.children()["scorer"], signal.SIGKILL)
    assert "model.onnx" in site.log(start, event="not_ready")["reason"]
    assert site.daemon.get("/readyz")[0] == 503
    site.alert("RescanNotReady")
    site.push("without a model")
    fresh = site.model.with_suffix(".fresh")
    fresh.write_bytes(good)
    fresh.replace(site.model)
    site.ready()
    site.alert_over("RescanNotReady")
    site.all_judged()


def test_the_ledger_locked_by_another_program(site: Site) -> None:
    """Results wait, the alert says so, the DICOM door stays open; when the lock is gone everything is written, once."""
    start = len(site.daemon.log.all)
    with contextlib.closing(sqlite3.connect(site.daemon.state / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        site.push("while the ledger is locked")
        assert site.log(start, event="failed", step="ledger")["error"] == "OperationalError"
        site.alert("RescanLedgerStuck")
        assert echo(site.daemon.ports["dicom"]) == SUCCESS
        assert "the ledger cannot be used" in site.daemon.get("/readyz")[1]
        other.execute("ROLLBACK")
    site.ready()
    site.alert_over("RescanLedgerStuck")
    site.all_judged()


def test_the_audit_of_it_all_holds(site: Site) -> None:
    """After every fault the chain is whole, and the model stands in it once: the bad one was never in force."""
    path = site.daemon.state / FILE_NAME
    assert verify(path) > 5
    assert [e.kind for e in entries(path)].count(Kind.MODEL) == 1


def test_a_port_that_is_taken(tmp_path: Path, student: Path) -> None:
    """One line and status 2; the alert says that it is down; started again, as the service manager does, it comes up."""
    dicom, http = free_port(), free_port()
    fixed = ("--dicom", f"127.0.0.1:{dicom}", "--http", f"127.0.0.1:{http}")
    daemon = Serving(tmp_path / "state", model=student, arguments=fixed)
    with Prometheus(tmp_path / "prometheus", free_port(), http) as prometheus:
        with socket.create_server(("127.0.0.1", dicom)):
            with pytest.raises(TimeoutError, match=rf"cannot listen on 127\.0\.0\.1:{dicom}"):
                daemon.start()
            prometheus.until(lambda: "RescanDown" in prometheus.firing())
        with daemon.start():
            prometheus.until(lambda: "RescanDown" not in prometheus.firing())
            assert echo(dicom) == SUCCESS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")
    return filler


def test_a_disk_that_fills(small_disk: Path, student: Path) -> None:
    """0xA700 and two alerts; with room again images are taken and all that was acknowledged is judged, without a restart."""
    config = QUICK + "[spool]\nsegment_bytes = 1048576\nreserve_bytes = 0\n"
    with (
        Serving(small_disk / "state", model=student, config=config) as daemon,
        Prometheus(small_disk.parent / "prometheus", free_port(), daemon.ports["http"]) as prometheus,
    ):
        site = Site(daemon, prometheus, student)
        prometheus.until(lambda: prometheus.values("rescan_ready") == [1.0])
        site.push("before")
        filler = fill(small_disk)
        answers: list[int] = []
        number = 0
        while OUT_OF_RESOURCES not in answers:
            number += 1
            answers = push(daemon.ports["dicom"], head(f"full {number}"))
            assert set(answers) <= {SUCCESS, OUT_OF_RESOURCES}
        site.alert("RescanStoreFailures")
        site.alert("RescanDiskLow")
        assert daemon.get("/livez")[0] == 200
        filler.unlink()
        for again in range(1, number + 1):
            site.push(f"full {again}")
        site.ready()
        until(lambda: site.finals() >= len(site.pushed), lambda: "\n".join(daemon.log.all[-20:]), 60)
        judged = {f["series_ref"]: f["instances"] for f in daemon.results() if f["final"] == "true"}
        assert len(judged) == len(site.pushed)
        assert set(judged.values()) == {str(len(head("before")))}
        assert not [f for f in map(fields, daemon.log.all) if f.get("event") == "quarantined"]
