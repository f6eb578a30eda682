"""The card and the file around it: what is read, and what is refused with a remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from daemon.card import (
    CARD_KEY,
    MAX_MODEL_BYTES,
    CardError,
    Knots,
    card_json,
    check_calibration,
    graph_sha256,
    parse_card,
    read_card,
    read_model,
    replace_metadata,
)
from tests.model_builders import made_up_calibration, made_up_card

GRAPH = b"\x12\x04some graph bytes"


def model_bytes(graph: bytes = GRAPH) -> bytes:
    """A ModelProto of three fields: ir_version 9, the graph, an empty opset entry."""
    return b"\x08\x09" + b"\x3a" + bytes([len(graph)]) + graph + b"\x42\x00"


def write_file(path: Path, **changes: object) -> Path:
    card = dataclasses.replace(made_up_card(made_up_calibration()), graph_sha256=graph_sha256(model_bytes()), **changes)
    path.write_bytes(replace_metadata(model_bytes(), {CARD_KEY: card_json(card), "other": "kept"}))
    return path


def test_a_card_survives_the_file(tmp_path: Path) -> None:
    """What is written is what is read, calibration and infinite care included."""
    card = read_card(write_file(tmp_path / "m.onnx"))
    assert card.calibration == made_up_calibration()
    assert parse_card(card_json(card)) == card


def test_metadata_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    """A second card takes the place of the first; other keys and the graph stay as they are."""
    data = write_file(tmp_path / "m.onnx").read_bytes()
    again = replace_metadata(data, {CARD_KEY: "new"})
    assert again.count(CARD_KEY.encode()) == 1
    assert b"kept" in again
    assert graph_sha256(again) == graph_sha256(data)
    assert replace_metadata(data, {"x": "y" * 70_000}).endswith(b"y" * 100)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    """A file cut anywhere is named truncated, foreign or without a card; always one line with a remedy."""
    data = write_file(tmp_path / "m.onnx").read_bytes()
    short = tmp_path / "short.onnx"
    short.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CardError, match=r"^[^\n]*; (copy|give|export)[^\n]*$"):
        read_model(short)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\xff" * 64, b"hello world, not a model", bytes(200)])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Bytes of another kind end in one line, not in a traceback."""
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    with pytest.raises(CardError, match=r"foreign\.onnx: [^\n]+"):
        read_model(path)


def test_one_altered_byte_of_the_graph_is_found(tmp_path: Path) -> None:
    """The card holds the hash of the graph: a single altered weight makes the file unservable."""
    path = write_file(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"graph bytes", b"graph bytez"))
    with pytest.raises(CardError, match="not the one its card describes"):
        read_model(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_card_version_is_refused(tmp_path: Path, version: object) -> None:
    """The message says which version was found and which is understood."""
    raw = json.loads(card_json(made_up_card())) | {"card_version": version}
    path = tmp_path / "m.onnx"
    path.write_bytes(replace_metadata(model_bytes(), {CARD_KEY: json.dumps(raw)}))
    with pytest.raises(CardError, match=f"card version {version!r}.* understands 1"):
        read_card(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("buckets", [[96, 112]], "expected 3 items"),
        ("weights", "many", "card.weights: expected"),
        ("weights", True, "card.weights: expected"),
        ("limits", {}, "card.limits: expected"),
        ("artefacts", ["noise"], "artefacts"),
        ("surprise", 1, "unknown surprise"),
        ("calibration", {"population": "x"}, "missing"),
        ("golden", 3, "card.golden: expected an object"),
    ],
)
def test_an_ill_typed_card_is_refused(key: str, value: object, message: str) -> None:
    """Every wrong key is named with its place and value."""
    raw = json.loads(card_json(made_up_card(made_up_calibration()))) | {key: value}
    with pytest.raises(CardError, match=message):
        parse_card(json.dumps(raw), "m.onnx")


def test_a_missing_key_is_named() -> None:
    """A card without its licence says so."""
    raw = json.loads(card_json(made_up_card()))
    del raw["licence"]
    with pytest.raises(CardError, match="missing licence"):
        parse_card(json.dumps(raw))
    with pytest.raises(CardError, match="not JSON"):
        parse_card("{")


def test_a_contradicting_calibration_is_refused() -> None:
    """Predicted Dice that rises with the risk, or knots out of order, are named."""
    with pytest.raises(CardError, match="dice knots"):
        made_up_calibration(dice={"x": [0.0, 1.0], "y": [0.1, 0.9]})
    with pytest.raises(CardError, match="volume_width"):
        check_calibration(
            dataclasses.replace(made_up_calibration(), volume_width=Knots((1.0, 0.0), (1.0, 2.0))), "card"
        )
    with pytest.raises(CardError, match="5 x 5"):
        made_up_calibration(artefact_unmixing=[[1.0]])
    with pytest.raises(CardError, match="low <= 0 <= high"):
        made_up_calibration(bounds=[{"risk_upto": 1.0, "low": 0.1, "high": 0.2, "scans": 1}])


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file above the limit is refused by its size alone."""
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)
    with pytest.raises(CardError, match="at most"):
        read_model(path)


def test_an_absent_file_is_one_line(tmp_path: Path) -> None:
    """The path and the remedy are in the message."""
    with pytest.raises(CardError, match=r"none\.onnx: cannot be read"):
        read_model(tmp_path / "none.onnx")
