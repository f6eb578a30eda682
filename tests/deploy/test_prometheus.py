"""Metrics, rules and runbook: checked by Prometheus' own tool, and equal to one another."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon.metrics import METRICS, Metrics
from daemon.reasons import REASONS
from tests.conftest import ROOT
from tests.serving import patience

FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "rules.yml"
CASES = ("rules.test.yml", "rules.days.test.yml")
RUNBOOK = ROOT / "docs" / "runbook.md"

ASKED_FOR = {
    "down": "RescanDown",
    "not ready": "RescanNotReady",
    "queue stuck": "RescanQueueStuck",
    "time to alert above its objective": "RescanResultsSlow",
    "disk low": "RescanDiskLow",
    "store failures": "RescanStoreFailures",
    "inference failures": "RescanInferenceFailures",
    "wrong engine": "RescanWrongEngine",
    "no series in working hours": "RescanNoSeries",
    "score drift per scanner": "RescanScoreDrift",
    "alert rate high": "RescanAlertRateHigh",
    "alerts not acknowledged": "RescanAlertsNotAcknowledged",
    "clock skew": "RescanClockSkew",
}
"""What an operator must be told, whatever else there is -> the rule that does."""


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return found


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, input=text, capture_output=True, text=True, timeout=patience(240), cwd=FOLDER)


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """Name -> alerting rule."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@cache
def records() -> set[str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def test_what_is_recorded_is_there_when_it_is_read() -> None:
    """Prometheus looks back 5 minutes for a value: a group that records less often leaves gaps in what alerts read."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    recording = {g["name"]: g["interval"] for g in groups if any("record" in rule for rule in g["rules"])}
    assert recording
    for name, interval in recording.items():
        assert re.fullmatch(r"[1-4]m", interval), f"{name}: recorded every {interval}"


def test_everything_an_operator_must_be_told_has_a_rule() -> None:
    """From down to clock skew."""
    assert set(ASKED_FOR.values()) <= set(alerts())


def test_promtool_finds_nothing_in_the_metrics(promtool: str) -> None:
    """Names, units and help texts follow the conventions, also once everything has moved."""
    metrics = Metrics(["mr1", "mr2"], ["t1"], REASONS)
    values = {"scanner": "mr1", "rule": "t1", "reason": "no_rule"}
    for metric in METRICS:
        metrics.apply(metric.name, {label: values.get(label, "other") for label in metric.labels}, 1)
    done = run(promtool, "check", "metrics", text=metrics.scrape().decode())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_promtool_accepts_the_rules_and_the_example_configuration(promtool: str) -> None:
    """`promtool check rules` and `check config`."""
    for what, file in (("rules", RULES), ("config", FOLDER / "prometheus.yml")):
        done = run(promtool, "check", what, file)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cases", CASES)
def test_rules_fire_when_they_must_and_not_before(promtool: str, cases: str) -> None:
    """`promtool test rules`."""
    done = run(promtool, "test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_is_tested_in_both_directions() -> None:
    """A moment at which it is silent and one at which it fires."""
    silent, firing = set(), set()
    for cases in CASES:
        for case in yaml.safe_load((FOLDER / cases).read_text(encoding="utf-8"))["tests"]:
            for look in case["promql_expr_test"]:
                (name,) = re.findall(r'alertname="(\w+)"', look["expr"])
                (firing if look["exp_samples"] else silent).add(name)
    assert silent == firing == set(alerts())


def test_every_rule_says_what_to_do() -> None:
    """Severity, summary, description, and an entry of the runbook."""
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"critical", "warning"}, name
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_the_runbook_has_an_entry_for_each_rule_and_none_beside() -> None:
    """Same names, same severities, and each entry tells how it ends."""
    parts = re.split(r"^## ", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    entries = {part.split("\n", 1)[0]: part for part in parts}
    assert set(entries) == set(alerts())
    for name, text in entries.items():
        severity = alerts()[name]["labels"]["severity"]
        assert text.split("\n\n", 1)[1].startswith(f"*{severity}.*"), name
        assert re.search(r"^Over ", text, flags=re.MULTILINE), name


def test_rules_and_runbook_name_metrics_and_settings_that_exist() -> None:
    """A rule over a metric that nobody makes would be silent for ever."""
    exported = {f"rescan_{m.name}": m for m in METRICS}
    known = set(exported) | {
        f"{n}_{s}" for n, m in exported.items() if m.kind == "histogram" for s in ("bucket", "count", "sum")
    }
    for text in (RULES.read_text(encoding="utf-8"), RUNBOOK.read_text(encoding="utf-8")):
        assert set(re.findall(r"\brescan_[a-z_]+[a-z]", text)) <= known
    named = {name for rule in alerts().values() for name in re.findall(r"rescan:[a-z0-9_:]+", rule["expr"])}
    assert named == records()


def test_selectors_in_rules_name_labels_and_values_that_exist() -> None:
    """A misspelt label value is no error to Prometheus, and never fires."""
    from daemon.metrics import LABEL_VALUES

    by_name = {f"rescan_{m.name}": m for m in METRICS}
    text = RULES.read_text(encoding="utf-8")
    for name, selector in re.findall(r"(rescan_[a-z_]+?)(?:_bucket|_count)?\{([^}]*)\}", text):
        for label, _, value in re.findall(r'(\w+)(=|!=|=~|!~)"([^"]*)"', selector):
            if label == "le":
                buckets = {f"{float(b)}" for b in by_name[name].buckets}
                assert value in buckets, selector
                continue
            assert label in by_name[name].labels, selector
            known = LABEL_VALUES.get(label, {"unknown"} if label == "scanner" else set(REASONS))
            assert set(value.split("|")) <= known, selector
