"""Run networks over stored scans and keep what the report needs: sums and overlaps, not maps.

What is kept of a scan does not depend on the calibration, so a student that was calibrated after it was observed is not
run again; scores are then made from the sums by `daemon.score`, as in service.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.card import CardError, read_model
from daemon.prepare import Prepared
from daemon.score import GM_PROBABILITY, VOXEL_ML, Reduced, reduce_maps
from daemon.words import Array, Maps
from training.calibrate import Sample, measure
from training.evaluation.scans import Facts, Stored, listed, read

log = logging.getLogger("rescan.training")

OTHER_CONTRASTS = ("t2", "flair", "pd", "inverted", "epi")

EPS = 7.8e-4
"""The last epsilon of the paper's schedule; scales the logits of its entropy (Eq. 2 with sigma^2 + eps)."""


@dataclass(frozen=True)
class Runner:
    """A network that can be run.

    Attributes:
        key: names it in the cache: stage and hash of its weights.
        maps: prepared volume -> maps.
        temperature: by which its logits were divided.
    """

    key: str
    maps: Callable[[Prepared], Maps]
    temperature: float


@dataclass(frozen=True)
class Observation:
    """What one network saw in one scan.

    Attributes:
        sample: what the calibration needs too (raw scores, gates, Dice, volume).
        reduced: the sums of `daemon.score.Reduced`, as plain data.
        eq8_ml: the paper's standard deviation of the grey-matter volume (Eq. 8, over the field of view).
        scaled_entropy: mean over the field of view of the entropy of the scaled logits.
        reference_snr, reference_cnr: Eq. 10 and 11 with the reference's tissues; absent without a reference.
        mask: file name of the packed segmentation.
    """

    sample: Sample
    reduced: dict[str, Any]
    eq8_ml: float
    scaled_entropy: float
    reference_snr: float | None
    reference_cnr: float | None
    mask: str


def open_runner(path: Path, engine: str = "auto", temperature: float = 1.0) -> Runner:
    """Open a checkpoint of any stage (`.pt`, `.state`) or an exported student (`.onnx`).

    Args:
        path: the file.
        engine: of an exported student.
        temperature: divisor of a checkpoint's logits; an exported student has its own inside.

    Raises:
        ValueError: the file is neither.
    """
    if path.suffix == ".onnx":
        return _onnx_runner(path, engine)
    from training.network import NetworkConfig, UNet, load_network

    if path.suffix == ".state":  # a run that is still going, to rehearse
        import torch

        weights = torch.load(path, map_location="cpu", weights_only=True)["weights"]
        widths = tuple(
            int(weights[f"down.{i}.first.weight"].shape[0])
            for i in range(sum("down" in k and "first.weight" in k for k in weights))
        )
        network = UNet(NetworkConfig(widths, int(weights["log_variance.bias"].shape[0]))).eval()
        network.load_state_dict(weights)
    else:
        network, _ = load_network(path)
    key = hashlib.sha256(b"".join(v.float().numpy().tobytes() for v in network.state_dict().values())).hexdigest()[:12]
    scaled = "" if temperature == 1.0 else f"-t{temperature:g}"
    return Runner(f"{path.stem}-{key}{scaled}", lambda p: torch_maps(network, p, temperature), temperature)


def _onnx_runner(path: Path, engine: str) -> Runner:
    from daemon.student import Student, StudentError

    try:
        # By the graph, not the file: a calibration that was embedded later changes nothing that a network sees.
        key = f"graph-{read_model(path).card.graph_sha256[:12]}"
        student = Student.open(path, engine)
    except (CardError, StudentError) as error:
        raise ValueError(str(error)) from error
    return Runner(key, student.run, student.card.temperature)


def torch_maps(network: Any, prepared: Prepared, temperature: float = 1.0) -> Maps:
    """Maps of a checkpoint, bfloat16 trunk; a network with fewer variance channels gives zeros for the missing ones."""
    import torch

    device = next(network.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        logits, log_variance = network(torch.from_numpy(np.ascontiguousarray(prepared.image))[None, None].to(device))
    margin = (logits[0, 1] - logits[0, 0]).float() / temperature
    variance = torch.exp(log_variance[0].float()).cpu().numpy()
    artefacts = np.zeros((5, *prepared.image.shape), dtype=np.float32)
    artefacts[: len(variance) - 1] = variance[1:]
    return Maps(torch.sigmoid(margin).cpu().numpy(), variance[0], artefacts)


def observe(
    runner: Runner, root: Path, cache: Path, group: str, progress: Any = iter, only: set[str] | None = None
) -> dict[str, Observation]:
    """Run a network over every scan of a set that preparation accepted; what is cached is not run again.

    Args:
        runner: the network.
        root: folder of the scans.
        cache: folder of the results.
        group: the set.
        progress: wraps the iterable, for a progress bar.
        only: names of the scans to run; None runs all.

    Returns:
        Scan name -> observation.
    """
    folder = cache / runner.key / group
    folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, Observation] = {}
    scans = [f for f in listed(root, group) if not f.refused and (only is None or f.name in only)]
    # Clean scans come first: the others are measured against them, and a head without labels takes its clean
    # segmentation as its reference.
    for facts in progress(sorted(scans, key=lambda f: (f.artefact != "clean", f.name))):
        path = folder / f"{facts.name}.json"
        if not path.exists():
            clean = out.get(f"{facts.head}-clean")
            _observe_one(runner, read(root, facts), path, clean)
        out[facts.name] = _read_observation(path)
    return out


def _observe_one(runner: Runner, scan: Stored, path: Path, clean: Observation | None) -> None:
    maps = runner.maps(scan.prepared)
    mask = (maps.gm_probability > GM_PROBABILITY) & scan.prepared.native_mask
    reference = scan.share()
    if reference is None and scan.facts.group == "real":
        reference = _own_reference(scan, mask, clean, path)
    facts = scan.facts
    sample = measure(
        maps,
        scan.prepared,
        reference,
        head=facts.head,
        anatomy=facts.anatomy,
        artefact=None if facts.artefact == "clean" else facts.artefact,
        clean_dice=None if clean is None else clean.sample.dice,
        refusal=_refusal_code(facts),
    )
    snr, cnr = _reference_contrast(scan)
    sums = asdict(reduce_maps(maps, scan.prepared))
    mask_file = path.with_suffix(".mask")
    mask_file.write_bytes(np.packbits(mask).tobytes())
    entropy, eq8_ml = _paper_entropy(maps, scan.prepared, runner.temperature)
    observation = Observation(sample, _plain(sums), eq8_ml, entropy, snr, cnr, mask_file.name)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(observation)))
    part.replace(path)


def _refusal_code(facts: Facts) -> str | None:
    """With which code an image that is no T1 head must be refused."""
    if facts.expected != ("CANNOT_JUDGE",):
        return None
    return "unsupported_contrast" if facts.kind in OTHER_CONTRASTS else "not_a_head"


def _own_reference(scan: Stored, mask: NDArray[np.bool_], clean: Observation | None, path: Path) -> Array:
    """Where no labels exist, the student's own clean segmentation, moved to the box of this scan (whole cells)."""
    own = path.with_name(f"{scan.facts.head}-clean.reference.npz")
    if scan.facts.artefact == "clean" or clean is None:
        with own.open("wb") as file:
            np.savez_compressed(file, mask=mask, start_mm=np.array(scan.prepared.box.start_mm))
        return mask.astype(np.float32)
    with np.load(own) as data:
        return shift_cells(data["mask"], data["start_mm"], np.array(scan.prepared.box.start_mm), mask.shape)


def shift_cells(
    mask: NDArray[np.bool_], old_mm: NDArray[np.float64], new_mm: NDArray[np.float64], shape: tuple[int, ...]
) -> Array:
    """Place a mask of one box into another box, to the nearest cell of 2 mm."""
    out = np.zeros(shape, dtype=np.float32)
    target, source = [], []
    for axis in range(3):
        step = round(float(old_mm[axis] - new_mm[axis]) / 2.0)
        low, high = max(0, step), min(shape[axis], mask.shape[axis] + step)
        target.append(slice(low, high))
        source.append(slice(low - step, high - step))
    out[tuple(target)] = mask[tuple(source)]
    return out


def _reference_contrast(scan: Stored) -> tuple[float | None, float | None]:
    """Eq. 10 and 11 with the reference's tissues."""
    if scan.grey is None:
        return None, None
    values = scan.prepared.image[scan.truth()].astype(np.float64)
    spread = float(values.std())
    if spread <= 0:
        return None, None
    snr = float(values.mean()) / spread
    if scan.white is None or not scan.white.any():
        return snr, None
    white = float(scan.prepared.image[scan.white & scan.prepared.native_mask].mean())
    return snr, abs(float(values.mean()) - white) / spread


def _paper_entropy(maps: Maps, prepared: Prepared, temperature: float) -> tuple[float, float]:
    """Mean entropy of the scaled logits (Eq. 2) and the standard deviation of the volume in ml (Eq. 8), field of view."""
    fov = prepared.native_mask
    p = np.clip(maps.gm_probability[fov].astype(np.float64), 1e-7, 1 - 1e-7)
    total = (maps.task_variance + maps.artefact_variance.sum(axis=0))[fov].astype(np.float64)
    q = 1.0 / (1.0 + np.exp(-np.clip(temperature * np.log(p / (1 - p)) / (total + EPS), -60, 60)))
    q = np.clip(q, 1e-12, 1 - 1e-12)
    entropy = -(q * np.log(q) + (1 - q) * np.log1p(-q))
    eq8 = np.exp(2.0 * entropy) / (2.0 * math.pi * math.e)
    return float(entropy.mean()), VOXEL_ML * math.sqrt(float(eq8.sum()))


def _plain(sums: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(v) for v in value] if isinstance(value, tuple) else float(value)

    return {k: plain(v) for k, v in sums.items()}


def reduced_of(observation: Observation) -> Reduced:
    """The sums as `daemon.score` wants them."""
    raw = dict(observation.reduced)
    profiles = [np.asarray(p, dtype=np.float64) for p in raw.pop("profiles")]
    raw["artefact_fov"], raw["artefact_region"] = np.asarray(raw["artefact_fov"]), np.asarray(raw["artefact_region"])
    return Reduced(**raw, profiles=(profiles[0], profiles[1], profiles[2]))


def _read_observation(path: Path) -> Observation:
    raw = json.loads(path.read_text())
    return Observation(**{**raw, "sample": Sample(**raw["sample"])})


def mask_of(cache: Path, key: str, group: str, observation: Observation) -> NDArray[np.uint8]:
    """The packed segmentation of one scan."""
    return np.frombuffer((cache / key / group / observation.mask).read_bytes(), dtype=np.uint8)


def pairwise_dice(masks: Iterable[NDArray[np.uint8]]) -> float:
    """Mean Dice over all pairs of packed segmentations; 1.0 where two are empty."""
    packed = list(masks)
    sizes = [int(np.bitwise_count(m).sum()) for m in packed]
    values = []
    for i in range(len(packed)):
        for j in range(i):
            total = sizes[i] + sizes[j]
            values.append(2.0 * int(np.bitwise_count(packed[i] & packed[j]).sum()) / total if total else 1.0)
    return float(np.mean(values)) if values else 1.0


def severity(facts: Facts, losses: dict[str, float], severities: dict[str, Any]) -> str:
    """`clean`, `mild`, `moderate` or `visible`, by the Dice that the fixed reference loses; `unknown` without it."""
    if facts.artefact == "clean":
        return "clean"
    loss = losses.get(facts.name)
    if loss is None:
        return "unknown"
    if loss < severities["mild_below"]:
        return "mild"
    return "visible" if loss >= severities["visible_from"] else "moderate"
