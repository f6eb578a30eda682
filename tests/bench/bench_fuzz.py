"""Thousands of damaged series, each to its end. `python -m tests.bench.bench_fuzz [CASES]`; the first seed is printed."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.fuzzing import run_case


def main(cases: int = 5000, first: int = 0) -> int:
    """Run the cases, print what became of them and how long they took."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    started = time.perf_counter()
    for seed in range(first, first + cases):
        at = time.perf_counter()
        outcomes.update(run_case(seed))
        slowest = max(slowest, time.perf_counter() - at)
    seconds = time.perf_counter() - started
    print(
        f"fuzz: {cases} damaged series from seed {first}, {seconds:.0f} s, slowest {slowest:.2f} s, no crash, no hang"
    )
    for outcome, count in outcomes.most_common():
        print(f"  {count:6} {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
