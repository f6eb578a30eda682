"""What SIGHUP may change is in force at once, and nothing of a refused file is."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.pushing import head, push
from tests.serving import QUICK, Serving

SCANNER = '[[scanners]]\nslug = "mr1"\nae_title = "SCANNER"\naddress = "127.0.0.1"\nalerts = "{}"\n'
STUDY = "1.2.826.0.1.3680043.10.99.1"


def reload(daemon: Serving, text: str) -> str:
    """Write the file, ask, and give the event that answers."""
    assert daemon.process is not None
    start = len(daemon.log.all)
    daemon.config.write_text(text, encoding="utf-8")
    daemon.process.send_signal(signal.SIGHUP)
    return daemon.log.wait(lambda f: f.get("event", "").startswith("reload"), start=start)["event"]


def judge(daemon: Serving, seed: str) -> dict[str, str]:
    """Push a head of one study, and its final result."""
    start = len(daemon.log.all)
    push(daemon.ports["dicom"], head(seed, StudyInstanceUID=STUDY))
    return daemon.wait_result(start=start)


def total(daemon: Serving, name: str) -> float:
    return sum(value for key, value in daemon.metrics().items() if key.startswith(f"{name}{{"))


def test_a_scanner_leaves_shadow_and_a_limit_changes_without_a_restart(tmp_path: Path, strict_student: Path) -> None:
    """In shadow nobody is alarmed; switched on, the first scan of the exam alarms and, with a limit of one, the second is held back."""
    shadow, on = (QUICK + SCANNER.format(word) for word in ("shadow", "on"))
    with Serving(tmp_path / "state", model=strict_student, config=shadow) as daemon:
        assert judge(daemon, "shadow")["verdict"] == "RESCAN"
        assert total(daemon, "rescan_alerts_total") == 0
        (daemon.state / "calibration.json").write_text("{", encoding="utf-8")
        assert reload(daemon, on) == "reload_refused"
        assert judge(daemon, "still shadow")["verdict"] == "RESCAN"
        assert total(daemon, "rescan_alerts_total") == 0
        (daemon.state / "calibration.json").unlink()
        assert reload(daemon, on + "[alerts]\nmax_per_exam = 1\n") == "reloaded"
        for seed in ("first", "second"):
            judge(daemon, seed)
        assert total(daemon, "rescan_alerts_total") == 1
        assert total(daemon, "rescan_alerts_suppressed_total") == 1
