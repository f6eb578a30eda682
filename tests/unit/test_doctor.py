"""What `rescan doctor` finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon import doctor
from daemon.config import Settings, load
from daemon.doctor import State, runtimes


def test_two_runtimes_in_one_folder_are_a_failure() -> None:
    """The variants of ONNX Runtime overwrite each other; the remedy names both."""
    found = runtimes(["onnxruntime 1.31.1", "onnxruntime-gpu 1.31.1"])
    assert found.state is State.FAILED
    assert "pip uninstall onnxruntime onnxruntime-gpu" in found.remedy


def test_no_runtime_is_a_failure_with_the_extra_to_install() -> None:
    """Nothing installed: name the extra."""
    assert "rescan[cpu]" in runtimes([]).remedy


def test_this_environment_has_exactly_one_runtime() -> None:
    """The environment that the tests run in is a sound one."""
    assert runtimes(doctor.installed()).state is State.OK


def test_a_missing_model_is_told_with_its_remedy(tmp_path: Path) -> None:
    """The file that is not there is named."""
    settings = load(None, {"model.file": tmp_path / "absent.onnx"}).settings
    (found,) = doctor._engine(settings)
    assert found.state is State.FAILED
    assert "absent.onnx" in found.found


def test_a_state_folder_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    """The remedy is a command."""
    tmp_path.chmod(0o755)
    found = doctor._state_folder(tmp_path)
    assert (found.state, found.remedy) == (State.WARNING, f"chmod 700 {tmp_path}")


def test_a_clock_that_was_never_set_is_a_failure() -> None:
    """1970 is before this file was written."""
    assert doctor._clock(0.0).state is State.FAILED


def test_a_small_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than the reserve: C-STORE would be refused."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    settings = load(None, {"state": tmp_path}).settings
    found = doctor._disk(settings)
    assert found.state is State.FAILED
    assert "0xA700" in found.remedy


def test_a_port_in_use_is_a_warning_where_something_answers() -> None:
    """It may be the daemon itself."""
    from daemon.web import listen

    with listen("127.0.0.1", 0) as taken:
        assert doctor._port("dicom", "127.0.0.1", taken.getsockname()[1]).state is State.WARNING
    assert doctor._port("dicom", "192.0.2.1", 11112).state is State.FAILED


def test_every_failure_has_a_remedy() -> None:
    """Nothing is reported without what to do."""
    for finding in [*doctor._ports(Settings()), doctor._memory(), doctor._descriptors()]:
        assert finding.state is State.OK or finding.remedy
