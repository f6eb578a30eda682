"""What every test may ask for: real scans beside the checkout, a state folder, free ports; and why tests were skipped."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real scans that are not in the repository; `RESCAN_SHARED_DATA` names another folder."""

# Native libraries must not take each other's cores while a test measures time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if os.environ.get("RESCAN_TEST_WITHOUT_TORCH"):
    sys.modules["torch"] = None  # type: ignore[assignment]
_NO_TORCH = ("No module named 'torch'", "import of torch halted")
_NO_TORCH_REASON = "torch is not installed; `make test` installs it"


def _skip_without_torch(report: pytest.CollectReport | pytest.TestReport) -> None:
    """What failed only because torch is missing, directly or through `training` and `export`, was skipped."""
    if report.outcome == "failed" and any(text in str(report.longrepr) for text in _NO_TORCH):
        report.outcome = "skipped"
        report.longrepr = (str(report.nodeid), 0, f"Skipped: {_NO_TORCH_REASON}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Files that import torch."""
    report = yield
    _skip_without_torch(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests that import torch themselves."""
    report = yield
    _skip_without_torch(report)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that read real scans, so that `-m "not shared_data"` leaves them out."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared_data)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason why tests were skipped, so a green run cannot hide what it left out."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        longrepr = report.longrepr
        text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reasons[text.removeprefix("Skipped: ")] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"not run here: {count} x {reason}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans."""
    folder = Path(os.environ.get("RESCAN_SHARED_DATA") or SHARED_DATA)
    if not folder.is_dir():
        pytest.skip("real scans are not beside this checkout (RESCAN_SHARED_DATA)")
    return folder


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """An empty state folder for one daemon."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Ports that nobody listens on; all of one test differ. Prefer port 0 where the program under test takes it."""
    given: set[int] = set()

    def pick() -> int:
        while True:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = int(sock.getsockname()[1])
            if port not in given:
                given.add(port)
                return port

    return pick
