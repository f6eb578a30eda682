"""Child processes: they answer, die with their parent, and are started again after a wait."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from daemon.child import Child
from daemon.config import Settings, load
from daemon.spool import SpoolWriter, StoredInstance
from tests.serving import patience

LIMIT_S = patience(30.0)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(None, {"state": tmp_path}).settings


@pytest.fixture
def reader(settings: Settings) -> Iterator[Child]:
    child = Child("reader", settings)
    child.start()
    yield child
    child.end(limit_s=5)


def ended(pid: int) -> bool:
    """Wait until a process that is not ours has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], LIMIT_S)[0])
    finally:
        os.close(descriptor)


def test_the_reader_answers_every_instance_in_order(settings: Settings, reader: Child) -> None:
    """What cannot be read is answered with a refusal, not with silence."""
    with_spool = SpoolWriter(settings.state / "spool", 1 << 30, 0, segment_bytes=1 << 20)
    stored = [
        with_spool.append_instance(
            b"not DICOM %d" % n,
            sop_class_uid="1.2",
            sop_instance_uid=f"1.2.{n}",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            scanner="unknown",
            association=1,
        )[0]
        for n in range(3)
    ]
    reader.send({"kind": "read", "instances": stored})
    answers: list[dict[str, object]] = []
    while len(answers) < 3:
        assert wait([reader.control], LIMIT_S)
        answers += reader.receive()
    assert [a["position"] for a in answers] == [s.position for s in stored]
    assert all(a["header"].code == "bad_header" for a in answers)  # type: ignore[attr-defined]
    with_spool.close()


def test_a_killed_child_is_due_again_later_each_time(reader: Child) -> None:
    """Death is an end of file; the wait before the next start grows."""
    waits = []
    for _ in range(2):
        assert reader.process is not None
        reader.process.send_signal(signal.SIGKILL)
        assert wait([reader.control], LIMIT_S)
        with pytest.raises(EOFError):
            reader.receive()
        assert reader.lost() == -signal.SIGKILL
        waits.append(reader.wait_s)
        assert reader.due is not None
        reader.start()
    assert waits[1] > waits[0]
    assert reader.restarts == 2


def test_a_child_stops_when_told(reader: Child) -> None:
    """Exit status 0, without a signal."""
    assert reader.end(limit_s=LIMIT_S) == 0


def test_a_child_does_not_stop_at_the_signals_of_the_terminal(reader: Child, settings: Settings) -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group; the main process alone decides."""
    assert reader.process is not None
    lost = StoredInstance(1, 1, 4096, 10, "0" * 64, "1.2", "1.2.3", "1.2.840.10008.1.2.1", "unknown", 1, 0.0)
    for _ in range(2):
        reader.send({"kind": "read", "instances": [lost]})
        assert wait([reader.control], LIMIT_S)
        (answer,) = reader.receive()
        assert answer["header"].code == "bad_header"
        reader.process.send_signal(signal.SIGINT)
        reader.process.send_signal(signal.SIGTERM)


def test_children_die_with_the_main_process(tmp_path: Path) -> None:
    """SIGKILL of the parent leaves no orphan behind."""
    code = (
        "import sys, time; from pathlib import Path; from daemon.child import Child; from daemon.config import load\n"
        "child = Child('reader', load(None, {'state': Path(sys.argv[1])}).settings); child.start()\n"
        "print(child.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        parent.kill()
    parent.wait()
    assert ended(pid)
