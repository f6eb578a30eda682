"""The card: the contract that travels inside a model file, and the only way to read one.

A model is one `.onnx` file. Its card is JSON under the ONNX metadata key `rescan.card`, its golden case stands beside it
under `rescan.golden`. Both are read here by walking the protobuf's outermost fields, so that nothing of an untrusted file
reaches an inference engine before its size, its structure and its hashes are known to be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.words import ARTEFACTS

CARD_VERSION = 1
CARD_KEY = "rescan.card"
GOLDEN_KEY = "rescan.golden"
REDUCER_KEY = "rescan.reducer"

MAX_MODEL_BYTES = 128 * 2**20
"""A student is at most 25 MB; the paper's own network (14.5 M weights) is 58 MB. Anything larger is not a student."""

MAX_CARD_BYTES = 2 * 2**20
MAX_GOLDEN_BYTES = 2 * 2**20
"""The golden case, compressed and in base64, may take at most this much of the file."""

ONNX_GRAPH_FIELD = 7
ONNX_METADATA_FIELD = 14
"""Field numbers of `ModelProto` in onnx.proto3: `graph = 7`, `metadata_props = 14`."""


class CardError(Exception):
    """A model file that this daemon must not serve; the message is one line and ends with the remedy."""


@dataclass(frozen=True)
class Knots:
    """A monotone, piecewise linear map, constant beyond its ends.

    Attributes:
        x: strictly increasing.
        y: as long as `x`, monotone.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Term:
    """One summand of the risk: `weight * ln(score + floor)`.

    Attributes:
        score: name of a raw score (see `daemon.score.RAW_SCORES`).
        weight: >= 0, so that the risk grows with every score it is made of.
        floor: > 0, keeps the logarithm finite; in the unit of the score.
    """

    score: str
    weight: float
    floor: float


@dataclass(frozen=True)
class Bound:
    """Conformal offsets of predicted Dice for the scans whose risk is at most `risk_upto`.

    Attributes:
        risk_upto: upper end of the bin (the last bin holds everything above as well).
        low: <= 0, added to predicted Dice for the lower bound.
        high: >= 0, added to predicted Dice for the upper bound.
        scans: how many calibration scans the two numbers rest on.
    """

    risk_upto: float
    low: float
    high: float
    scans: int


@dataclass(frozen=True)
class Gate:
    """A linear refusal rule on the features of `daemon.score.gate_features`: refused where the sum exceeds `limit`.

    Attributes:
        code: refusal code (`not_a_head` or `unsupported_contrast`).
        weights: feature name -> factor.
        limit: the largest sum that is still judged.
    """

    code: str
    weights: dict[str, float]
    limit: float


@dataclass(frozen=True)
class Calibration:
    """Everything that turns maps into numbers with a meaning; fitted by `rescan-train calibrate`.

    Attributes:
        population: the scans that the guarantee holds for, in words.
        risk: summands of the risk, the one number that predicted Dice and Test B are functions of.
        dice: risk -> predicted Dice, decreasing.
        bounds: conformal offsets in order of rising risk.
        bound_rate: each bound of predicted Dice is exceeded by at most this share of scans; and Test A fires on at most this
            share of the scans that reach what is required.
        required_dice: the default requirement, fixed before calibration.
        alarm_risk: Test B fires above this risk: an order statistic of clean scans.
        alarm_rate: stated false-alarm rate of Test B.
        alarm_confidence: confidence with which that rate is not exceeded.
        alarm_scans: number of clean scans the order statistic rests on.
        artefact_clean: per artefact, median of ln(mean sigma_i^2) over clean scans.
        artefact_unmixing: 5 x 5, rows and columns in the order of `ARTEFACTS`: excess of ln sigma^2 -> strength, 1.0
            being a typical *visible* artefact. The inverse of the leakage matrix, or a diagonal.
        affected_variance: a voxel counts as affected where the sum of artefact variances exceeds this.
        volume_width: risk -> multiplier of the independent-voxel error of grey-matter volume (95 % interval), increasing.
        gates: refusal rules of the image.
        samples: how many scans, subjects and which seeds it was fitted with.
        acceptable_risk: required Dice -> the risk above which Test A fires, falling: an order statistic of the scans that
            reach this Dice. Beyond its end, and where it is None, Test A compares the upper bound of predicted Dice instead.
    """

    population: str
    risk: tuple[Term, ...]
    dice: Knots
    bounds: tuple[Bound, ...]
    bound_rate: float
    required_dice: float
    alarm_risk: float
    alarm_rate: float
    alarm_confidence: float
    alarm_scans: int
    artefact_clean: tuple[float, ...]
    artefact_unmixing: tuple[tuple[float, ...], ...]
    affected_variance: float
    volume_width: Knots
    gates: tuple[Gate, ...]
    samples: dict[str, Any] = field(default_factory=dict)
    acceptable_risk: Knots | None = None


@dataclass(frozen=True)
class Golden:
    """What the golden case must give on every engine before the daemon is ready.

    Attributes:
        sha256: of the base64 text under `rescan.golden`.
        scores: the raw scores and, with a calibration, the calibrated ones.
        verdict: the verdict with the card's own rule; null without a calibration.
        tolerance: largest relative difference of a score.
    """

    sha256: str
    scores: dict[str, float]
    verdict: str | None
    tolerance: float


@dataclass(frozen=True)
class Card:
    """The contract inside a model file.

    Attributes:
        card_version: `CARD_VERSION` of the writer; the daemon refuses any other.
        name, version: of the model.
        artefacts: channel order of `artefact_variance`; must equal `daemon.words.ARTEFACTS`.
        input_name: name of the one input, (1, 1, D, H, W) float32.
        outputs: output name -> meaning, shape and range.
        spacing_mm: voxel edge of the prepared volume.
        orientation: direction of the three axes of increasing index.
        preparation: the intensity preparation in words.
        buckets: allowed (D, H, W), smallest first.
        temperature: divisor of the logits before softmax, baked into the graph at export.
        graph_sha256: hash of the graph's bytes, weights included; empty only while the file is being written.
        opset: ONNX opset of the graph.
        operators: operator -> how many of them.
        weights: number of weights.
        activation_bytes_per_voxel: peak of live activations in float32, over the voxels of a bucket.
        gigaflops: bucket as "DxHxW" -> 1e9 floating-point operations of its convolutions.
        precisions: engine -> precisions admitted by parity beside fp32.
        intended_use, limits, licence: in words.
        training, evaluation: facts and figures, as the training and evaluation commands wrote them.
        golden: the golden case's expected scores.
        calibration: null for a model that may not be served yet.
    """

    card_version: int
    name: str
    version: str
    artefacts: tuple[str, ...]
    input_name: str
    outputs: dict[str, str]
    spacing_mm: float
    orientation: str
    preparation: str
    buckets: tuple[tuple[int, int, int], ...]
    temperature: float
    graph_sha256: str
    opset: int
    operators: dict[str, int]
    weights: int
    activation_bytes_per_voxel: float
    gigaflops: dict[str, float]
    precisions: dict[str, tuple[str, ...]]
    intended_use: str
    limits: tuple[str, ...]
    licence: str
    training: dict[str, Any]
    evaluation: dict[str, Any]
    golden: Golden | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class ModelFile:
    """One model file, read once: what is hashed is what is served.

    Attributes:
        data: the bytes of the file.
        sha256: of `data`; every verdict carries it.
        card: its contract.
        golden: compressed golden case in base64, empty where there is none.
        reducer: the small graph in base64 that reduces maps on a device, empty where there is none.
    """

    data: bytes
    sha256: str
    card: Card
    golden: str = ""
    reducer: str = ""


def read_model(path: Path) -> ModelFile:
    """Read a model file and check it as far as that goes without an engine.

    Raises:
        CardError: not there, too large, truncated, foreign, altered, or a card that this daemon does not understand.
    """
    data = _read_bytes(path)
    metadata = _metadata(data, path.name)
    if CARD_KEY not in metadata:
        raise CardError(f"{path.name}: no card inside (metadata key {CARD_KEY}); export it with `rescan-export onnx`")
    card = parse_card(metadata[CARD_KEY], path.name)
    found = graph_sha256(data, path.name)
    if card.graph_sha256 != found:
        raise CardError(
            f"{path.name}: the graph is not the one its card describes (expected {card.graph_sha256[:12]}, got {found[:12]}); "
            "copy or export the file again"
        )
    return ModelFile(
        data, hashlib.sha256(data).hexdigest(), card, metadata.get(GOLDEN_KEY, ""), metadata.get(REDUCER_KEY, "")
    )


def read_card(path: Path) -> Card:
    """Read the card alone.

    Raises:
        CardError: as `read_model`.
    """
    return read_model(path).card


def card_json(card: Card) -> str:
    """The card as JSON text, keys in the order of the fields."""
    return json.dumps(dataclasses.asdict(card), ensure_ascii=False, allow_nan=False)


def parse_card(text: str, source: str = "card") -> Card:
    """Build a card from JSON text.

    Args:
        text: JSON object.
        source: named in errors.

    Raises:
        CardError: not JSON, a version this daemon does not know, a missing, unknown or ill-typed key, an order of
            artefacts other than this daemon's, or a calibration that contradicts itself.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise CardError(f"{source}: the card is not JSON ({error}); export the file again") from None
    version = raw.get("card_version") if isinstance(raw, dict) else None
    if version != CARD_VERSION:
        raise CardError(
            f"{source}: card version {version!r}, this daemon understands {CARD_VERSION}; "
            "export the model with the version of Rescan that serves it"
        )
    card = typing.cast(Card, _build(Card, raw, source, "card"))
    if card.artefacts != ARTEFACTS:
        raise CardError(f"{source}: artefacts {card.artefacts}, expected {ARTEFACTS}; export the model again")
    if card.calibration is not None:
        check_calibration(card.calibration, source)
    return card


def parse_calibration(raw: dict[str, Any], source: str) -> Calibration:
    """Build a calibration from decoded JSON.

    Raises:
        CardError: a missing, unknown or ill-typed key, or one that contradicts another.
    """
    calibration = typing.cast(Calibration, _build(Calibration, raw, source, "calibration"))
    check_calibration(calibration, source)
    return calibration


def check_calibration(calibration: Calibration, source: str) -> None:
    """Check what types cannot say.

    Raises:
        CardError: knots that are not monotone, a negative weight, a wrong matrix shape.
    """
    c = calibration
    problems = [
        (len(c.risk) > 0 and all(t.weight >= 0 and t.floor > 0 for t in c.risk), "risk needs weights >= 0, floors > 0"),
        (_is_monotone(c.dice, rising=False), "dice knots must rise in x and fall in y"),
        (_is_monotone(c.volume_width, rising=True), "volume_width knots must rise in x and in y"),
        (
            c.acceptable_risk is None or _is_monotone(c.acceptable_risk, rising=False),
            "acceptable_risk knots must rise in x and fall in y",
        ),
        (len(c.bounds) > 0 and all(b.low <= 0 <= b.high for b in c.bounds), "bounds need low <= 0 <= high"),
        (0 < c.required_dice < 1, "required_dice must lie in (0, 1)"),
        (len(c.artefact_clean) == len(ARTEFACTS), "artefact_clean needs one number per artefact"),
        (
            len(c.artefact_unmixing) == len(ARTEFACTS) and all(len(r) == len(ARTEFACTS) for r in c.artefact_unmixing),
            "artefact_unmixing must be 5 x 5",
        ),
    ]
    for holds, text in problems:
        if not holds:
            raise CardError(f"{source}: calibration: {text}; run `rescan-train calibrate` again")


def replace_metadata(data: bytes, entries: dict[str, str], source: str = "model") -> bytes:
    """The same model with other metadata: the bytes of the graph are not touched.

    Args:
        data: a serialised ONNX model.
        entries: key -> value; a key that exists already is replaced.
        source: named in errors.

    Raises:
        CardError: `data` is not a whole ONNX model.
    """
    kept = [
        data[start:end]
        for number, start, body, end in _fields(data, source)
        if number != ONNX_METADATA_FIELD or _entry(data[body:end], source)[0] not in entries
    ]
    return b"".join(kept) + b"".join(_encode_entry(key, value) for key, value in entries.items())


def graph_sha256(data: bytes, source: str = "model") -> str:
    """Hash of the bytes of the graph, weights included.

    Raises:
        CardError: `data` is not a whole ONNX model with a graph.
    """
    for number, _, body, end in _fields(data, source):
        if number == ONNX_GRAPH_FIELD:
            return hashlib.sha256(data[body:end]).hexdigest()
    raise CardError(f"{source}: no graph inside; it is not an ONNX model, give a file made by `rescan-export onnx`")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan card FILE`: print the card as JSON."""
    parser = subparsers.add_parser("card", help="print the card inside a model file as JSON")
    parser.add_argument("file", type=Path, help="an .onnx file made by `rescan-export onnx`")
    parser.set_defaults(func=_print_card)


def _print_card(args: argparse.Namespace) -> int:
    try:
        card = read_card(args.file)
    except CardError as error:
        print(f"rescan card: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False, allow_nan=False))
    return 0


def _read_bytes(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_MODEL_BYTES:
            raise CardError(f"{path.name}: {size_bytes} bytes, at most {MAX_MODEL_BYTES}; it is not a Rescan student")
        return path.read_bytes()
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror}); give the path of a model file") from None


def _metadata(data: bytes, source: str) -> dict[str, str]:
    limits = {CARD_KEY: MAX_CARD_BYTES, GOLDEN_KEY: MAX_GOLDEN_BYTES, REDUCER_KEY: MAX_CARD_BYTES}
    entries: dict[str, str] = {}
    for number, _, body, end in _fields(data, source):
        if number != ONNX_METADATA_FIELD:
            continue
        key, value = _entry(data[body:end], source)
        if len(value) > limits.get(key, MAX_CARD_BYTES):
            raise CardError(f"{source}: metadata {key} of {len(value)} bytes, at most {limits[key]}; export it again")
        entries[key] = value
    return entries


def _fields(data: bytes, source: str) -> Iterator[tuple[int, int, int, int]]:
    """Walk the outermost fields: (number, start, start of the body, end)."""
    position = 0
    while position < len(data):
        start = position
        tag, position = _varint(data, position, source)
        number, kind = tag >> 3, tag & 7
        body = position
        if kind == 0:
            _, position = _varint(data, position, source)
        elif kind == 2:
            length, body = _varint(data, position, source)
            position = body + length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise _foreign(source)
        if number == 0:
            raise _foreign(source)
        if position > len(data):
            raise CardError(f"{source}: truncated ({len(data)} of {position} bytes or more); copy the file again")
        yield number, start, body, position


def _varint(data: bytes, position: int, source: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise CardError(f"{source}: truncated after {len(data)} bytes; copy the file again")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _foreign(source)


def _foreign(source: str) -> CardError:
    return CardError(f"{source}: not an ONNX model; give a file made by `rescan-export onnx`")


def _entry(body: bytes, source: str) -> tuple[str, str]:
    parts = {number: body[start:end] for number, _, start, end in _fields(body, source)}
    try:
        return parts.get(1, b"").decode(), parts.get(2, b"").decode()
    except UnicodeDecodeError:
        raise _foreign(source) from None


def _encode_entry(key: str, value: str) -> bytes:
    body = b"".join(_encode_field(n, text.encode()) for n, text in ((1, key), (2, value)))
    return _encode_field(ONNX_METADATA_FIELD, body)


def _encode_field(number: int, body: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(body)) + body


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _is_monotone(knots: Knots, *, rising: bool) -> bool:
    sign = 1.0 if rising else -1.0
    steps_x = [b > a for a, b in zip(knots.x, knots.x[1:], strict=False)]
    steps_y = [sign * (b - a) >= 0 for a, b in zip(knots.y, knots.y[1:], strict=False)]
    return 0 < len(knots.x) == len(knots.y) and all(steps_x) and all(steps_y)


def _build(kind: Any, value: Any, source: str, where: str) -> Any:
    """Build a value of a type from decoded JSON; the types are those that this file's dataclasses use."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, source, where)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        return None if value is None else _build(inner[0], value, source, where)
    if origin is tuple and isinstance(value, list | tuple):
        return _build_tuple(typing.get_args(kind), value, source, where)
    if origin is dict and isinstance(value, dict):
        return {str(k): _build(typing.get_args(kind)[1], v, source, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise CardError(f"{source}: {where}: expected {kind}, got {value!r:.60}; export the model again")


def _build_dataclass(kind: Any, value: Any, source: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise CardError(f"{source}: {where}: expected an object, got {value!r:.60}; export the model again")
    hints = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    missing, unknown = needed - value.keys(), value.keys() - hints.keys()
    if missing or unknown:
        names = ", ".join(sorted(missing or unknown))
        fault = "missing" if missing else "unknown"
        raise CardError(f"{source}: {where}: {fault} {names}; export the model with the version that serves it")
    return kind(**{name: _build(hints[name], item, source, f"{where}.{name}") for name, item in value.items()})


def _build_tuple(kinds: tuple[Any, ...], value: Any, source: str, where: str) -> Any:
    if kinds[-1] is Ellipsis:
        return tuple(_build(kinds[0], item, source, f"{where}[{n}]") for n, item in enumerate(value))
    if len(kinds) != len(value):
        raise CardError(f"{source}: {where}: expected {len(kinds)} items, got {len(value)}; export the model again")
    return tuple(_build(k, item, source, f"{where}[{n}]") for n, (k, item) in enumerate(zip(kinds, value, strict=True)))
