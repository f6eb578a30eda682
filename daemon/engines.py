"""What can run the student's graph: ONNX Runtime (TensorRT, CUDA, CPU) and the OpenVINO runtime.

An engine is anything with the methods of `Engine`: it takes the prepared image and gives tensors back by the names of the
card. Nothing in it supposes that the graph runs in this process, so an engine that speaks the Open Inference Protocol v2
(tensors by name, shape and datatype over HTTP or gRPC) fits the same interface.

The precision is always set explicitly: OpenVINO takes bfloat16 by itself where the processor has it, and CUDA takes TF32.
No engine falls back to another: what cannot run where it was asked to run is an error.
"""

from __future__ import annotations

import base64
import ctypes
import io
import os
import re
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from daemon.card import ModelFile
from daemon.words import Array

Bucket = tuple[int, int, int]

PRECISIONS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("fp32", "tf32", "fp16", "bf16"),
    "cuda": ("fp32", "tf32"),
    "openvino": ("fp32", "bf16"),
    "cpu": ("fp32",),
}
"""Engines, best first, and the precisions each can be told to use."""

OUTPUTS = ("gm_probability", "task_variance", "artefact_variance")

MEMORY_FACTOR = {"cpu": 2.0, "openvino": 1.6, "cuda": 2.0, "tensorrt": 2.0}
"""Measured peak over the live activations in float32 (docs/benchmarks.md); the rest is workspace and reordered copies."""


CUDNN_CONV_SEARCH = "HEURISTIC"
"""How cuDNN chooses its 3-D convolutions; tests/gpu/inference.py compares EXHAUSTIVE and DEFAULT (onnxruntime issue 12880)."""


class EngineError(Exception):
    """An engine that cannot be used as asked; one line, with the remedy. The daemon stays up and is not ready."""


class EngineMissing(EngineError):
    """A library or a device is not there: install it, or choose another engine."""


class PrecisionRefused(EngineError):
    """A precision that the engine does not have or that parity has not admitted for this model."""


class MemoryShort(EngineError):
    """A bucket does not fit the memory: free some, or raise the limit."""


class EngineFailed(EngineError):
    """The engine was there and failed."""


@dataclass(frozen=True)
class EngineFacts:
    """What every result says about the engine.

    Attributes:
        provider: `tensorrt`, `cuda`, `openvino` or `cpu`.
        runtime: library and version.
        precision: `fp32`, `tf32`, `fp16` or `bf16`.
        device: processor or GPU.
        tiles: 1 where the whole head runs in one pass.
    """

    provider: str
    runtime: str
    precision: str
    device: str
    tiles: int = 1


class Engine(Protocol):
    """One way to run the graph. Tensors go in and come out by the names of the card."""

    facts: EngineFacts
    notes: list[str]
    """What an operator should know of this engine, one line each."""

    def load(self, bucket: Bucket) -> None:
        """Compile for one input shape and bind its buffers; done before the first series, never while one waits."""

    def run(self, image: Array) -> dict[str, Array]:
        """Run one image of a loaded bucket, (D, H, W) float32 C-contiguous.

        Returns:
            Output name -> (channels, D, H, W) float32; valid until the next call.
        """

    def reduce(self, image: Array, masks: NDArray[np.float32], affected_variance: float) -> dict[str, Array] | None:
        """Run one image and give back only the sums of its maps, computed where the maps are; None: not offered."""


def thread_count(wanted: int) -> int:
    """Threads to compute with: as set, else the cores this process may use."""
    return wanted if wanted > 0 else len(os.sched_getaffinity(0))


def processor_name() -> str:
    """Model of the processor from /proc/cpuinfo, else the architecture."""
    lines = _read_text(Path("/proc/cpuinfo")).splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def available_memory_bytes() -> int:
    """Memory that this process may still take: of the machine, or of its control group where that is less."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if ":" in line
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return free if limit == "max" else min(free, int(limit) - used)
    except (OSError, ValueError):
        return free


def gpu_free_bytes() -> int | None:
    """Free memory of the first GPU as its driver tells; None where the driver's library is not there.

    Source: NVIDIA Management Library, nvmlDeviceGetMemoryInfo: total, free, used, each 64 bits.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    return None if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) else int(memory[1])


def memory_needed_bytes(model: ModelFile, bucket: Bucket, engine: str, precision: str) -> int:
    """Memory that a bucket takes beside the weights: live activations times what was measured for the engine."""
    size = 2 if precision in ("bf16", "fp16") else 4
    voxels = float(np.prod(bucket))
    activations = model.card.activation_bytes_per_voxel * voxels * size / 4.0
    weights = model.card.weights * size
    maps = voxels * 4 * 8
    return int(MEMORY_FACTOR[engine] * activations + 2 * weights + maps)


def open_engine(
    model: ModelFile, engine: str, precision: str, threads: int, cache: Path | None = None, *, may_build: bool = False
) -> Engine:
    """Open one engine; nothing is compiled yet.

    Args:
        model: the model file.
        engine: a key of `PRECISIONS`.
        precision: one of its precisions.
        threads: for engines on the CPU, 0 takes the cores this process may use.
        cache: folder under which TensorRT engines were built ahead.
        may_build: build a TensorRT engine that is not there (minutes); False refuses instead.

    Raises:
        EngineMissing: its library or device is not there.
        PrecisionRefused: it does not have this precision, on this machine.
    """
    if engine not in PRECISIONS:
        raise EngineMissing(f"engine: got {engine!r}; choose one of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[engine]:
        raise PrecisionRefused(
            f"precision: {engine} has {', '.join(PRECISIONS[engine])}, got {precision!r}; set another"
        )
    if engine == "openvino":
        return OpenVinoEngine(model, precision, thread_count(threads))
    folder = tensorrt_folder(cache, model.sha256) if cache is not None and engine == "tensorrt" else None
    return OnnxRuntimeEngine(model, engine, precision, thread_count(threads), folder, may_build=may_build)


class OpenVinoEngine:
    """The OpenVINO runtime on the CPU; one compiled graph and one request per bucket."""

    def __init__(self, model: ModelFile, precision: str, threads: int) -> None:
        """Open the runtime.

        Raises:
            EngineMissing: the package is not installed.
            PrecisionRefused: bf16 on a processor without it (OpenVINO would emulate it, slowly).
        """
        self._ov = _import_openvino()
        self._core = self._ov.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in capabilities:
            raise PrecisionRefused("precision: this processor has no bfloat16 instructions; set fp32")
        self._model, self._threads, self._precision = model, threads, precision
        self._requests: dict[Bucket, tuple[Any, Array]] = {}
        self.notes: list[str] = []
        version = self._ov.__version__.split("-")[0]
        self.facts = EngineFacts("openvino", f"OpenVINO {version}", precision, processor_name())

    def load(self, bucket: Bucket) -> None:
        """Compile the graph for one shape; buffers are bound to the request once."""
        hint = {"fp32": "f32", "bf16": "bf16"}[self._precision]
        config = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "CPU_DENORMALS_OPTIMIZATION": True,
        }
        try:
            graph = self._core.read_model(io.BytesIO(self._model.data))
            graph.reshape({self._model.card.input_name: [1, 1, *bucket]})
            compiled = self._core.compile_model(graph, "CPU", config)
            used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            request = compiled.create_infer_request()
        except RuntimeError as error:
            raise EngineFailed(f"OpenVINO cannot load the model: {_first_line(error)}; try --engine cpu") from error
        if used != hint:
            raise PrecisionRefused(
                f"precision: OpenVINO was told {hint} and took {used}; set another or use --engine cpu"
            )
        image = np.zeros((1, 1, *bucket), dtype=np.float32)
        request.set_tensor(self._model.card.input_name, self._ov.Tensor(image, shared_memory=True))
        self._requests[bucket] = (request, image)

    def run(self, image: Array) -> dict[str, Array]:
        """See `Engine.run`."""
        request, buffer = self._requests[_loaded(self._requests, image)]
        np.copyto(buffer[0, 0], image)
        try:
            request.infer()
        except RuntimeError as error:
            raise EngineFailed(f"OpenVINO failed: {_first_line(error)}") from error
        return {name: request.get_tensor(name).data[0] for name in OUTPUTS}

    def reduce(self, image: Array, masks: NDArray[np.float32], affected_variance: float) -> dict[str, Array] | None:
        """Not offered: the maps lie in this process's memory already."""
        del image, masks, affected_variance
        return None


class OnnxRuntimeEngine:
    """ONNX Runtime with one provider; one session, one binding and one set of buffers per bucket."""

    def __init__(
        self,
        model: ModelFile,
        engine: str,
        precision: str,
        threads: int,
        cache: Path | None,
        *,
        may_build: bool = False,
    ) -> None:
        """Check that the provider is there.

        Raises:
            EngineMissing: this ONNX Runtime was built without the provider, or its libraries are not installed.
        """
        self._ort = import_module("onnxruntime")
        self._provider = _PROVIDERS[engine]
        self._engine, self._precision, self._threads, self._cache = (
            engine,
            precision,
            threads,
            cache,
        )
        if self._provider not in self._ort.get_available_providers():
            raise EngineMissing(
                f"engine {engine}: this ONNX Runtime has no {self._provider}; install the extra `{_EXTRA[engine]}` "
                "(and only one of onnxruntime, onnxruntime-gpu), or choose --engine openvino or cpu"
            )
        if self.on_gpu and hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()
        self._model, self._may_build = model, may_build
        self.notes: list[str] = []
        self._bound: dict[Bucket, BoundSession] = {}
        device = processor_name() if engine == "cpu" else gpu_name()
        self.facts = EngineFacts(engine, f"{self._provider} {self._ort.__version__}", precision, device)

    @property
    def on_gpu(self) -> bool:
        """Whether the provider runs on a GPU."""
        return self._engine in ("cuda", "tensorrt")

    def load(self, bucket: Bucket) -> None:
        """Create the session for one shape, verify that the provider runs it, and bind its buffers.

        Raises:
            EngineMissing: a TensorRT engine would have to be built first.
            EngineFailed: the provider cannot load the model.
        """
        if self._engine == "tensorrt" and not self._may_build:
            check_built(self._cache, self._precision, bucket)
        shape = dict(zip(("D", "H", "W"), bucket, strict=True))
        session = self._session(self._model.data, shape, bucket, self._engine)
        reducer = self._reducing_session(shape, bucket) if self.on_gpu and self._model.reducer else None
        self._bound[bucket] = BoundSession(
            self._ort, session, reducer, bucket, self._model.card.input_name, on_gpu=self.on_gpu
        )

    def _reducing_session(self, shape: dict[str, int], bucket: Bucket) -> Any:
        # CUDA for both GPU providers: it reads the same device memory, and nothing has to be built for it.
        try:
            return self._session(base64.b64decode(self._model.reducer), shape, bucket, "cuda")
        except EngineError as error:
            self.notes.append(f"maps are reduced on the host: {error}")
            return None

    def run(self, image: Array) -> dict[str, Array]:
        """See `Engine.run`."""
        bound = self._bound[_loaded(self._bound, image)]
        try:
            return bound.run(image)
        except self._failures() as error:
            raise EngineFailed(f"{self._provider} failed: {_first_line(error)}") from error

    def reduce(self, image: Array, masks: NDArray[np.float32], affected_variance: float) -> dict[str, Array] | None:
        """See `Engine.reduce`; offered on a GPU by a model that carries the reducing graph."""
        bound = self._bound[_loaded(self._bound, image)]
        try:
            return bound.reduce(image, masks, affected_variance)
        except self._failures() as error:
            raise EngineFailed(f"{self._provider} failed: {_first_line(error)}") from error

    def _session(self, data: bytes, dimensions: dict[str, int], bucket: Bucket, engine: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.on_gpu:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for name, size in dimensions.items():
            options.add_free_dimension_override_by_name(name, size)
        provider = _PROVIDERS[engine]
        chosen = [(provider, provider_options(engine, self._precision, self._cache, bucket))]
        try:
            session = self._ort.InferenceSession(data, options, providers=chosen)
        except self._failures() as error:
            raise EngineFailed(f"{provider} cannot load the model: {_first_line(error)}; {_REMEDY[engine]}") from error
        verify_provider(session.get_providers(), provider, engine)
        return session

    def _failures(self) -> tuple[type[Exception], ...]:
        state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        names = ("Fail", "InvalidGraph", "InvalidProtobuf", "InvalidArgument", "NoSuchFile", "RuntimeException",
                 "NotImplemented", "EPFail", "NoModel", "ModelLoaded")  # fmt: skip
        found = [getattr(state, name) for name in names if hasattr(state, name)]
        return (*found, RuntimeError, ValueError)


def verify_provider(providers: list[str], wanted: str, engine: str) -> None:
    """Check after creation that the session runs where it was asked to.

    ONNX Runtime drops a provider whose libraries are missing and goes on with the CPU (onnxruntime issues 17801, 23647).

    Raises:
        EngineMissing: the provider is not the first of the session.
    """
    if not providers or providers[0] != wanted:
        raise EngineMissing(
            f"engine {engine}: asked for {wanted}, the session runs on {', '.join(providers) or 'nothing'}; {_REMEDY[engine]}"
        )


def provider_options(engine: str, precision: str, cache: Path | None, bucket: Bucket) -> dict[str, str]:
    """Options of the ONNX Runtime provider, all as text.

    Source: ONNX Runtime documentation of the CUDA and TensorRT execution providers (checked against 1.32).
    """
    if engine == "cuda":
        return {
            "device_id": "0",
            "use_tf32": "1" if precision == "tf32" else "0",
            "cudnn_conv_algo_search": CUDNN_CONV_SEARCH,
            "cudnn_conv_use_max_workspace": "1",
            "do_copy_in_default_stream": "1",
            "arena_extend_strategy": "kSameAsRequested",
        }
    if engine == "tensorrt":
        return _tensorrt_options(precision, cache, bucket)
    return {}


def _tensorrt_options(precision: str, cache: Path | None, bucket: Bucket) -> dict[str, str]:
    folder = "" if cache is None else str(cache)
    return {
        "device_id": "0",
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_bf16_enable": "1" if precision == "bf16" else "0",
        "trt_engine_cache_enable": "1" if folder else "0",
        "trt_engine_cache_path": folder,
        "trt_engine_cache_prefix": engine_prefix(precision, bucket),
        "trt_timing_cache_enable": "1" if folder else "0",
        "trt_timing_cache_path": folder,
        "trt_max_workspace_size": str(4 * 2**30),
    }


def engine_prefix(precision: str, bucket: Bucket) -> str:
    """Start of the file name of a TensorRT engine."""
    return f"rescan_{precision}_{'x'.join(str(n) for n in bucket)}"


def tensorrt_folder(cache: Path, model_sha256: str) -> Path:
    """Where the engines of this model on this machine lie: an engine is good for one GPU, driver, TensorRT and model."""
    driver = re.search(r"\d+\.\d+(\.\d+)?", _read_text(Path("/proc/driver/nvidia/version")))
    versions = [v for name in ("tensorrt-cu13", "tensorrt-cu12", "tensorrt") if (v := _version(name))]
    parts = (
        gpu_name(),
        driver.group() if driver else "no-driver",
        f"trt-{versions[0] if versions else 'none'}",
        model_sha256[:16],
    )
    return cache / "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in parts)


def check_built(folder: Path | None, precision: str, bucket: Bucket) -> None:
    """Refuse to go on where an engine would be built now, which takes minutes while a series waits.

    Raises:
        EngineMissing: no engine of this precision and bucket.
    """
    prefix = engine_prefix(precision, bucket)
    if folder is None or not any(folder.glob(f"{prefix}*.engine")):
        raise EngineMissing(
            f"engine tensorrt: {prefix} was not built for this GPU, driver, TensorRT and model; "
            "run `rescan-export tensorrt`, or choose --engine cuda"
        )


def gpu_name() -> str:
    """Name of the first NVIDIA GPU from its driver's files, else `GPU`."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in _read_text(path).splitlines():
            if line.startswith("Model:"):
                return line.split(":", 1)[1].strip()
    return "GPU"


class BoundSession:
    """A session with its buffers, bound once and reused; one method per stage, so that each can be timed."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        reducer: Any,
        bucket: Bucket,
        input_name: str,
        *,
        on_gpu: bool,
    ) -> None:
        self._session, self._reducer, self._binding = (
            session,
            reducer,
            session.io_binding(),
        )
        self._image = np.zeros((1, 1, *bucket), dtype=np.float32)
        self._input_name, self._on_gpu, self._ort = input_name, on_gpu, ort
        shapes = {name: (1, 5 if name == "artefact_variance" else 1, *bucket) for name in OUTPUTS}
        # On the CPU an OrtValue made from an array shares its memory: what is written there is what runs, without a copy.
        self._host = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items() if not on_gpu}
        self._input = ort.OrtValue.ortvalue_from_numpy(self._image, *(("cuda", 0) if on_gpu else ("cpu", 0)))
        self._device = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
            if on_gpu
            else ort.OrtValue.ortvalue_from_numpy(self._host[name])
            for name, shape in shapes.items()
        }
        self._binding.bind_ortvalue_input(input_name, self._input)
        for name in OUTPUTS:
            self._binding.bind_ortvalue_output(name, self._device[name])

    def run(self, image: Array) -> dict[str, Array]:
        """Copy in, infer, copy out."""
        self.copy_in(image)
        self.infer()
        return self.copy_out()

    def reduce(self, image: Array, masks: NDArray[np.float32], affected_variance: float) -> dict[str, Array] | None:
        """Copy in, infer, reduce; None without a reducing graph."""
        if self._reducer is None:
            return None
        self.copy_in(image)
        self.infer()
        return self.sums(masks, affected_variance)

    def copy_in(self, image: Array) -> None:
        """Put the image where the graph reads it."""
        np.copyto(self._image[0, 0], image)
        if self._on_gpu:
            self._input.update_inplace(self._image)

    def infer(self) -> None:
        """Run the graph on the bound buffers; returns when it is done."""
        self._session.run_with_iobinding(self._binding)

    def copy_out(self) -> dict[str, Array]:
        """The maps in this process's memory."""
        return {name: self._host[name][0] if self._host else self._device[name].numpy()[0] for name in OUTPUTS}

    def sums(self, masks: NDArray[np.float32], affected_variance: float) -> dict[str, Array]:
        """Reduce the maps where they are and copy the sums back."""
        binding = self._reducer.io_binding()
        binding.bind_ortvalue_input("image", self._input)
        for name in OUTPUTS:
            binding.bind_ortvalue_input(name, self._device[name])
        place = ("cuda", 0) if self._on_gpu else ("cpu", 0)
        level = np.float32(min(affected_variance, float(np.finfo(np.float32).max)))
        for name, values in (("masks", masks[None]), ("affected_variance", np.array([level]))):
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(values, *place))
        names = [output.name for output in self._reducer.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        self._reducer.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


_PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_EXTRA = {"tensorrt": "gpu,tensorrt", "cuda": "gpu", "cpu": "cpu"}
_REMEDY = {
    "cuda": "check the NVIDIA driver and the extra `gpu`, or choose --engine openvino or cpu",
    "tensorrt": "check the extras `gpu,tensorrt` and run `rescan-export tensorrt`, or choose --engine cuda",
    "cpu": "export the model again",
}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _import_openvino() -> Any:
    # The converter inside the package loads a telemetry client where it finds one; the daemon never converts, and
    # without the client nothing can phone home.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module("openvino")
    except ImportError:
        raise EngineMissing("engine openvino: the package is not installed; install the extra `cpu` or `gpu`") from None


def _loaded(loaded: dict[Bucket, Any], image: Array) -> Bucket:
    if image.shape not in loaded:
        raise EngineFailed(f"input shape {image.shape}: expected one of {sorted(loaded)}; prepare the volume again")
    return (image.shape[0], image.shape[1], image.shape[2])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
