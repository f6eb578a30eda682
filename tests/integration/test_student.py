"""The student in service: engines, precisions, refusals, buffers; on a small model with random weights."""

from __future__ import annotations

import dataclasses
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from daemon import engines
from daemon.card import CARD_KEY, CardError, ModelFile, card_json, graph_sha256, read_model, replace_metadata
from daemon.engines import (
    OUTPUTS,
    EngineFailed,
    EngineMissing,
    MemoryShort,
    PrecisionRefused,
    available_memory_bytes,
    check_built,
    memory_needed_bytes,
    open_engine,
    provider_options,
    tensorrt_folder,
    verify_provider,
)
from daemon.golden import decode_volume
from daemon.prepare import Prepared, prepare
from daemon.student import GoldenMismatch, Student, admitted_precisions
from daemon.tiles import axis_cuts, tile_shape

SMALL = (16, 24, 32)
"""The graph takes any size divisible by its depth: small ones make quick tests."""


@pytest.fixture(scope="module")
def model(network_student: Path) -> ModelFile:
    return read_model(network_student)


@pytest.fixture(scope="module")
def golden(model: ModelFile) -> Prepared:
    return prepare(decode_volume(model.golden))


def small_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(SMALL, dtype=np.float32)


@pytest.fixture(scope="module", params=["cpu", "openvino"])
def engine(request: pytest.FixtureRequest, model: ModelFile) -> engines.Engine:
    opened = open_engine(model, request.param, "fp32", 1)
    opened.load(SMALL)
    return opened


def test_auto_takes_the_best_engine_there_is_and_says_what_it_passed_over(network_student: Path) -> None:
    """Without a GPU: OpenVINO, in float32 while nothing faster is admitted; the GPU engines with reason and remedy."""
    said: list[str] = []
    opened = Student.open(network_student, threads=1, say=said.append)
    facts = opened.describe()
    assert (facts["provider"], facts["precision"]) == ("openvino", "fp32")
    assert facts["runtime"].startswith("OpenVINO 20")
    assert [s.engine for s in opened.skipped] == ["tensorrt", "cuda"]
    assert any("install the extra `gpu`" in line for line in said)
    assert any("bucket 96x112x96: about" in line for line in said)
    assert said[-1].startswith("golden case reproduced")


def test_engines_agree(model: ModelFile) -> None:
    """OpenVINO and ONNX Runtime in float32 differ by rounding only."""
    found = []
    for name in ("cpu", "openvino"):
        opened = open_engine(model, name, "fp32", 1)
        opened.load(SMALL)
        found.append({k: v.copy() for k, v in opened.run(small_image()).items()})
    for name in OUTPUTS:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=2e-4, atol=1e-6)


def test_no_result_is_stale(engine: engines.Engine) -> None:
    """A, B, A: the buffers are the same, the second A equals the first and B differs."""
    first = engine.run(small_image(1))["artefact_variance"].copy()
    second = engine.run(small_image(2))["artefact_variance"].copy()
    third = engine.run(small_image(1))["artefact_variance"].copy()
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_memory_stays_flat(engine: engines.Engine) -> None:
    """The peak of the process after 200 further runs is that after 20, within 5 %."""
    for _ in range(20):
        engine.run(small_image())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        engine.run(small_image())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= 1.05 * before


def test_maps_are_owned_by_the_caller(model: ModelFile) -> None:
    """A later run does not change maps that were handed out."""
    opened = open_engine(model, "cpu", "fp32", 1)
    opened.load(SMALL)
    one = Student(model, opened)
    prepared = SimpleNamespace(image=small_image(1))
    maps = one.run(prepared)  # type: ignore[arg-type]
    kept = maps.gm_probability.copy()
    one.run(SimpleNamespace(image=small_image(2)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(maps.gm_probability, kept)


def test_another_shape_is_refused(engine: engines.Engine) -> None:
    """A bucket that was not loaded never reaches the runtime."""
    with pytest.raises(EngineFailed, match=r"input shape \(8, 8, 8\): expected one of"):
        engine.run(np.zeros((8, 8, 8), np.float32))


def altered(model: ModelFile, path: Path) -> Path:
    """The model with one weight of its last convolution changed, and a card that knows the new hash."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.ModelProto.FromString(model.data)
    head = next(node for node in reversed(proto.graph.node) if node.op_type == "Conv")
    tensor = next(t for t in proto.graph.initializer if t.name == head.input[1])
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[values[0].size] += 2.0
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    data = proto.SerializeToString()
    card = dataclasses.replace(model.card, graph_sha256=graph_sha256(data))
    path.write_bytes(replace_metadata(data, {CARD_KEY: card_json(card)}))
    return path


def test_one_altered_weight_fails_the_golden_case(model: ModelFile, tmp_path: Path) -> None:
    """Even where the hash was brought up to date the scores give it away; the message names score, values and remedy."""
    with pytest.raises(GoldenMismatch, match=r"golden case: \w+ is .*, expected .* within 1 %.*export again"):
        Student.open(altered(model, tmp_path / "altered.onnx"), "cpu", threads=1)


def test_one_flipped_bit_fails_the_hash(network_student: Path, tmp_path: Path) -> None:
    """A file damaged on the way is refused before an engine sees it."""
    data = bytearray(network_student.read_bytes())
    data[len(data) // 20] ^= 1
    path = tmp_path / "flipped.onnx"
    path.write_bytes(data)
    with pytest.raises(CardError):
        Student.open(path, "cpu")


def test_a_file_without_golden_case_is_not_served(model: ModelFile) -> None:
    """No golden case, or one that its card does not describe."""
    bare = dataclasses.replace(model, golden="")
    with pytest.raises(CardError, match="no golden case"):
        Student(bare, open_engine(bare, "cpu", "fp32", 1)).check_golden()
    other = dataclasses.replace(model, golden=model.golden[:-4])
    with pytest.raises(CardError, match="golden case was altered"):
        Student(other, open_engine(other, "cpu", "fp32", 1)).check_golden()


def test_a_bucket_that_does_not_fit_is_refused_before_it_is_allocated(network_student: Path) -> None:
    """The message states need, what is free, and the remedy."""
    with pytest.raises(MemoryShort, match=r"bucket 96x112x96 needs about \d+ MiB, 8 MiB are free; free memory"):
        Student.open(network_student, "cpu", memory_limit_bytes=8 * 2**20)


def test_tiles_are_taken_where_memory_is_short_and_say_so(model: ModelFile) -> None:
    """A limit between two tiles and the whole: loaded in tiles, stated; with another result near the cut alone."""
    whole = open_engine(model, "cpu", "fp32", 1)
    tiled = Student(dataclasses.replace(model, card=dataclasses.replace(model.card, buckets=((32, 96, 32),))), whole)
    said: list[str] = []
    need = memory_needed_bytes(model, (32, 96, 32), "cpu", "fp32")
    tiled.load_all(need - 1, said.append)
    assert tiled.describe()["tiles"] == "2"
    assert said[-1].startswith("memory is short: every head runs in 2 tiles")
    image = np.random.default_rng(0).random((32, 96, 32), dtype=np.float32)
    maps = tiled.run(SimpleNamespace(image=image))  # type: ignore[arg-type]
    whole.load((32, 96, 32))
    expected = whole.run(image)["gm_probability"][0]
    difference = np.abs(maps.gm_probability - expected).max(axis=(0, 2))
    # Three levels see 2 (1 + 2 + 4) + 2 (1 + 2) and a little for the upsampling: 24 cells beside the cut at 48.
    assert difference[:20].max() < 1e-5
    assert difference[-20:].max() < 1e-5
    assert difference.max() < 0.1


@pytest.mark.parametrize("length", [96, 112, 128])
def test_tiles_cover_every_cell_once_and_are_aligned(length: int) -> None:
    """Both halves start on a multiple of 16, have one length, and see 16 cells beyond the cut."""
    (first, low, middle), (second, again, high) = axis_cuts(length)
    tile = length - second
    assert (first, low, again, high) == (0, 0, middle, length)
    assert second % 16 == 0
    assert tile % 16 == 0
    assert middle - second >= 16
    assert tile - middle >= 16
    assert tile_shape((length, length, 96), (0,)) == (tile, length, 96)


def test_stated_memory_grows_with_the_bucket_and_shrinks_with_the_precision(model: ModelFile) -> None:
    """Half the bytes in bfloat16; and this machine has memory at all."""
    small, large = (memory_needed_bytes(model, b, "openvino", "fp32") for b in ((96, 112, 96), (112, 128, 112)))
    assert small < large
    assert memory_needed_bytes(model, (96, 112, 96), "openvino", "bf16") < small
    assert available_memory_bytes() > 2**20


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_missing_gpu_library_is_one_line_and_never_the_cpu(network_student: Path, name: str) -> None:
    """Where this ONNX Runtime has no GPU provider the student does not open."""
    if engines._PROVIDERS[name] in __import__("onnxruntime").get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(EngineMissing, match=rf"engine {name}: .*install the extra"):
        Student.open(network_student, name)


class FakeRuntime:
    """An ONNX Runtime that drops a provider whose libraries are missing, as the real one does."""

    __version__ = "0"

    def __init__(self, gives: list[str]) -> None:
        self.gives, self.entries = gives, {}
        outer = self

        class SessionOptions:
            def add_session_config_entry(self, key: str, value: str) -> None:
                outer.entries[key] = value

            def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
                outer.entries[name] = size

        self.SessionOptions = SessionOptions

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, data: bytes, options: object, providers: list[object]) -> SimpleNamespace:  # noqa: N802
        self.asked = providers
        return SimpleNamespace(get_providers=lambda: self.gives)


def test_a_provider_that_the_runtime_dropped_is_found_out(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA asked for, CPU given: an error with the remedy; fallback is switched off and the CPU is not on the list."""
    fake = FakeRuntime(["CPUExecutionProvider"])
    real = engines.import_module
    monkeypatch.setattr(engines, "import_module", lambda name: fake if name == "onnxruntime" else real(name))
    opened = open_engine(model, "cuda", "fp32", 1)
    with pytest.raises(
        EngineMissing, match="asked for CUDAExecutionProvider, the session runs on CPUExecutionProvider"
    ):
        opened.load(SMALL)
    assert fake.entries["session.disable_cpu_ep_fallback"] == "1"
    assert fake.entries["session.set_denormal_as_zero"] == "1"
    assert [name for name, _ in fake.asked] == ["CUDAExecutionProvider"]
    assert (fake.entries["D"], fake.entries["H"], fake.entries["W"]) == SMALL
    verify_provider(["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider", "cuda")


def test_precision_is_always_explicit(model: ModelFile) -> None:
    """OpenVINO is told float32 although the processor has bfloat16; TF32 on CUDA is off unless asked for."""
    opened = open_engine(model, "openvino", "fp32", 1)
    opened.load(SMALL)
    compiled = opened._requests[SMALL][0].get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert provider_options("cuda", "fp32", None, SMALL)["use_tf32"] == "0"
    assert provider_options("cuda", "tf32", None, SMALL)["use_tf32"] == "1"
    assert provider_options("tensorrt", "fp16", None, SMALL)["trt_fp16_enable"] == "1"


def test_a_precision_must_be_admitted(model: ModelFile) -> None:
    """What parity has not checked for this model is refused; what it admitted comes first."""
    with pytest.raises(PrecisionRefused, match="bf16 on openvino is not admitted for this model"):
        admitted_precisions(model.card, "openvino", "bf16")
    admitted = dataclasses.replace(model.card, precisions={"openvino": ("bf16",)})
    assert admitted_precisions(admitted, "openvino", "") == ("bf16", "fp32")
    assert admitted_precisions(admitted, "openvino", "fp32") == ("fp32",)
    with pytest.raises(PrecisionRefused, match="cpu has fp32, got 'int8'"):
        open_engine(model, "cpu", "int8", 1)
    with pytest.raises(EngineMissing, match="choose one of"):
        open_engine(model, "abacus", "fp32", 1)


def test_nothing_phones_home(model: ModelFile) -> None:
    """The telemetry client that OpenVINO's converter would load is kept out of the process."""
    open_engine(model, "openvino", "fp32", 1)
    assert sys.modules["openvino_telemetry"] is None


def test_tensorrt_is_never_built_while_a_series_waits(tmp_path: Path) -> None:
    """Without an engine for this GPU, driver, TensorRT and model the daemon says so; with one it goes on."""
    folder = tensorrt_folder(tmp_path, "0123456789abcdef0123")
    assert folder.parent == tmp_path
    assert folder.name.endswith("_0123456789abcdef")
    with pytest.raises(EngineMissing, match=r"rescan_fp16_16x24x32 was not built .* run `rescan-export tensorrt`"):
        check_built(folder, "fp16", SMALL)
    folder.mkdir()
    (folder / "rescan_fp16_16x24x32_123_sm90.engine").touch()
    check_built(folder, "fp16", SMALL)
    options = provider_options("tensorrt", "fp16", folder, SMALL)
    assert options["trt_engine_cache_path"] == str(folder)
    assert options["trt_engine_cache_prefix"] == "rescan_fp16_16x24x32"


def test_the_student_scores_a_prepared_volume(model: ModelFile, golden: Prepared) -> None:
    """Scores without maps equal those of the golden case in the card."""
    opened = open_engine(model, "openvino", "fp32", 0)
    one = Student(model, opened)
    one.load((golden.image.shape[0], golden.image.shape[1], golden.image.shape[2]))
    found = one.score(golden).flat()
    assert model.card.golden is not None
    for name in ("artefact_uncertainty", "predicted_dice", "gm_volume_ml"):
        assert found[name] == pytest.approx(model.card.golden.scores[name], rel=0.01)
