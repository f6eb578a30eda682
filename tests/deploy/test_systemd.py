"""The unit, judged by systemd itself, and what the daemon tells the service manager."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from daemon.config import SHIPPED_MODEL, DicomSettings
from tests.conftest import ROOT
from tests.deploy.watching import until
from tests.pushing import head, push
from tests.serving import QUICK, Serving, patience

UNIT = ROOT / "deploy" / "systemd" / "rescan.service"
GPU = UNIT.parent / "rescan.service.d" / "gpu.conf"
MOST_EXPOSED = 3.0


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed (Debian package systemd)")
    return found


@pytest.fixture(params=["cpu", "gpu"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit with a program that exists on this machine, and with its drop-in for a GPU."""
    text = UNIT.read_text(encoding="utf-8")
    text, count = re.subn(r"^ExecStart=/opt/rescan/bin/rescan\b", "ExecStart=/bin/true", text, flags=re.MULTILINE)
    assert count == 1
    file = tmp_path / "rescan.service"
    file.write_text(text, encoding="utf-8")
    if request.param == "gpu":
        (tmp_path / "rescan.service.d").mkdir()
        shutil.copy(GPU, tmp_path / "rescan.service.d")
    return file


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=patience(60))


def test_systemd_has_nothing_to_say_against_it(analyze: str, unit: Path) -> None:
    """`systemd-analyze verify` is silent about the unit."""
    done = run(analyze, "verify", "--man=no", "--recursive-errors=no", unit)
    assert done.returncode == 0, done.stderr
    assert "rescan" not in done.stderr


def test_it_is_hardly_exposed(analyze: str, unit: Path) -> None:
    """`systemd-analyze security --offline=yes` rates the unit below 3.0, also with a GPU."""
    done = run(analyze, "security", "--offline=yes", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager", unit)
    found = re.search(r"exposure level for rescan\.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    print(f"exposure {found[1]}")
    assert float(found[1]) < MOST_EXPOSED
    assert done.returncode == 0


def test_the_unit_fits_the_program() -> None:
    """Type, watchdog and limits are those that the daemon's own waits need."""
    from daemon.app import STOP_LIMIT_S
    from daemon.ledger_file import BUSY_S

    text = UNIT.read_text(encoding="utf-8")
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert facts["Type"] == "notify"
    assert float(facts["WatchdogSec"]) > 3 * BUSY_S
    assert float(facts["TimeoutStopSec"]) > sum(STOP_LIMIT_S.values())
    assert int(facts["LimitNOFILE"]) > 10 * DicomSettings().max_associations
    assert DicomSettings().port >= 1024


def test_the_manager_hears_ready_then_signs_of_life_then_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY comes when scanners can send, also where the model cannot be served; a daemon that receives is not started again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(patience(60))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with Serving(tmp_path / "state", model=tmp_path / "absent.onnx").start(ready=False) as daemon:
            heard: list[str] = []
            while not {"READY=1", "WATCHDOG=1"} <= {line for each in heard for line in each.splitlines()} or not any(
                "absent.onnx" in each for each in heard
            ):
                heard.append(manager.recv(4096).decode())
            assert daemon.get("/readyz")[0] == 503
            daemon.stop()
        while "STOPPING=1" not in heard[-1]:
            heard.append(manager.recv(4096).decode())


ONLY_AS_ROOT = {"fchown"}
"""SQLite gives its journal to the owner of the database where it runs as root, as tests may; the service does not."""


def calls_of(analyze: str, group: str) -> set[str]:
    """The system calls of a group, those of the groups within it too."""
    found: set[str] = set()
    for line in run(analyze, "syscall-filter", "--no-pager", group).stdout.splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= calls_of(analyze, word) if word.startswith("@") else {word}
    return found


@pytest.mark.slow
def test_the_filter_of_system_calls_lets_a_whole_run_through(analyze: str, tmp_path: Path) -> None:
    """Start, reception, inference, page, metrics and stop of the real engine make no call that the unit forbids."""
    if shutil.which("strace") is None or not SHIPPED_MODEL.is_file():
        pytest.skip("strace is not installed (Debian package strace), or no student ships with this checkout")
    filters = re.findall(r"^SystemCallFilter=(\S+)$", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert filters == ["@system-service", "~@privileged"]
    allowed = calls_of(analyze, "@system-service") - calls_of(analyze, "@privileged")
    counts = tmp_path / "calls"
    daemon = Serving(tmp_path / "state", config=QUICK)
    daemon.prefix = ("strace", "-D", "-f", "-qq", "-c", "-o", str(counts))
    with daemon.start():
        push(daemon.ports["dicom"], head("calls"))
        daemon.wait_result()
        daemon.get("/api/state")
        daemon.metrics()
    until(lambda: counts.is_file() and counts.read_text().rstrip().endswith("total"), lambda: "strace wrote no summary")
    used = {line.split()[-1] for line in counts.read_text().splitlines()[2:]} - {"total"}
    used = {name for name in used if not name.startswith("-")}
    assert len(used) > 40
    assert used - allowed - ONLY_AS_ROOT == set()
