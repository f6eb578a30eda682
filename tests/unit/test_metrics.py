"""Metrics: names, bounded labels, and each one moves."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemon.metrics import LABEL_VALUES, METRICS, Metric, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.scrape().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def some_labels(metric: Metric) -> dict[str, str]:
    known = {"scanner": "mr1", "rule": "t1", "reason": "localizer"}
    return {label: known.get(label) or min(LABEL_VALUES.get(label, {"x"})) for label in metric.labels}


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_every_metric_moves(metric: Metric) -> None:
    """What is applied to a metric shows in the next scrape."""
    metrics = Metrics(["mr1"], ["t1"], ["localizer"])
    before = samples(metrics)
    metrics.apply(metric.name, some_labels(metric), 3)
    assert samples(metrics) != before


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    """Counters end with _total, everything has a help text, units are base units."""
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.help.endswith(".")
    assert not metric.name.endswith(("_ms", "_mb", "_kb", "_minutes", "_percent"))
    assert (metric.kind == "histogram") == bool(metric.buckets)


def test_the_network_cannot_make_a_label_value() -> None:
    """A caller without an entry is `unknown`, an unlisted word is `other`."""
    metrics = Metrics(["mr1"])
    metrics.count("instances_received_total", scanner="EVIL'; DROP", status="1.2.840.1")
    assert ("rescan_instances_received_total", (("scanner", "unknown"), ("status", "other"))) in samples(metrics)


def test_a_metric_of_another_kind_is_refused() -> None:
    """A counter cannot be set."""
    with pytest.raises(ValueError, match="is a counter"):
        Metrics().set("series_total", 1, scanner="mr1", outcome="scored")


def test_only_forgets_other_label_values() -> None:
    """After a new model is loaded the old one is no longer reported as running."""
    metrics = Metrics()
    for model in ("a", "b"):
        metrics.only("build_info", 1, version="1", model=model, ort="", provider="cpu")
    assert [dict(labels)["model"] for (name, labels) in samples(metrics) if name == "rescan_build_info"] == ["b"]


def test_a_counter_that_an_alert_rule_watches_begins_at_zero() -> None:
    """Prometheus sees no increase in a counter whose first value is 1; a rule that a reload brings is there at once."""
    metrics = Metrics(["mr1"], ["t1"], ["localizer"])
    found = samples(metrics)
    assert found["rescan_inference_errors_total", (("reason", "scorer_crashed"),)] == 0
    assert found["rescan_instances_received_total", (("scanner", "mr1"), ("status", "a700"))] == 0
    metrics.allow_rules(["t9"])
    key = (("rule", "t9"), ("scanner", "mr1"), ("verdict", "PASS"))
    assert samples(metrics)["rescan_verdicts_total", key] == 0


def test_twenty_scanners_stay_below_five_thousand_series() -> None:
    """With everything that a scrape can hold for two rules."""
    metrics = Metrics([f"mr{n}" for n in range(20)], ["t1", "t1_trial"])
    assert len(samples(metrics)) < 5000
    for metric in METRICS:
        if metric.kind == "histogram" and "scanner" in metric.labels:
            for scanner in (f"mr{n}" for n in range(20)):
                labels = {**some_labels(metric), "scanner": scanner}
                metrics.observe(metric.name, 0.5, **labels)
    assert len([key for key in samples(metrics) if not key[0].endswith("_created")]) < 5000
