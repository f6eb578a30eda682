"""Inference on the CPU: every engine side by side in one run, beside the machine's own ceiling.

    python -m tests.bench infer

Goal for the shipped student on a whole head at its working resolution, two cores: at most 2.5 s, and at least three times
faster than torch in eager mode.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from daemon.card import ModelFile, read_model
from daemon.config import SHIPPED_MODEL
from daemon.engines import EngineError, open_engine, thread_count
from daemon.golden import decode_volume
from daemon.prepare import Prepared, prepare
from daemon.score import reduce_maps, score_reduced
from daemon.student import Student
from daemon.words import Volume

ROUNDS = 5
SERIES = 200
WARM_SERIES = 20
GOAL_S = 2.5
GOAL_RATIO = 3.0
ENGINES = (("cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
MATRIX = 2048


def main() -> None:
    """Print the tables."""
    if len(sys.argv) > 2 and sys.argv[1] == "--child":
        print(json.dumps(memory_of(Path(sys.argv[2]), *sys.argv[3:5])))
        return
    path, what = model_path()
    model = read_model(path)
    threads = thread_count(0)
    bucket = model.card.buckets[0]
    gflop = model.card.gigaflops["x".join(map(str, bucket))]
    print(f"## Inference, {what}: {model.card.weights} weights, {gflop:.1f} GFLOP at {bucket}, {threads} threads")
    print(f"load average {os.getloadavg()[0]:.1f} before the run; median of {ROUNDS} interleaved rounds\n")
    runs = engines(model, bucket)
    seconds = interleaved(runs)
    ceilings = ceiling_gflops()
    print(
        f"measured ceilings (matrix product of {MATRIX}): "
        + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in ceilings.items())
    )
    print_table(seconds, gflop, ceilings, path)
    stages(model)
    flat(model)


def model_path() -> tuple[Path, str]:
    """The shipped student, or one of the same size with random weights."""
    if SHIPPED_MODEL.is_file():
        return SHIPPED_MODEL, "the shipped student"
    from export.golden import formula_head
    from export.graph import random_student
    from export.onnx import Facts, export_student

    path = Path(tempfile.mkdtemp()) / "random.onnx"
    export_student(random_student((16, 24, 32, 64, 64)), path, Facts(), formula_head())
    return path, "random weights (no student ships yet)"


def engines(model: ModelFile, bucket: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """Name -> one run on the same image, warmed."""
    image = np.random.default_rng(0).random(bucket, dtype=np.float32)
    runs: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("torch") is not None:
        import torch

        from export.interpret import TorchGraph

        torch.set_num_threads(thread_count(0))
        eager, last, half = (
            TorchGraph(model.data),
            TorchGraph(model.data, channels_last=True),
            TorchGraph(model.data, torch.bfloat16, channels_last=True),
        )
        runs["torch eager fp32"] = lambda: eager.run(image)
        runs["torch fp32 channels last"] = lambda: last.run(image)
        runs["torch bf16 channels last"] = lambda: half.run(image)
    else:
        print("torch is not installed: its rows are left out")
    for name, precision in ENGINES:
        try:
            engine = open_engine(model, name, precision, 0)
        except EngineError as error:
            print(f"{name} {precision}: left out: {error}")
            continue
        engine.load(bucket)
        runs[f"{name} {precision}"] = lambda engine=engine: engine.run(image)  # type: ignore[misc]
    for run in runs.values():
        run()
    return runs


def interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a noisy minute hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ceiling_gflops() -> dict[str, float]:
    """What a large matrix product reaches here: fp32 by NumPy, bf16 by torch where it is installed."""
    a = np.random.default_rng(0).random((MATRIX, MATRIX), dtype=np.float32)
    found = {"fp32": 2e-9 * MATRIX**3 / best_of(lambda: a @ a)}
    if importlib.util.find_spec("torch") is not None:
        import torch

        single = torch.from_numpy(a)
        half = single.bfloat16()
        found["fp32"] = max(found["fp32"], 2e-9 * MATRIX**3 / best_of(lambda: single @ single))
        found["bf16"] = 2e-9 * MATRIX**3 / best_of(lambda: half @ half)
    return found


def best_of(run: Callable[[], object], times: int = 5) -> float:
    """Shortest of several runs, in seconds."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def print_table(seconds: dict[str, float], gflop: float, ceilings: dict[str, float], path: Path) -> None:
    """One row per engine; peak memory from a process of its own."""
    eager = seconds.get("torch eager fp32")
    print("\n| engine | s | GFLOP/s | share of ceiling | times torch eager | peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, value in seconds.items():
        precision = "bf16" if "bf16" in name else "fp32"
        share = f"{100 * gflop / value / ceilings[precision]:.0f} %" if precision in ceilings else "-"
        ratio = f"{eager / value:.1f}" if eager else "-"
        memory = "-" if name.startswith("torch") else f"{child_memory(path, *name.split()):.0f}"
        print(f"| {name} | {value:.3f} | {gflop / value:.0f} | {share} | {ratio} | {memory} |")
    best = min((v for k, v in seconds.items() if not k.startswith("torch")), default=float("inf"))
    reached = best <= GOAL_S and (eager is None or eager / best >= GOAL_RATIO)
    print(
        f"\ngoal: at most {GOAL_S} s and {GOAL_RATIO:.0f} times torch eager: {'reached' if reached else 'NOT reached'}"
    )


def child_memory(path: Path, engine: str, precision: str) -> float:
    """Peak resident MiB of a process that opens one engine and runs every bucket."""
    command = [sys.executable, "-m", "tests.bench.bench_infer", "--child", str(path), engine, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def memory_of(path: Path, engine: str, precision: str) -> dict[str, float]:
    """Peak of this process after one run of every bucket."""
    model = read_model(path)
    opened = open_engine(model, engine, precision, 0)
    for bucket in model.card.buckets:
        opened.load(bucket)
        opened.run(np.zeros(bucket, dtype=np.float32))
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def head_at_1mm(model: ModelFile) -> Volume:
    """The golden head on a 1 mm grid: what a scanner sends."""
    golden = decode_volume(model.golden)
    voxels = golden.voxels.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine = golden.affine.copy()
    affine[:3, :3] /= 2.0
    affine[:3, 3] -= 0.5
    return Volume(voxels, affine)


def stages(model: ModelFile) -> None:
    """Volume in memory to scores, stage by stage, on the engine that `auto` would take in float32."""
    volume = head_at_1mm(model)
    student = Student(model, open_engine(model, "openvino", "fp32", 0))
    prepared = prepare(volume)
    student.load(_bucket(prepared))
    maps = student.run(prepared)
    reduced = reduce_maps(maps, prepared)
    rows = {
        f"prepare {volume.voxels.shape}": best_of(lambda: prepare(volume), 3),
        "infer (openvino fp32, maps copied)": best_of(lambda: student.run(prepared), 3),
        "reduce maps": best_of(lambda: reduce_maps(maps, prepared), 3),
        "score": best_of(lambda: score_reduced(reduced, prepared, model.card), 3),
    }
    print("\n| stage | s |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.3f} |")


def flat(model: ModelFile) -> None:
    """Resident memory after many series over that after a few."""
    student = Student(model, open_engine(model, "openvino", "fp32", 0))
    prepared = prepare(decode_volume(model.golden))
    student.load(_bucket(prepared))
    early = 0.0
    for number in range(1, SERIES + 1):
        student.score(replace(prepared, image=prepared.image * np.float32(1 + number % 3)))
        if number == WARM_SERIES:
            early = resident_mib()
    late = resident_mib()
    print(
        f"\nresident after {WARM_SERIES} series {early:.0f} MiB, after {SERIES} {late:.0f} MiB ({100 * late / early - 100:+.1f} %)"
    )


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _bucket(prepared: Prepared) -> tuple[int, int, int]:
    return (prepared.image.shape[0], prepared.image.shape[1], prepared.image.shape[2])


if __name__ == "__main__":
    main()
