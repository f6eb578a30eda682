"""Inference on a GPU: parity, latency per stage, and the share of the card's ceiling, in one command.

    python tests/gpu/inference.py [MODEL] [--real SCAN ...] [--device cpu --bucket 16x16x16]

Rows: torch eager against ONNX Runtime with CUDA (and with TensorRT where its libraries are and its engines were built), in fp32,
tf32 and half precision. Goal: a verdict in under 150 ms from a volume in host memory on an H200-class card.
Without a GPU, `--device cpu` runs the same steps on the CPU with a small bucket; that is how the tests run it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon import engines
from daemon.card import ModelFile, read_model
from daemon.config import SHIPPED_MODEL
from daemon.engines import Engine, EngineError, OnnxRuntimeEngine, open_engine, processor_name
from daemon.golden import decode_volume
from daemon.judge import judge
from daemon.prepare import Prepared, prepare
from daemon.score import Reduced, reduce_maps, score_reduced
from daemon.student import default_cache
from export.interpret import TorchGraph
from export.parity import compare, prepared_cases, table, to_maps
from tests.bench.bench_infer import head_at_1mm

GOAL_MS = 150.0
TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one engine on one bucket; the median of the rounds.

    Attributes:
        copy_in, run, reduce, copy_out: stages; `copy_out` copies all maps and is not on the way to a verdict.
        verdict: from a prepared volume in host memory to a verdict.
        bytes_in, bytes_back: what crosses to the device and back on the way to a verdict.
    """

    engine: str
    bucket: tuple[int, int, int]
    copy_in: float
    run: float
    reduce: float
    copy_out: float
    verdict: float
    bytes_in: int
    bytes_back: int


def main(argv: list[str] | None = None) -> int:
    """Run everything and print it as Markdown."""
    args = parse(argv)
    model = read_model(args.model)
    cuda = args.device == "cuda"
    engines.CUDNN_CONV_SEARCH = args.search or engines.CUDNN_CONV_SEARCH
    if cuda and not torch.cuda.is_available():
        print("no CUDA device answers torch; give --device cpu to rehearse on the CPU", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if cuda else processor_name()
    print(f"## Inference on {name}, {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}\n")
    buckets = [tuple(map(int, b.split("x"))) for b in args.bucket] or list(model.card.buckets)
    failed = False
    if not args.no_parity:
        failed = parity(model, args.real, cuda)
    ceilings = {
        p: ceiling(p, args.device, args.matrix) for p in (("fp32", "tf32", "fp16", "bf16") if cuda else ("fp32",))
    }
    print("measured ceilings: " + ", ".join(f"{p} {v:.1f} TFLOP/s" for p, v in ceilings.items()) + "\n")
    rows = [row for bucket in buckets for row in latencies(model, bucket, args.device, args.rounds)]
    volume = head_at_1mm(model)
    prepare_ms = milliseconds(lambda: prepare(volume), 3)
    report(rows, model, ceilings, prepare_ms)
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="parity and latency of the student on a GPU")
    parser.add_argument("model", type=Path, nargs="?", default=SHIPPED_MODEL)
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="real scans for parity")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bucket", action="append", default=[], help="DxHxW; default: those of the model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--matrix", type=int, default=8192, help="size of the matrix product for the ceiling")
    parser.add_argument("--no-parity", action="store_true")
    parser.add_argument(
        "--search", choices=("HEURISTIC", "EXHAUSTIVE", "DEFAULT"), help="how cuDNN chooses convolutions"
    )
    return parser.parse_args(argv)


def parity(model: ModelFile, real: list[Path], cuda: bool) -> bool:
    """Maps, scores and verdicts against torch in float32; True where something failed."""
    cases = list(prepared_cases(model, real))
    rows = []
    for engine, precision in engines_for(cuda):
        try:
            rows += compare(model, engine, precision, cases)
        except EngineError as error:
            print(f"{engine} {precision}: not run: {error}")
    print("```\n" + table(rows) + "\n```\n")
    return any(not row.passed for row in rows)


def engines_for(cuda: bool) -> list[tuple[str, str]]:
    """Engines and precisions of this run."""
    if not cuda:
        return [("cpu", "fp32")]
    return [("cuda", "fp32"), ("cuda", "tf32"), ("tensorrt", "fp32"), ("tensorrt", "tf32"), ("tensorrt", "fp16")]


def latencies(model: ModelFile, bucket: Any, device: str, rounds: int) -> list[Latency]:
    """Every engine on one bucket."""
    head = made_to_fit(model, bucket)
    precisions = ("fp32", "tf32", "fp16", "bf16") if device == "cuda" else ("fp32",)
    rows = [torch_latency(model, head, precision, device, rounds) for precision in precisions]
    for engine, precision in engines_for(device == "cuda"):
        try:
            opened = open_engine(model, engine, precision, 0, default_cache())
            opened.load(bucket)
        except EngineError as error:
            print(f"{engine} {precision}: not run: {error}")
            continue
        for note in opened.notes:
            print(f"{engine} {precision}: {note}")
        rows.append(runtime_latency(model, head, opened, rounds))
    return rows


def made_to_fit(model: ModelFile, bucket: tuple[int, int, int]) -> Prepared:
    """The golden head, cut or padded to a bucket: only its size matters here."""
    prepared = prepare(decode_volume(model.golden))

    def fit(values: np.ndarray) -> np.ndarray:
        out = np.zeros(bucket, dtype=values.dtype)
        part = tuple(slice(0, min(a, b)) for a, b in zip(values.shape, bucket, strict=True))
        out[part] = values[part]
        return out

    masks = {name: fit(getattr(prepared, name)) for name in ("image", "native_mask", "head_mask")}
    return Prepared(**masks, affine=prepared.affine, box=prepared.box, scale=prepared.scale)


def runtime_latency(model: ModelFile, head: Prepared, engine: Engine, rounds: int) -> Latency:
    """ONNX Runtime, stage by stage."""
    assert isinstance(engine, OnnxRuntimeEngine)
    bound = engine._bound[head.image.shape]
    masks = np.stack([head.native_mask, head.head_mask]).astype(np.float32)
    sums = engine.reduce(head.image, masks, float("inf"))

    def verdict() -> None:
        found = engine.reduce(head.image, masks, float("inf"))
        reduced = Reduced.from_sums(found) if found is not None else reduce_maps(to_maps(engine.run(head.image)), head)
        judge(score_reduced(reduced, head, model.card), model.card)

    return Latency(
        f"{engine.facts.provider} {engine.facts.precision}",
        head.image.shape,
        copy_in=milliseconds(lambda: bound.copy_in(head.image), rounds),
        run=milliseconds(bound.infer, rounds),
        reduce=milliseconds(lambda: bound.sums(masks, float("inf")), rounds) if sums is not None else float("nan"),
        copy_out=milliseconds(bound.copy_out, rounds),
        verdict=milliseconds(verdict, rounds),
        bytes_in=head.image.nbytes + (masks.nbytes if sums is not None else 0),
        bytes_back=sum(v.nbytes for v in sums.values()) if sums is not None else 8 * head.image.nbytes,
    )


def torch_latency(model: ModelFile, head: Prepared, precision: str, device: str, rounds: int) -> Latency:
    """Torch in eager mode; maps come back to the host to be reduced."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    graph = TorchGraph(model.data, TORCH_DTYPES[precision], channels_last=True, device=device)
    x = torch.from_numpy(head.image)[None, None]
    on_device = x.to(device)
    out = graph.forward(on_device)

    def wait(value: object) -> object:
        if device == "cuda":
            torch.cuda.synchronize()
        return value

    def back() -> dict[str, np.ndarray]:
        return {k: v[0].float().cpu().numpy() for k, v in graph.forward(x.to(device)).items()}

    return Latency(
        f"torch eager {precision}",
        head.image.shape,
        copy_in=milliseconds(lambda: wait(x.to(device)), rounds),
        run=milliseconds(lambda: wait(graph.forward(on_device)), rounds),
        reduce=float("nan"),
        copy_out=milliseconds(lambda: [v.cpu() for v in out.values()], rounds),
        verdict=milliseconds(
            lambda: judge(score_reduced(reduce_maps(to_maps(back()), head), head, model.card), model.card), rounds
        ),
        bytes_in=head.image.nbytes,
        bytes_back=7 * head.image.nbytes,
    )


def ceiling(precision: str, device: str, size: int) -> float:
    """TFLOP/s of a large matrix product on this device."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a = torch.rand((size, size), device=device, dtype=TORCH_DTYPES[precision])

    def product() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    return 2e-12 * size**3 / (milliseconds(product, 5) / 1000)


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median over the rounds, after two runs that do not count."""
    for _ in range(2):
        run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def report(rows: list[Latency], model: ModelFile, ceilings: dict[str, float], prepare_ms: float) -> None:
    """The table, with the FLOPs and bytes of each bucket and the share of the ceiling."""
    print(
        "| engine | bucket | copy in | run | reduce | copy out | verdict ms | KiB in | KiB back | TFLOP/s | of ceiling |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        shape = "x".join(map(str, r.bucket))
        scale = np.prod(r.bucket) / np.prod(model.card.buckets[0])
        gflop = model.card.gigaflops.get(shape, next(iter(model.card.gigaflops.values())) * scale)
        rate = gflop / r.run
        share = rate / ceilings.get(r.engine.split()[-1], float("nan"))
        reduced = f"{r.reduce:.2f}" if r.reduce == r.reduce else "on the host"
        print(
            f"| {r.engine} | {shape} ({gflop:.1f} GFLOP) | {r.copy_in:.2f} | {r.run:.2f} | {reduced} | {r.copy_out:.2f} | {r.verdict:.2f} "
            f"| {r.bytes_in / 1024:.0f} | {r.bytes_back / 1024:.1f} | {rate:.3f} | {100 * share:.0f} % |"
        )
    best = min(r.verdict for r in rows)
    print(f"\npreparation of a 1 mm head on the CPU: {prepare_ms:.1f} ms")
    print(
        f"goal on an H200-class card: a verdict in under {GOAL_MS:.0f} ms from a volume; best here {prepare_ms + best:.1f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
