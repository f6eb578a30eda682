"""How long a technologist waits: from the last instance to the verdict, for a 1 mm series pushed to a real daemon.

Also the memory of all processes together while scoring, and whether it grows: `python -m tests.bench latency` pushes
`RESCAN_BENCH_SERIES` small series (default 40; 200 for the figure in the documentation) and compares the resident memory
after the last with that after the first tenth.
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


def growth(daemon: Serving, series: int) -> tuple[dict[str, int], dict[str, int]]:
    """Resident memory after a tenth of many small series, and after all."""
    early: dict[str, int] = {}
    with Listener(daemon.ports["events"]).connected() as listener:
        for number in range(series):
            push(daemon.ports["dicom"], build_classic_series(head_phantom(), seed=f"small {number}"))
            listener.wait(lambda _t, _b, n=number: len(listener.scores(final=True)) > n)  # type: ignore[misc]
            if number + 1 == max(series // 10, 1):
                early = resident(daemon)
    return early, resident(daemon)


def main() -> None:
    """Print both tables."""
    if not SHIPPED_MODEL.is_file():
        print("latency: no student is in this checkout (daemon/models/student.onnx)", file=sys.stderr)
        return
    series = int(os.environ.get("RESCAN_BENCH_SERIES", "40"))
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
    with tempfile.TemporaryDirectory() as folder:
        quick = "[completeness]\nquiet_provisional_s = 0.5\nquiet_final_s = 0.6\n"
        with Serving(Path(folder) / "state", config=quick) as daemon:
            early, late = growth(daemon, series)
    print(f"memory after {max(series // 10, 1)} and after {series} series, MiB")
    for name in late:
        print(f"  {name:9} {early[name] // MIB:5} {late[name] // MIB:5}  {late[name] / early[name]:.3f}")
    total = sum(late.values()) / sum(early.values())
    print(f"  {'all':9} {sum(early.values()) // MIB:5} {sum(late.values()) // MIB:5}  {total:.3f}")


if __name__ == "__main__":
    main()
