"""kill -9 of each process at random moments: nothing acknowledged is lost, nothing is told twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom.sop_class import MRImageStorage

from daemon.spool import SpoolReader, StoredInstance
from tests.pushing import associate, head
from tests.serving import Serving, patience

SERIES = ("one", "two", "three")
KILLS = ("receiver", "scorer", "main", "reader", "main", "scorer", "receiver")


class Sender:
    """A scanner that sends again whatever was not answered with success."""

    def __init__(self, port: Callable[[], int], datasets: list[Dataset]) -> None:
        self.port, self.left, self.acknowledged = port, list(datasets), set[str]()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        deadline = time.monotonic() + patience(120)
        while self.left and time.monotonic() < deadline:
            association = associate(self.port(), [MRImageStorage], limit_s=10)
            while association.is_established and self.left:
                try:
                    status = association.send_c_store(self.left[0])
                except (RuntimeError, ValueError):
                    break
                if status.get("Status") != 0x0000:
                    break
                self.acknowledged.add(str(self.left.pop(0).SOPInstanceUID))
            if association.is_established:
                association.release()


def kill(daemon: Serving, name: str) -> None:
    """SIGKILL one process; the main one is started again, as a service manager would."""
    if name == "main":
        daemon.kill()
        daemon.start(ready=False)
        return
    pid = daemon.children().get(name)
    if pid is not None:
        start = len(daemon.log.all)
        os.kill(pid, signal.SIGKILL)
        daemon.log.wait(lambda f: f.get("event") == "process_ended" and f.get("process") == name, start=start)


def spooled(state: Path) -> set[str]:
    reader, position, found = SpoolReader(state / "spool"), 0, set()
    while records := reader.follow(position):
        position = records[-1].position
        found |= {r.sop_instance_uid for r in records if isinstance(r, StoredInstance)}
    reader.close()
    return found


def results(state: Path) -> list[dict[str, object]]:
    with sqlite3.connect(f"file:{state / 'ledger.db'}?mode=ro", uri=True) as db:
        found = [json.loads(row[0]) for row in db.execute("SELECT body FROM result ORDER BY number")]
    db.close()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # of the sender, where nobody listens
def test_nothing_is_lost_or_told_twice_when_processes_are_killed(tmp_path: Path, student: Path) -> None:
    """Every instance answered 0x0000 is in the spool; every series ends with exactly one final result per revision."""
    seed = int(os.environ.get("RESCAN_KILL_SEED", "20240607"))
    moments = random.Random(seed)
    datasets = {name: head(name) for name in SERIES}
    with Serving(tmp_path / "state", model=student) as daemon:
        senders = [Sender(lambda: daemon.ports["dicom"], each) for each in datasets.values()]
        for sender in senders:
            sender.thread.start()
        for name in KILLS:
            threading.Event().wait(moments.uniform(0.1, 1.5))
            kill(daemon, name)
        for sender in senders:
            sender.thread.join(patience(120))
            assert not sender.left, f"seed {seed}"
        acknowledged = set().union(*(sender.acknowledged for sender in senders))
        assert acknowledged <= spooled(daemon.state), f"seed {seed}"
        whole = {str(len(each)) for each in datasets.values()}
        daemon.log.until(lambda: len(complete(daemon.state, whole)) == len(SERIES), 120)
    told = results(tmp_path / "state")
    finals = Counter((r["stack_ref"], r["revision"]) for r in told if r["final"])
    assert set(finals.values()) == {1}, f"seed {seed}"
    assert {r["stack_ref"] for r in told} == complete(tmp_path / "state", whole)
    assert all(r["verdict"] != "PASS" or r["evidence"]["instances"] == len(datasets["one"]) for r in told if r["final"])  # type: ignore[index]


def complete(state: Path, whole: set[str]) -> set[object]:
    """Stacks whose newest result is final and holds every image."""
    newest = {r["stack_ref"]: r for r in results(state)}
    return {
        ref
        for ref, r in newest.items()
        if r["final"] and str(r["evidence"]["instances"]) in whole  # type: ignore[index]
    }
