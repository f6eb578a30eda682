"""Checkpoint -> model file: the graph is the network, and the file says everything about itself."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from daemon.card import MAX_GOLDEN_BYTES, CardError, read_model
from daemon.engines import OUTPUTS, BoundSession
from daemon.golden import decode_volume, encode_volume
from daemon.prepare import BUCKETS
from daemon.score import PROFILES, Reduced, reduce_maps
from daemon.words import ARTEFACTS, Volume
from export.__main__ import main
from export.golden import formula_head, golden_volume
from export.graph import GraphError, build_graph, check_operators, fold, graph_facts, random_student, save_bytes
from export.interpret import TorchGraph
from export.onnx import ExportError, Facts, read_facts
from export.parity import Row, admit, compare, outcome, relative_rms, row, table, to_maps
from export.reducer import RESULTS, build_reducer
from export.unfold import unfold
from tests.model_builders import made_up_card, made_up_head, made_up_maps
from tests.small_student import calibration
from training.__main__ import start_student
from training.network import NetworkConfig, UNet, conv_gflop, save_network

SMALL = (16, 24, 32)


@pytest.fixture(scope="module")
def network() -> UNet:
    return random_student()


@pytest.fixture(scope="module")
def graph(network: UNet) -> onnx.ModelProto:
    return build_graph(fold(network, 1.3), (16, 16, 16))


def image(shape: tuple[int, int, int] = SMALL) -> torch.Tensor:
    return torch.rand((1, 1, *shape), generator=torch.Generator().manual_seed(1))


def expected_maps(network: UNet, x: torch.Tensor, temperature: float) -> list[np.ndarray]:
    with torch.inference_mode():
        logits, log_variance = network(x)
    p = torch.softmax(logits / temperature, dim=1)[:, 1:]
    return [p.numpy(), log_variance[:, :1].exp().numpy(), log_variance[:, 1:].exp().numpy()]


@pytest.mark.parametrize("up", ["resize", "transpose"])
def test_folding_is_exact(network: UNet, up: str) -> None:
    """Standardised filters, two heads and the temperature folded into plain convolutions give the network's own maps."""
    with torch.inference_mode():
        found = fold(network, 1.3, up)(image())
    for ours, theirs in zip(found, expected_maps(network, image(), 1.3), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-4, atol=1e-6)


def test_the_way_back_gives_the_same_maps(network: UNet, graph: onnx.ModelProto) -> None:
    """Checkpoint -> graph -> checkpoint: other parameters, the same function; a foreign graph is refused."""
    again = unfold(graph, 1.3)
    assert again.config == network.config
    for ours, theirs in zip(expected_maps(again, image(), 1.3), expected_maps(network, image(), 1.3), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    with pytest.raises(GraphError, match="not the graph of a student"):
        unfold(onnx.ModelProto(), 1.3)


def test_what_training_goes_on_from_is_checked(network: UNet, tmp_path: Path) -> None:
    """`--start`: one line for what is missing, not there or of another size; the right one is read."""
    file = tmp_path / "start.pt"
    save_network(network, file, stage="student")
    started = start_student(file, network.config.widths, 0)
    assert started is not None
    assert started.config == network.config
    for path, widths, steps, message in (
        (None, network.config.widths, 0, "give it with --start"),
        (tmp_path / "none.pt", network.config.widths, 0, "none.pt: no such file"),
        (file, (8, 8), 0, "a student of widths"),
    ):
        with pytest.raises(ValueError, match=message):
            start_student(path, widths, steps)
    assert start_student(None, network.config.widths, 100) is None


def test_one_graph_runs_at_every_size(network: UNet, graph: onnx.ModelProto) -> None:
    """Traced at 16^3, run at 16 x 24 x 32 by ONNX Runtime and by the interpreter: both equal the network."""
    data = save_bytes(graph)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    ours = session.run(list(OUTPUTS), {"image": image().numpy()})
    torch_maps = TorchGraph(data).run(image().numpy()[0, 0])
    for name, got, theirs in zip(OUTPUTS, ours, expected_maps(network, image(), 1.3), strict=True):
        np.testing.assert_allclose(got, theirs, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(torch_maps[name], theirs[0], rtol=1e-3, atol=1e-6)


def test_the_same_network_gives_the_same_bytes(network: UNet, graph: onnx.ModelProto) -> None:
    """An export can be repeated and compared by its hash."""
    assert save_bytes(build_graph(fold(network, 1.3), (16, 16, 16))) == save_bytes(graph)


def test_only_operators_on_the_list(graph: onnx.ModelProto) -> None:
    """An operator outside the list, another opset and outside weights each fail the export."""
    check_operators(graph, "resize")
    with pytest.raises(GraphError, match=r"operators \['Resize'\] are not on the list"):
        check_operators(graph, "transpose")
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    other.opset_import[0].version = 21
    with pytest.raises(GraphError, match="opset: expected 18"):
        check_operators(other, "resize")


def test_facts_of_the_graph(graph: onnx.ModelProto) -> None:
    """Operations agree with the network's own count; the live activations with a count by hand of the decoder's widest point."""
    facts = graph_facts(graph, BUCKETS)
    by_hand = conv_gflop((8, 12, 16), BUCKETS[0]) - 2e-9 * np.prod(BUCKETS[0]) * 8  # margin instead of two logits
    assert facts.gigaflops["96x112x96"] == pytest.approx(by_hand, rel=1e-3)
    # At the finest level: skip (8), upsampled (8) and their concatenation (16), of 4 bytes.
    assert facts.activation_bytes_per_voxel == pytest.approx(4 * 32, rel=0.15)


def test_a_teacher_is_not_exported() -> None:
    """Two variance channels are no student."""
    with pytest.raises(GraphError, match="expected a student with 6 variance channels, got 2"):
        fold(UNet(NetworkConfig(widths=(8, 12), variances=2)))
    with pytest.raises(GraphError, match="temperature: expected a number above 0, got 0"):
        fold(random_student((8, 12)), 0.0)
    with pytest.raises(GraphError, match="upsampling: expected one of"):
        fold(random_student((8, 12)), 1.0, "nearest")


def test_the_reducing_graph_is_the_reduction_of_the_daemon() -> None:
    """Every sum, over masks and slices, within float32 of NumPy's float64; also where no grey matter is left."""
    head = made_up_head()
    reducer = save_bytes(build_reducer())
    assert len(reducer) < 20_000
    session = onnxruntime.InferenceSession(reducer, providers=["CPUExecutionProvider"])
    full = made_up_maps(head, 0.08, seed=2)
    for maps in (full, replace(full, gm_probability=np.zeros_like(full.gm_probability))):
        feed = {
            "image": head.image[None, None],
            "gm_probability": maps.gm_probability[None, None],
            "task_variance": maps.task_variance[None, None],
            "artefact_variance": maps.artefact_variance[None],
            "masks": np.stack([head.native_mask, head.head_mask]).astype(np.float32)[None],
            "affected_variance": np.array([0.4], dtype=np.float32),
        }
        found = Reduced.from_sums(dict(zip(RESULTS, session.run(list(RESULTS), feed), strict=True)))
        expected = reduce_maps(maps, head, 0.4)
        for name, value in asdict(expected).items():
            got = getattr(found, name)
            for ours, theirs in (
                zip(np.atleast_1d(got), np.atleast_1d(value), strict=True) if name != "profiles" else []
            ):
                assert ours == pytest.approx(theirs, rel=2e-5, abs=0.01), name  # entropy: 1e-7 nat per cell
        for ours, theirs in zip(found.profiles, expected.profiles, strict=True):
            assert ours.shape[0] == len(PROFILES)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_device_copies_back_sums_instead_of_maps(network_student: Path) -> None:
    """Through the binding that a GPU uses, here on the CPU: kilobytes instead of seven maps, and the same sums."""
    model = read_model(network_student)
    head = made_up_head()
    sessions = [
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for data in (model.data, base64.b64decode(model.reducer))
    ]
    shape = head.image.shape
    bound = BoundSession(onnxruntime, *sessions, shape, "image", on_gpu=False)
    masks = np.stack([head.native_mask, head.head_mask]).astype(np.float32)
    sums = bound.reduce(head.image, masks, float("inf"))
    assert sums is not None
    assert sum(v.nbytes for v in sums.values()) < 5_000
    out = bound.run(head.image)
    expected = reduce_maps(to_maps(out), head)
    assert Reduced.from_sums(sums).gm_sum == pytest.approx(expected.gm_sum, rel=1e-5)


def test_the_file_is_self_contained_and_knows_nothing_of_this_machine(network_student: Path) -> None:
    """Card, golden case and reducer inside; no path, no trace of the exporter's stack."""
    model = read_model(network_student)
    assert model.golden
    assert model.reducer
    assert len(model.golden) <= MAX_GOLDEN_BYTES
    for trace in (b"site-packages", str(Path.cwd()).encode(), b"stack_trace", b".py"):
        assert trace not in model.data
    assert model.card.artefacts == ARTEFACTS
    assert model.card.golden is not None
    assert model.card.golden.verdict is not None


def test_the_golden_case_survives_packing() -> None:
    """One byte per voxel: within half a step; a head, with stripes; too large a volume is refused."""
    volume = golden_volume()
    again = decode_volume(encode_volume(volume))
    assert np.abs(again.voxels - volume.voxels).max() <= volume.voxels.max() / 255 * 0.51
    np.testing.assert_array_equal(again.affine, volume.affine)
    assert np.abs(golden_volume().voxels - formula_head().voxels).mean() > 0.01
    noise = np.random.default_rng(0).random((160, 160, 160), dtype=np.float32)
    with pytest.raises(ValueError, match="at most"):
        encode_volume(Volume(noise, np.eye(4)))
    with pytest.raises(CardError, match="cannot be unpacked"):
        decode_volume("AAAA")


def test_a_calibration_is_embedded_without_touching_the_graph(network_student: Path, tmp_path: Path) -> None:
    """`rescan-export card`: the same graph hash, another calibration, a renewed golden verdict; another temperature is refused."""
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"version": "9", "calibration": calibration(bad=True), "evaluation": {"rho": -0.9}}))
    out = tmp_path / "new.onnx"
    assert main(["card", str(network_student), "--calibration", str(facts), "-o", str(out)]) == 0
    old, new = read_model(network_student).card, read_model(out).card
    assert new.graph_sha256 == old.graph_sha256
    assert (new.version, new.evaluation) == ("9", {"rho": -0.9})
    assert old.golden.verdict != "RESCAN"
    assert new.golden.verdict == "RESCAN"
    facts.write_text('{"temperature": 2.0}')
    assert main(["card", str(network_student), "--calibration", str(facts), "-o", str(out)]) == 1


def test_facts_that_nobody_knows_are_an_error(tmp_path: Path) -> None:
    """An unknown key is named, and the known ones listed."""
    path = tmp_path / "facts.json"
    path.write_text('{"calibratoin": {}}')
    with pytest.raises(ExportError, match=r"calibratoin.*|keys from name"):
        read_facts(path)
    assert read_facts(None) == Facts()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file, a foreign checkpoint, a teacher: exit status 1 and one line with the name; wrong flags: 2."""
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": {}}, foreign)
    teacher = tmp_path / "teacher.pt"
    save_network(UNet(NetworkConfig(widths=(8, 12), variances=2)), teacher)
    for path, text in (
        (tmp_path / "none.pt", "no such file"),
        (foreign, "not a Rescan checkpoint"),
        (teacher, "give student.pt"),
    ):
        assert main(["onnx", str(path), "-o", str(tmp_path / "x.onnx")]) == 1
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1
    assert main(["parity", str(foreign)]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["onnx"])


def test_parity_names_maps_scores_and_verdicts(network_student: Path) -> None:
    """ONNX Runtime against torch on one small head: passes; a doctored outcome fails by score and by verdict."""
    model = read_model(network_student)
    head = made_up_head((48, 48, 48))
    rows = compare(model, "cpu", "fp32", [("head", head)])
    assert rows[0].passed
    assert rows[0].map_rms < 1e-4
    good = outcome(made_up_maps(head), head, model.card)
    worse = outcome(made_up_maps(head, 0.021), head, model.card)
    assert not row("cpu fp32", "head", worse, good, 0.0, "fp32").passed
    flipped = row("cpu fp32", "head", replace(good, verdict="RESCAN"), good, 0.0, "fp32")
    assert not flipped.passed
    assert "PASS->RESCAN" in table([flipped])
    assert relative_rms(np.ones(3, np.float32), np.full(3, 2.0, np.float32)) == 0.5


def test_only_what_passed_everywhere_is_admitted() -> None:
    """One failing volume keeps a precision out; engines that were not here keep what they had."""
    card = replace(made_up_card(), precisions={"cuda": ("tf32",)})
    passed = Row("openvino bf16", "a", 0.01, "snr", 0.0, None, None, 1.0, True)
    assert admit(card, [passed]).precisions == {"cuda": ("tf32",), "openvino": ("bf16",)}
    failed = replace(passed, volume="b", passed=False)
    assert admit(card, [passed, failed]).precisions == {"cuda": ("tf32",)}
