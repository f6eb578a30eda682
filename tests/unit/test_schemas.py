"""The event contract: what is published fits its schema, and messages of the first version stay readable for ever."""

from __future__ import annotations

import contextlib
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from daemon.events import STREAMS, body_of, heartbeat_body, subscription_of, timestamp, topic_of
from daemon.flow import Served, make_result
from daemon.follow import Heard, hear_answer, hear_beat, hear_event
from daemon.ledger import Ledger
from daemon.result import TIMINGS, Identity
from daemon.score import SCORES, Scores, WorstSlice
from daemon.scorer import Scored
from daemon.stack import Evidence
from daemon.watch import Board, render
from daemon.words import ARTEFACTS, Reason, Verdict
from tests.event_builders import SHA256, START, reference, result
from tests.model_builders import made_up_calibration, made_up_card

GOLDEN = Path(__file__).parent.parent / "golden" / "events-v1"
NAMES = ("result", *STREAMS, "heartbeat")


def schemas() -> dict[str, dict[str, Any]]:
    folder = resources.files("daemon") / "schemas"
    return {
        f.name.removesuffix(".json"): json.loads(f.read_text()) for f in folder.iterdir() if f.name.endswith(".json")
    }


def validator(name: str) -> Draft202012Validator:
    found = schemas()
    registry: Registry[Any] = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in found.values()
    )
    return Draft202012Validator(found[name], registry=registry)


def published(tmp_path: Path) -> list[dict[str, Any]]:
    """Every kind of event that a ledger writes."""
    with contextlib.closing(Ledger(tmp_path / "l.db", clock=lambda: START + 10)) as ledger:
        ledger.record_health({"ready": True})
        ledger.record(result("a", final=False, duration_s=312.0, protocol_ref=reference("p")))
        ledger.record(result("a"))
        ledger.acknowledge(ledger.open_alerts()[0].alert_id, "rescanning", "A.B.")
        ledger.record(result("b", "PASS", ended_at=START + 300, protocol_ref=reference("p")))
        ledger.record(result("c", "CANNOT_JUDGE"))
        ledger.record(result("d", "REVIEW", required=None, ended_at=None))
        ledger.record(result("e", rule="t2", exam="e2", shadow=True))
        return [json.loads(event.body) for event in ledger.events_since(0, 999)]


def test_there_is_one_schema_for_each_stream_and_it_is_sound() -> None:
    """Result, four streams, heartbeat; each names itself as events do in `dataschema`."""
    assert set(schemas()) == set(NAMES)
    for name, schema in schemas().items():
        Draft202012Validator.check_schema(schema)
        assert schema["$id"] == f"urn:rescan:schema:v1:{name}"


def test_every_event_fits_its_schema(tmp_path: Path) -> None:
    """All streams, an alert in several states."""
    events = published(tmp_path)
    assert {event["stream"] for event in events} == set(STREAMS)
    assert [e["data"]["state"] for e in events if e["stream"] == "alert"] == [
        "raised",
        "raised",
        "acknowledged",
        "resolved",
    ]
    for event in events:
        validator(event["stream"]).validate(event)
    validator("heartbeat").validate(
        json.loads(heartbeat_body(1, events[0]["epoch"], START, dict.fromkeys(STREAMS, 0), True))
    )


def test_the_schema_knows_every_word_of_the_code() -> None:
    """Scores with their ranges, artefacts, timings, verdicts: one list."""
    properties = schemas()["result"]["properties"]
    assert list(properties["scores"]["properties"]) == list(SCORES)
    for name, score in SCORES.items():
        told = properties["scores"]["properties"][name]
        assert (told.get("minimum"), told.get("maximum")) == (score.low, score.high)
        assert told["description"].startswith(score.text)
    assert list(properties["artefacts"]["properties"]) == list(ARTEFACTS)
    assert list(properties["timing_s"]["properties"]) == list(TIMINGS)
    assert properties["verdict"]["enum"] == [str(each) for each in Verdict]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "MAYBE"),
        (("revision",), 0),
        (("scores", "predicted_dice"), 1.2),
        (("scores", "predicted_dice"), "0.9"),
        (("artefacts", "motion", "score"), -1),
        (("reasons",), []),
        (("dominant_artefact",), "ghost"),
    ],
)
def test_what_is_wrong_does_not_fit(path: tuple[str, ...], value: object) -> None:
    """A schema that lets everything through would prove nothing."""
    made = result()
    place = made
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        validator("result").validate(made)


def test_topics_end_with_a_slash() -> None:
    """So `mr1` never matches `mr10`, and one prefix takes all scanners."""
    assert topic_of("alert", "mr1") == "v1/alert/mr1/"
    assert topic_of("health") == "v1/health/"
    assert not topic_of("alert", "mr10").startswith(topic_of("alert", "mr1"))
    assert all(topic_of(stream, "mr1").startswith(subscription_of(stream)) for stream in STREAMS)


def test_the_envelope_is_cloudevents() -> None:
    """The required attributes, extension names of small letters alone, an id that is unique in its source."""
    body = json.loads(body_of("score", 7, reference("x"), START, {"a": 1}, "mr1"))
    assert {"specversion", "id", "source", "type"} <= set(body)
    assert body["specversion"] == "1.0"
    assert all(name.isalnum() and name.islower() for name in set(body) - {"data"})
    assert body["id"] != json.loads(body_of("alert", 7, reference("x"), START, {}, "mr1"))["id"]
    with pytest.raises(ValueError, match="JSON"):
        body_of("score", 1, "e", START, {"a": math.nan})


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000.0014, "2023-11-14T22:13:20.001Z"),
        (1_700_000_000.9999, "2023-11-14T22:13:21.000Z"),
    ],
)
def test_times_are_rfc_3339(at: float, text: str) -> None:
    """UTC, milliseconds, rounded over the second."""
    assert timestamp(at) == text


def golden() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / "messages.jsonl").read_text().splitlines()]


def test_messages_of_the_first_version_fit_todays_schemas() -> None:
    """Within a version fields are only added: what was once said is still valid."""
    messages = golden()
    assert {m["dataschema"].rpartition(":")[2] for m in messages} == {*STREAMS, "heartbeat"}
    for message in messages:
        validator(message["dataschema"].rpartition(":")[2]).validate(message)


def test_todays_messages_hold_every_field_of_the_first_ones(tmp_path: Path) -> None:
    """A reader written for the first messages finds all it knew, of the same kind."""
    today = {m["id"]: m for m in published(tmp_path)}
    for message in golden():
        if "stream" in message:
            assert_holds(today[message["id"]], message, message["id"])


def assert_holds(new: Any, old: Any, where: str) -> None:
    """Every key of the old is in the new, with a value of the same kind."""
    if isinstance(old, dict):
        assert isinstance(new, dict), where
        for key, value in old.items():
            assert key in new, f"{where}.{key} is gone"
            assert_holds(new[key], value, f"{where}.{key}")
    elif isinstance(old, list):
        assert isinstance(new, list), where
        if old and new:
            assert_holds(new[0], old[0], f"{where}[0]")
    else:
        number = isinstance(old, int | float) and not isinstance(old, bool)
        assert isinstance(new, int | float) if number else type(new) is type(old), f"{where}: {old!r} became {new!r}"


def test_the_client_understands_the_first_answers() -> None:
    """Replies of the first version, as today's client reads them."""
    answers = json.loads((GOLDEN / "answers.json").read_text())
    assert hear_answer(0, answers["replay"]) is Heard.PAGE_LAST
    assert hear_answer(0, answers["replay_more"]) is Heard.PAGE_MORE
    assert hear_answer(0, answers["gone"]) is Heard.GONE
    assert hear_answer(0, answers["bad_request"]) is None
    assert hear_answer(99, answers["replay"]) is Heard.WENT_BACK


def test_the_client_and_the_table_understand_the_first_messages() -> None:
    """Positions and the terminal's table are made from them."""
    board = Board(live=True, ready=True)
    for message in golden():
        if message.get("stream") in ("score", "alert"):
            board.take(message)
            assert hear_event(message["sequence"] - 1, message["sequence"]) is Heard.NEXT
        elif "stream" not in message:
            assert hear_beat(0, message["data"]["last"]["alert"]) in (Heard.BEAT_EVEN, Heard.BEAT_AHEAD)
    text = "\n".join(render(board, 200, 40, START + 60, colour=False))
    assert "RESCAN" in text
    assert "No open alert." in text


def test_what_the_daemon_makes_of_a_scan_fits_the_schema() -> None:
    """A refused stack before any model is loaded, and a scored one with every key that a card can give."""
    identity = Identity(reference("series"), reference("stack"), reference("exam"), "mr1")
    evidence = Evidence("geometry", 176, None, None)
    rest = {"result_id": reference("r"), "final": True, "revision": 2, "supersedes": reference("q"), "shadow": False}
    refused = make_result(
        identity, Scored(None, Reason("localizer", "A localizer.")), None, None, None, evidence, timing_s={}, **rest
    )
    validator("result").validate(refused)
    values = {name: definition.low if definition.low is not None else -1.0 for name, definition in SCORES.items()}
    artefacts = {name: {"score": 0.5, "uncertainty": 0.1} for name in ARTEFACTS}
    scores = Scores(values, artefacts, (WorstSlice("axial", 3, 6.0, 0.2, "top"),), {"gm_ml": 600.0}, -2.0)
    served = Served(
        made_up_card(made_up_calibration()), SHA256, {"provider": "cpu", "precision": "float32", "device": "cpu"}
    )
    scored = make_result(
        identity,
        Scored(scores, None, {}),
        served,
        None,
        None,
        evidence,
        timing_s=dict.fromkeys(TIMINGS, 1.0),
        extra={"series": {"number": 5, "instances": 176, "began_at": START, "ended_at": START, "duration_s": 312.0}},
        **rest,
    )
    validator("result").validate(scored)
    assert json.loads(json.dumps(scored)) == scored
