"""TensorRT engines, built ahead of the first scan and kept under the GPU, the driver, TensorRT and the model they are for.

Written against the documentation of ONNX Runtime's TensorRT provider; see docs/benchmarks.md for what was run where.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from daemon.card import read_model
from daemon.engines import open_engine, tensorrt_folder
from daemon.student import default_cache


def command(args: argparse.Namespace) -> int:
    """`rescan-export tensorrt FILE`: build every bucket.

    Raises:
        EngineError: TensorRT cannot be used here.
    """
    model = read_model(args.file)
    root = args.cache or default_cache()
    folder = tensorrt_folder(root, model.sha256)
    engine = open_engine(model, "tensorrt", args.precision, 0, root, may_build=True)
    folder.mkdir(parents=True, exist_ok=True)
    for number, bucket in enumerate(model.card.buckets, 1):
        shape = "x".join(str(n) for n in bucket)
        print(f"[{number}/{len(model.card.buckets)}] {shape} in {args.precision}: building (minutes)", file=sys.stderr)
        start = time.perf_counter()
        engine.load(bucket)
        engine.run(np.zeros(bucket, dtype=np.float32))
        print(f"[{number}/{len(model.card.buckets)}] {shape}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for path in sorted(folder.glob("*.engine")):
        print(path)
    return 0
