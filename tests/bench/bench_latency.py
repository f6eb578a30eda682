"""How long a technologist waits: from the last instance to the verdict, for a 1 mm series pushed to a real daemon.

Also the memory of all processes together while scoring; whether it grows is `bench_memory.py`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from daemon.config import SHIPPED_MODEL
from tests.builders import build_classic_series, head_phantom
from tests.pushing import push
from tests.serving import Listener, Serving

ROUNDS = 5
EVIDENCE_S = 2.0
"""The quiet time that the evidence needs: a clean release, and 2 s without a new instance."""

CONFIG = "[completeness]\nquiet_provisional_s = 5.0\nquiet_final_s = 6.0\n"
MIB = 1 << 20


class Peak(threading.Thread):
    """Watches the resident memory of all processes of a daemon."""

    def __init__(self, daemon: Serving) -> None:
        super().__init__(daemon=True)
        self.daemon_served, self.peak, self.ended = daemon, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            self.peak = max(self.peak, sum(resident(self.daemon_served).values()))


def resident(daemon: Serving) -> dict[str, int]:
    """Name of a process -> resident bytes."""
    assert daemon.process is not None
    pids = {"main": daemon.process.pid, **daemon.children()}
    found = {}
    for name, pid in pids.items():
        try:
            found[name] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return found


def fine_head(seed: str) -> list[Dataset]:
    """A head at 1 mm: about 190 classic instances of 256 x 224."""
    coarse = head_phantom()
    fine = np.repeat(np.repeat(np.repeat(coarse, 2, axis=0), 2, axis=1), 2, axis=2)
    return build_classic_series(fine, (1.0, 1.0, 1.0), seed=seed)


def latencies(daemon: Serving) -> list[dict[str, float]]:
    """Timings of the provisional results of some 1 mm series."""
    found = []
    with Listener(daemon.ports["events"]).connected() as listener:
        for number in range(ROUNDS):
            push(daemon.ports["dicom"], fine_head(f"bench {number}"))
            listener.wait(lambda _t, _b, n=number: len(listener.scores(final=True)) > n)  # type: ignore[misc]
            first = [r for r in listener.scores() if r["revision"] == 1][-2:]
            found.append(min(first, key=lambda r: bool(r["final"]))["timing_s"])
    return found


def main() -> None:
    """Print the table."""
    if not SHIPPED_MODEL.is_file():
        print("latency: no student is in this checkout (daemon/models/student.onnx)", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder, Serving(Path(folder) / "state", config=CONFIG) as daemon:
        idle = sum(resident(daemon).values())
        watch = Peak(daemon)
        watch.start()
        rows = latencies(daemon)
        watch.ended.set()
        watch.join()
        beyond = [row["last_instance_to_verdict"] - EVIDENCE_S for row in rows]
        print(f"last instance to verdict, 1 mm series, {os.cpu_count()} processors, {ROUNDS} series, seconds")
        print(
            f"  beyond the {EVIDENCE_S:g} s of evidence: median {statistics.median(beyond):.2f}, most {max(beyond):.2f}"
        )
        for stage in ("assemble", "prepare", "infer", "score"):
            print(f"  {stage:9} median {statistics.median(row[stage] for row in rows):.2f}")
        print(f"memory of all processes, MiB: idle {idle // MIB}, peak while scoring {watch.peak // MIB}")


if __name__ == "__main__":
    main()
