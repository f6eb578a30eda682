"""Rules and dashboards against a real Prometheus that scraped a real daemon: nothing empty, nothing erroneous."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
import zmq

from daemon.audit import FILE_NAME, Kind, entries, verify
from daemon.metrics import METRICS
from tests.conftest import ROOT
from tests.deploy.watching import Prometheus
from tests.pushing import head, push
from tests.serving import QUICK, Listener, Serving, patience

GRAFANA = ROOT / "deploy" / "grafana"
BOARDS = {
    file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((GRAFANA / "dashboards").glob("*.json"))
}
SCANNER = '[[scanners]]\nslug = "mr1"\nae_title = "SCANNER"\naddress = "127.0.0.1"\n'

STAND_FOR = {
    "$__rate_interval": "2m",
    "$__range": "5m",
    "$__interval": "15s",
    "$instance": ".*",
    "$scanner": ".*",
    "$rule": ".*",
}
"""What Grafana puts in the place of its variables."""

NOTHING_HAPPENED = ("rescan_alert_display_seconds",)
"""Without a browser nothing is displayed: a quantile of nothing is not a number."""


def targets() -> list[tuple[str, str]]:
    """(Panel, query) of every panel of every dashboard."""
    return [
        (f"{name}: {panel['title']}", target["expr"])
        for name, board in BOARDS.items()
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]


def filled(query: str) -> str:
    for name, value in STAND_FOR.items():
        query = query.replace(name, value)
    return query


def acknowledge(port: int, alert_id: str) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.linger = 0
        asking.connect(f"tcp://127.0.0.1:{port}")
        asking.send_json({"op": "ACK", "alert_id": alert_id, "reason": "rescanning", "by": "KL"})
        assert asking.poll(int(1000 * patience(20)))
        assert "error" not in asking.recv_json()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, strict_student: Path) -> Iterator[tuple[Serving, Prometheus]]:
    """Two series, an alert that is answered and a refusal, all seen by Prometheus as they happen."""
    folder = tmp_path_factory.mktemp("watched")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with (
        Serving(folder / "state", model=strict_student, config=QUICK + SCANNER) as daemon,
        Prometheus(folder / "prometheus", port, daemon.ports["http"]) as prometheus,
        Listener(daemon.ports["events"]).connected() as listener,
    ):
        for number in (1, 2):
            push(daemon.ports["dicom"], head(f"watched {number}"))
            prometheus.until(lambda n=number: prometheus.values('rescan_series_total{outcome="scored"} > 0')[:1] == [n])
        # The first alert expired when the second exam began.
        alerts = [body["data"] for topic, body in listener.messages if topic.startswith("v1/alert/")]
        prometheus.until(lambda: prometheus.values("rescan_alerts_waiting > 0") == [1.0])
        acknowledge(daemon.ports["replay"], alerts[-1]["alert_id"])
        prometheus.until(lambda: sum(prometheus.values("rescan_alerts_waiting")) == 0)
        push(daemon.ports["dicom"], head("spin", ScanningSequence="SE"))
        prometheus.until(lambda: prometheus.values("rescan_series_skipped_total") == [1.0])
        prometheus.until(lambda: prometheus.values('rescan_alert_feedback_total{verdict="rescanning"} > 0') == [1.0])
        yield daemon, prometheus


def test_prometheus_scrapes_and_has_loaded_every_rule(watched: tuple[Serving, Prometheus]) -> None:
    """The target is up, no rule failed in its evaluation, and on a sound daemon none fires but that for little room."""
    _, prometheus = watched
    assert prometheus.values('up{job="rescan"}') == [1.0]
    prometheus.until(
        lambda: all(r["health"] == "ok" for g in prometheus.get("rules")["groups"] for r in g["rules"]),
        what="rules evaluated",
    )
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(
        re.findall(r"^ +- (?:alert|record):", (ROOT / "deploy/prometheus/rules.yml").read_text(), re.MULTILINE)
    )
    assert prometheus.firing() - {"RescanDiskLow", "RescanNoSeries"} == set()


@pytest.mark.parametrize(("panel", "query"), targets(), ids=[f"{name}-{n}" for n, (name, _) in enumerate(targets())])
def test_no_panel_is_empty(watched: tuple[Serving, Prometheus], panel: str, query: str) -> None:
    """Every query of every dashboard gives numbers."""
    _, prometheus = watched
    quiet = any(name in query for name in NOTHING_HAPPENED)

    def shown() -> bool:
        values = prometheus.values(filled(query))
        return bool(values) if quiet else any(map(math.isfinite, values))

    prometheus.until(shown, what=f"{panel}: {filled(query)}")


def test_the_acknowledgement_stands_in_the_audit(watched: tuple[Serving, Prometheus]) -> None:
    """Who, why, and about which alert; the chain holds."""
    path = watched[0].state / FILE_NAME
    said = [entry.data for entry in entries(path) if entry.kind is Kind.ACKNOWLEDGED]
    assert [(each["by"], each["reason"], each["scanner"]) for each in said] == [("KL", "rescanning", "mr1")]
    assert verify(path) >= 4


def test_every_variable_of_a_dashboard_has_values(watched: tuple[Serving, Prometheus]) -> None:
    """What Grafana offers in its menus."""
    _, prometheus = watched
    for board in BOARDS.values():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
                found: Any = prometheus.get("series", **{"match[]": filled(selector)})
                assert {each[label] for each in found}, variable["definition"]


def test_dashboards_are_provisioned_soundly() -> None:
    """Fixed uids, unique panel numbers, the provisioned data source, and no panel over another."""
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {board["uid"] for board in BOARDS.values()} == {"rescan-operations", "rescan-quality"}
    for board in BOARDS.values():
        assert board["templating"]["list"][0]["current"]["value"] == source["uid"]
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            p = panel["gridPos"]
            cells = {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
            assert not cells & taken, panel["title"]
            assert p["x"] + p["w"] <= 24
            taken |= cells


def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    """A metric that nobody looks at is a cost without use."""
    shown = " ".join(query for _, query in targets()) + (ROOT / "deploy/prometheus/rules.yml").read_text(
        encoding="utf-8"
    )
    assert [m.name for m in METRICS if not re.search(rf"\brescan_{m.name}(_bucket|_count)?\b", shown)] == []
