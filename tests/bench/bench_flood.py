"""A T1 while 20,000 tiny images of an fMRI run pour in at a fixed rate: how much longer does its verdict take?

`RESCAN_BENCH_FLOOD` images (default 20,000) at `RESCAN_BENCH_RATE` per second (default 100), on an association of their own.
Goal: from the T1's last 0x0000 to its verdict at most 1.5 times the time without the flood, and no verdict waits for its end.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from daemon.config import SHIPPED_MODEL
from daemon.dicom_write import Plan
from daemon.send import Caller, Sent, store
from tests.builders import build_classic_series, head_phantom
from tests.pushing import push
from tests.serving import Listener, Serving
from tests.small_student import build_student

IMAGES = int(os.environ.get("RESCAN_BENCH_FLOOD", "20000"))
RATE = float(os.environ.get("RESCAN_BENCH_RATE", "100"))
ROUNDS = 5
SLICES = 40
CONFIG = "[completeness]\nquiet_provisional_s = 5.0\nquiet_final_s = 6.0\n"


class Flood(threading.Thread):
    """Sends an echo-planar run, slice by slice, volume by volume, at a fixed rate."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.caller, self.sent, self.stop = Caller("127.0.0.1", port, calling="FLOOD"), Sent(), threading.Event()
        small = np.random.default_rng(0).integers(0, 900, (16, 16, SLICES)).astype(np.uint16)
        self.slices = build_classic_series(
            small, (3.0, 3.0, 3.0), seed="flood", ScanningSequence=["EP", "GR"], EchoTime="30", ImagesInAcquisition=None
        )

    def run(self) -> None:
        association = self.caller.associate(self.slices)
        started = time.monotonic()
        for number in range(IMAGES):
            if self.stop.is_set():
                break
            store(association, self._image(number), self.sent)
            time.sleep(max(started + number / RATE - time.monotonic(), 0.0))
        association.release()

    def _image(self, number: int) -> Dataset:
        ds = self.slices[number % SLICES]
        ds.SOPInstanceUID = f"1.2.826.0.1.{number}"
        ds.InstanceNumber, ds.TemporalPositionIdentifier = str(number + 1), str(number // SLICES + 1)
        return ds


def waits(daemon: Serving, first: int) -> list[float]:
    """Seconds from the last 0x0000 to the first verdict of some T1 series, numbered from `first`."""
    found = []
    with Listener(daemon.ports["events"]).connected() as listener:
        for number in range(first, first + ROUNDS):
            push(
                daemon.ports["dicom"],
                build_classic_series(head_phantom(), plan=Plan(f"t1 {number}", series_number=number)),
            )
            answered = time.monotonic()
            listener.wait(lambda _t, body, n=number: _number(body) == n)  # type: ignore[misc]
            found.append(time.monotonic() - answered)
    return found


def _number(body: dict[str, Any]) -> int | None:
    """SeriesNumber of the series that a result is about."""
    number = body.get("data", {}).get("series", {}).get("number")
    return None if number is None else int(number)


def _daemon(folder: Path) -> Serving:
    """With the student that ships; in a checkout without one, a small stand-in, since what is measured is the way to it."""
    model = None if SHIPPED_MODEL.is_file() else build_student(folder / "small.onnx")
    return Serving(folder / "state", model=model, config=CONFIG)


def main() -> int:
    """Print both medians and their ratio."""
    with tempfile.TemporaryDirectory() as folder, _daemon(Path(folder)) as daemon:
        alone = statistics.median(waits(daemon, 100))
        flood = Flood(daemon.ports["dicom"])
        flood.start()
        flooded = statistics.median(waits(daemon, 200))
        during = flood.is_alive()
        flood.stop.set()
        flood.join(60)
    sent = sum(flood.sent.statuses.values())
    print(f"flood: {sent} images at {RATE:g} per second beside {ROUNDS} T1 series, {os.cpu_count()} processors")
    print(
        f"  last 0x0000 to verdict: alone {alone:.2f} s, flooded {flooded:.2f} s, ratio {flooded / alone:.2f} (goal 1.5)"
    )
    print(f"  the flood {'still ran' if during else 'had ended'} when the last verdict came")
    return 0


if __name__ == "__main__":
    sys.exit(main())
