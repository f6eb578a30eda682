"""docs/events.md names every topic, request, error, state and key that the code knows, and nothing else of the kind."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from daemon.alert import PUBLISHED, AckReason
from daemon.client import ANSWER_LIMIT_S, STALE_AFTER_S
from daemon.config import EventsSettings
from daemon.events import STREAMS
from daemon.keys import Role
from daemon.publish import REPLAY_BYTES, REPLAY_EVENTS

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
PUBLISH = (ROOT / "daemon" / "publish.py").read_text(encoding="utf-8")


def test_every_topic_is_there() -> None:
    """One row for each stream, and the heartbeat."""
    topics = set(re.findall(r"`v1/([a-z]+)/", TEXT))
    assert topics == {*STREAMS, "heartbeat"}


def test_every_request_and_error_is_there() -> None:
    """As the publisher spells them."""
    handled = set(re.findall(r'"(REPLAY|SNAPSHOT|ACK|PING)"', PUBLISH))
    assert handled == set(re.findall(r'"op": "([A-Z]+)"', TEXT))
    for error in set(re.findall(r'_error\([a-z]+, "([A-Z_]+)"|_error\(None, "([A-Z_]+)"|error="([A-Z]+)"', PUBLISH)):
        assert "".join(error) in TEXT


def test_every_state_reason_and_role_is_there() -> None:
    """The rows of the table of states are the published states."""
    rows = set(re.findall(r"^\| `([a-z]+)` \| ", TEXT.partition("## The life of an alert")[2], re.MULTILINE))
    assert rows >= {str(state) for state in PUBLISHED}
    for word in (*AckReason, *Role):
        assert f"`{word}`" in TEXT


def test_every_key_that_an_alert_adds_is_there() -> None:
    """The keys of the schema, and the sentences of its message."""
    schema = json.loads((resources.files("daemon") / "schemas" / "alert.json").read_text(encoding="utf-8"))
    data = schema["properties"]["data"]["properties"]
    for key in (*data, *data["message"]["properties"]):
        assert f"`{key}`" in TEXT


def test_the_numbers_are_those_of_the_code() -> None:
    """Endpoints, limits, waits."""
    settings = EventsSettings()
    for words in (
        settings.publish,
        settings.replay,
        f"every {settings.heartbeat_s:g} s",
        f"at most {REPLAY_EVENTS} or {REPLAY_BYTES >> 20} MiB",
        f"ask again after {ANSWER_LIMIT_S:g} s",
        f"No message for {STALE_AFTER_S:g} s",
        f"kept for {settings.retention_s / 86400:g} days",
    ):
        assert words in TEXT
