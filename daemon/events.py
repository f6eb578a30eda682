"""The words of the event contract, version 1: streams, topics and the envelope around what is said.

An event is two frames, topic and body. The body is CloudEvents 1.0 JSON; `source` and `id` name it for ever, `stream` and
`sequence` place it, `epoch` changes only if the log is lost. Fields are only ever added within a version.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

STREAMS = ("score", "alert", "series", "health")
"""Streams with a dense sequence each; their events are in the log before they are sent."""

VERSION = "v1"
HEARTBEAT = "heartbeat"
HEARTBEAT_TOPIC = f"{VERSION}/{HEARTBEAT}/"


def topic_of(stream: str, scanner: str | None = None) -> str:
    """Topic of a stream; every segment ends with a slash, so that `mr1` never matches `mr10`."""
    return f"{VERSION}/{stream}/" if scanner is None else f"{VERSION}/{stream}/{scanner}/"


def subscription_of(stream: str) -> str:
    """What to subscribe to for every scanner's events of a stream."""
    return f"{VERSION}/{stream}/"


def event_id(stream: str, sequence: int) -> str:
    """Id of an event, unique within its epoch."""
    return f"{stream}-{sequence}"


def body_of(
    stream: str, sequence: int, epoch: str, at: float, data: Mapping[str, Any], scanner: str | None = None
) -> str:
    """The body of an event in the log.

    Args:
        stream: one of `STREAMS`.
        sequence: >= 1, dense within the stream.
        epoch: of the log.
        at: unix seconds.
        data: plain JSON values; a number that is not finite is an error.
        scanner: configured slug; None for what concerns no scanner.
    """
    return _dump(
        {
            **_attributes(stream, event_id(stream, sequence), epoch, at),
            **({} if scanner is None else {"subject": scanner}),
            "stream": stream,
            "sequence": sequence,
            "epoch": epoch,
            "data": data,
        }
    )


def heartbeat_body(number: int, epoch: str, at: float, last: Mapping[str, int], ready: bool) -> str:
    """The body of a heartbeat, the one message that is not in the log.

    Args:
        number: of the heartbeat since the publisher started.
        epoch: of the log.
        at: unix seconds.
        last: stream -> its last sequence, 0 for none.
        ready: whether a verdict would come now.
    """
    attributes = _attributes(HEARTBEAT, f"{HEARTBEAT}-{at:.3f}-{number}", epoch, at)
    return _dump({**attributes, "epoch": epoch, "data": {"last": dict(last), "ready": ready}})


def timestamp(at: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    milliseconds = round(at * 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(milliseconds // 1000))}.{milliseconds % 1000:03d}Z"


def _attributes(stream: str, name: str, epoch: str, at: float) -> dict[str, str]:
    return {
        "specversion": "1.0",
        "id": name,
        "source": f"urn:uuid:{epoch}",
        "type": f"rescan.{stream}.{VERSION}",
        "time": timestamp(at),
        "datacontenttype": "application/json",
        "dataschema": f"urn:rescan:schema:{VERSION}:{stream}",
    }


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
