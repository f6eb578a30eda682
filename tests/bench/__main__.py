"""Run every benchmark: `python -m tests.bench [NAME ...]`, where NAME is the part after `bench_`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def names() -> list[str]:
    """Every `bench_*.py` beside this file."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main(asked: list[str]) -> int:
    """Run those asked for, or all; each has a `main()` that prints its table."""
    unknown = [name for name in asked if name not in names()]
    if unknown:
        print(f"bench: no benchmark {unknown[0]!r}; there are {', '.join(names())}", file=sys.stderr)
        return 2
    for name in asked or names():
        importlib.import_module(f"tests.bench.bench_{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
