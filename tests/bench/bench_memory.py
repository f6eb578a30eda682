"""Does memory grow with the number of series? Many small series through a real daemon, and what each process holds.

`RESCAN_BENCH_SERIES` series (default 200) of 96 images at 2 mm, each with UIDs of its own; resident memory after a tenth of them and
after all, once their last verdict is final. Goal: the second within 5 % of the first.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from daemon.config import SHIPPED_MODEL
from tests.bench.bench_latency import MIB, resident
from tests.builders import build_classic_series, head_phantom
from tests.pushing import push
from tests.serving import Listener, Serving
from tests.small_student import build_student

SERIES = int(os.environ.get("RESCAN_BENCH_SERIES", "200"))
QUICK = "[completeness]\nquiet_provisional_s = 0.5\nquiet_final_s = 1.0\n"
LIMIT_S = 1800.0


def push_series(daemon: Serving, listener: Listener, first: int, last: int) -> None:
    """Send series numbered from `first` to before `last`; return when all have their final verdict."""
    for number in range(first, last):
        push(daemon.ports["dicom"], build_classic_series(head_phantom(), seed=f"small {number}"))
    listener.wait(lambda _t, _b: len(listener.scores(final=True)) >= last, LIMIT_S)


def main() -> int:
    """Print what each process holds, early and late."""
    early_count = max(SERIES // 10, 1)
    with tempfile.TemporaryDirectory() as folder:
        model = None if SHIPPED_MODEL.is_file() else build_student(Path(folder) / "small.onnx")
        with (
            Serving(Path(folder) / "state", model=model, config=QUICK) as daemon,
            Listener(daemon.ports["events"]).connected() as listener,
        ):
            push_series(daemon, listener, 0, early_count)
            early = resident(daemon)
            push_series(daemon, listener, early_count, SERIES)
            late = resident(daemon)
    print(f"resident memory after {early_count} and after {SERIES} series of 96 images, MiB")
    for name in late:
        print(f"  {name:9} {early[name] / MIB:7.1f} {late[name] / MIB:7.1f}  {late[name] / early[name]:.3f}")
    total, before = sum(late.values()), sum(early.values())
    print(f"  {'all':9} {before / MIB:7.1f} {total / MIB:7.1f}  {total / before:.3f} (goal 1.05)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
