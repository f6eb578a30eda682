"""Every Prometheus metric, in one place and one process; base units, bounded labels.

Labels take values from the configuration and from the enumerations of the code alone. The network cannot make a new one:
a caller that no `[[scanners]]` entry claims is `unknown`, a word that is not on its list is `other`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from daemon.config import UNKNOWN_SCANNER

Kind = Literal["counter", "gauge", "histogram"]

OTHER = "other"

_STORE_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_STAGE_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_ALERT_S = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 300)
_ACK_S = (5, 10, 20, 30, 60, 120, 300, 600, 1200)
_UNIT = tuple(round(0.05 * n, 2) for n in range(1, 21))


@dataclass(frozen=True)
class Metric:
    """One metric as scraped: its kind, labels and help; `unit` is what the name ends with."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("build_info", "gauge", "1, with what is running as labels.", ("version", "model", "ort", "provider")),
    Metric("ready", "gauge", "1 when the model is loaded, warmed and checked and every part runs, else 0."),
    Metric("associations_active", "gauge", "DICOM associations that are open now.", ("scanner",)),
    Metric(
        "associations_total", "counter", "DICOM associations, by how they ended or why refused.", ("scanner", "result")
    ),
    Metric("instances_received_total", "counter", "C-STORE requests, by what was answered.", ("scanner", "status")),
    Metric("receive_bytes_total", "counter", "Bytes of datasets stored.", ("scanner",)),
    Metric(
        "store_duration_seconds",
        "histogram",
        "From the last byte of an instance to its answer.",
        ("scanner",),
        _STORE_S,
    ),
    Metric("header_errors_total", "counter", "Instances whose header could not be read.", ("reason",)),
    Metric("series_total", "counter", "Final results, by what became of the stack.", ("scanner", "outcome")),
    Metric("verdicts_total", "counter", "Final verdicts.", ("scanner", "rule", "verdict")),
    Metric("series_skipped_total", "counter", "Stacks that could not be judged, by the first reason.", ("reason",)),
    Metric("series_open", "gauge", "Stacks still waiting for instances.", ("scanner",)),
    Metric("queue_depth", "gauge", "What waits before a stage.", ("stage",)),
    Metric("queue_oldest_age_seconds", "gauge", "Age of what waits longest before a stage; 0 when empty.", ("stage",)),
    Metric("stage_duration_seconds", "histogram", "Time that a stage took for one stack.", ("stage",), _STAGE_S),
    Metric(
        "last_slice_to_verdict_seconds",
        "histogram",
        "From the last instance to the first verdict.",
        ("scanner",),
        _ALERT_S,
    ),
    Metric("last_slice_to_alert_seconds", "histogram", "From the last instance to the alert.", ("scanner",), _ALERT_S),
    Metric("quality_score", "histogram", "Predicted Dice of final verdicts (ratio 0-1).", ("scanner", "rule"), _UNIT),
    Metric(
        "artefact_score",
        "histogram",
        "Score of each artefact in final verdicts (ratio 0-1).",
        ("scanner", "artefact"),
        _UNIT,
    ),
    Metric("alerts_total", "counter", "Alerts raised.", ("scanner", "severity", "reason")),
    Metric("alerts_open", "gauge", "Alerts raised and not yet ended.", ("scanner",)),
    Metric("alerts_waiting", "gauge", "Alerts raised and not yet acknowledged.", ("scanner",)),
    Metric("alerts_suppressed_total", "counter", "Alerts held back by the limit per exam.", ("scanner",)),
    Metric("alert_ack_seconds", "histogram", "From raising an alert to its acknowledgement.", ("scanner",), _ACK_S),
    Metric(
        "alert_display_seconds",
        "histogram",
        "From raising an alert to its first display on a page.",
        ("scanner",),
        _ALERT_S,
    ),
    Metric("alert_feedback_total", "counter", "Acknowledgements, by their reason.", ("scanner", "verdict")),
    Metric("outbox_pending", "gauge", "Events written and not yet sent."),
    Metric("replay_requests_total", "counter", "Requests to the replay socket."),
    Metric("zmq_subscribers", "gauge", "Subscriptions to the live events."),
    Metric("spool_bytes", "gauge", "Bytes that the spool holds."),
    Metric("spool_quota_bytes", "gauge", "Bytes that the spool may hold."),
    Metric("spool_free_bytes", "gauge", "Free bytes on the spool's disk."),
    Metric("spool_disk_bytes", "gauge", "Size of the spool's disk."),
    Metric("spool_oldest_age_seconds", "gauge", "Age of the oldest instance in the spool; 0 when empty."),
    Metric("last_instance_timestamp_seconds", "gauge", "Unix time of the last instance stored.", ("scanner",)),
    Metric("last_inference_timestamp_seconds", "gauge", "Unix time of the last inference."),
    Metric("inference_errors_total", "counter", "Scorings that failed, by reason.", ("reason",)),
    Metric(
        "series_quarantined_total", "counter", "Series set aside because scoring them crashed the scorer repeatedly."
    ),
    Metric(
        "ledger_pending", "gauge", "Results judged and not yet written down; above 0 while the ledger cannot be used."
    ),
    Metric("audit_pending", "gauge", "Entries of the audit that the disk has not taken yet."),
    Metric("config_last_reload_successful", "gauge", "1 when the last reading of the settings was taken, else 0."),
    Metric("start_time_seconds", "gauge", "Unix time of the start of the main process."),
    Metric("clock_seconds", "gauge", "Unix time by this machine's clock when it was scraped."),
    Metric("engine_fallback", "gauge", "1 when another engine runs than the best one of this machine, else 0."),
    Metric(
        "process_restarts_total", "counter", "Child processes that ended unasked and were started again.", ("process",)
    ),
    Metric("process_memory_bytes", "gauge", "Resident memory of each process.", ("process",)),
    Metric(
        "clock_step_seconds", "gauge", "How far the wall clock has moved against the monotonic one since the start."
    ),
)
"""All of them; the names carry the prefix `rescan_` when scraped."""

LABEL_VALUES: Mapping[str, frozenset[str]] = {
    "result": frozenset({"released", "aborted", "refused", "lost", "rejected"}),
    "status": frozenset(
        ["stored", "duplicate", "conflict", "a700", "a701", "a900", "c000", "c210", "0117", "0110", "0122", "ignored"],
    ),
    "outcome": frozenset({"scored", "skipped", "failed", "incomplete"}),
    "stage": frozenset({"receive", "headers", "assemble", "preprocess", "infer", "postprocess", "score", "outbox"}),
    "severity": frozenset({"info", "low", "medium"}),
    "process": frozenset({"main", "receiver", "reader", "scorer"}),
    "artefact": frozenset({"noise", "spike", "blur", "wrap", "motion"}),
    "verdict": frozenset(
        ["PASS", "REVIEW", "RESCAN", "CANNOT_JUDGE", "rescanning", "acceptable", "patient_cannot", "wrong"],
    ),
}
"""What a label may hold where the code itself lists it. `scanner`, `rule` and `reason` come from the configuration and the
reason codes, given to `Metrics`; the labels of `build_info` from the model file."""

BEGINNINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "associations_total": {},
    "instances_received_total": {},
    "receive_bytes_total": {},
    "series_total": {},
    "verdicts_total": {"verdict": ("PASS", "REVIEW", "RESCAN", "CANNOT_JUDGE")},
    "alerts_total": {"severity": ("low", "medium"), "reason": ("noise", "spike", "blur", "wrap", "motion", OTHER)},
    "alerts_suppressed_total": {},
    "alert_feedback_total": {"verdict": ("rescanning", "acceptable", "patient_cannot", "wrong")},
    "last_slice_to_verdict_seconds": {},
    "last_slice_to_alert_seconds": {},
    "alert_ack_seconds": {},
    "alert_display_seconds": {},
    "inference_errors_total": {"reason": ("scorer_crashed", "scorer_failed")},
    "header_errors_total": {"reason": ("bad_header",)},
    "process_restarts_total": {"process": ("receiver", "reader", "scorer")},
}
"""Metrics whose children exist from the start; the values of a label where they are fewer than it may hold."""

_FREE = frozenset({"version", "model", "ort", "provider"})


class Metrics:
    """The metrics of one daemon, in a registry of their own."""

    def __init__(self, scanners: Iterable[str] = (), rules: Iterable[str] = (), reasons: Iterable[str] = ()) -> None:
        """Make every metric.

        Args:
            scanners: configured slugs.
            rules: names of the configured rules.
            reasons: all reason codes.
        """
        self.registry = CollectorRegistry()
        self._allowed = {
            **LABEL_VALUES,
            "scanner": frozenset(scanners) | {UNKNOWN_SCANNER},
            "rule": frozenset(rules),
            "reason": frozenset(reasons) | LABEL_VALUES["artefact"],
        }
        self._metrics = {metric.name: (metric, _make(metric, self.registry)) for metric in METRICS}
        self._begin_at_zero()

    def allow_rules(self, rules: Iterable[str]) -> None:
        """Take the names of rules that a reload brought; those of before stay."""
        self._allowed["rule"] |= frozenset(rules)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Make every child that an alert rule watches: a counter that is first seen at 1 has not increased, to Prometheus."""
        for name, values in BEGINNINGS.items():
            labels = self._metrics[name][0].labels
            for combination in itertools.product(
                *(values.get(label) or sorted(self._allowed[label]) for label in labels)
            ):
                self._metrics[name][1].labels(**dict(zip(labels, combination, strict=True)))

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Raise a counter."""
        self._child(name, "counter", labels).inc(amount)  # type: ignore[union-attr]

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, "gauge", labels).set(value)  # type: ignore[union-attr]

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add one observation to a histogram."""
        self._child(name, "histogram", labels).observe(value)  # type: ignore[union-attr]

    def apply(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """What another process reports: count, set or observe, by the kind of the metric.

        Raises:
            KeyError: no such metric.
        """
        kind = self._metrics[name.removeprefix("rescan_")][0].kind
        action = {"counter": self.count, "gauge": self.set, "histogram": self.observe}[kind]
        action(name.removeprefix("rescan_"), value, **labels)

    def only(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge and forget its other label values."""
        made = self._metrics[name][1]
        made.clear()
        self.set(name, value, **labels)

    def scrape(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def _child(self, name: str, kind: Kind, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        metric, made = self._metrics[name]
        if metric.kind != kind:
            raise ValueError(f"metric {name} is a {metric.kind}, not a {kind}")
        if not metric.labels:
            return made
        return made.labels(**{label: self._bounded(label, labels[label]) for label in metric.labels})

    def _bounded(self, label: str, value: str) -> str:
        if label in _FREE or value in self._allowed[label]:
            return value
        return UNKNOWN_SCANNER if label == "scanner" else OTHER


def _make(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name = f"rescan_{metric.name}"
    if metric.kind == "histogram":
        return Histogram(name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
    if metric.kind == "counter":
        return Counter(name, metric.help, metric.labels, registry=registry)
    return Gauge(name, metric.help, metric.labels, registry=registry)
