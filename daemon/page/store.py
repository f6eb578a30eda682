"""What the page needs from the rest of the daemon: plain facts to show, and three things it may say back.

The page keeps no state of its own. Whatever it shows is read from a `PageStore`; so a page that comes back after a crash
shows the same as one that never left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from daemon.alert import AckReason


class Phase(StrEnum):
    """What a scanner's current series is doing."""

    RECEIVING = "receiving"
    JUDGING = "judging"


class Table(StrEnum):
    """What can be exported as CSV, in the columns of `rescan history`."""

    VERDICTS = "verdicts"
    ALERTS = "alerts"
    FEEDBACK = "feedback"


class PageError(Exception):
    """Something asked of the page that cannot be done; the message is shown to the person."""

    status = 400


class NoSuchAlert(PageError):
    """An alert identifier that the ledger does not know."""

    status = 404


class NoSuchScanner(PageError):
    """A scanner that no entry of the configuration names."""

    status = 404


class AlertClosed(PageError):
    """An acknowledgement of an alert that is no longer waiting for one."""

    status = 409


@dataclass(frozen=True)
class Progress:
    """The series that a scanner is sending or Rescan is judging.

    Attributes:
        phase: receiving or judging.
        series_ref: keyed hash, never a UID.
        series_number: as on the console; None where the header has none.
        instances: images durable so far.
        expected: images expected; None while unknown.
        since: unix seconds of the first image.
    """

    phase: Phase
    series_ref: str
    series_number: int | None
    instances: int
    expected: int | None
    since: float


@dataclass(frozen=True)
class AlertFacts:
    """One alert as a person sees it.

    Attributes:
        state: raised, acknowledged, resolved, superseded, expired or withdrawn.
        raised_at: unix seconds.
        reason: why it was acknowledged; "" until then.
        by: who acknowledged it; "" until then.
        acknowledged_at: unix seconds; None until then.
        not_concluded: what the alert does not say, one plain sentence; "" where the alert has none.
    """

    alert_id: str
    state: str
    raised_at: float
    reason: str = ""
    by: str = ""
    acknowledged_at: float | None = None
    not_concluded: str = ""


@dataclass(frozen=True)
class Entry:
    """One result with what the page adds to it.

    Attributes:
        result_id: opaque identifier of the result.
        at: unix seconds of the verdict.
        ended_at: unix seconds of the last image; None where unknown.
        exam: keyed hash of the study.
        series_number: as on the console; None where the header has none.
        protocol: the site's name for what was measured: the policy rule.
        result: the result object, as published.
        alert: the alert of this series, if it has one.
        pictures: the manifest of the worst slices; None where none were drawn.
    """

    result_id: str
    at: float
    ended_at: float | None
    exam: str
    series_number: int | None
    protocol: str
    result: Mapping[str, Any]
    alert: AlertFacts | None = None
    pictures: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ScannerView:
    """One scanner as the technologist sees it.

    Attributes:
        slug: the configured name.
        room: label for people.
        shadow: scored and recorded; nothing is raised to people.
        progress: the current series; None between series.
        exam: results of the running exam, newest first, one per series.
        suppressed: alerts of this exam that the rate cap held back.
    """

    slug: str
    room: str
    shadow: bool
    progress: Progress | None
    exam: tuple[Entry, ...]
    suppressed: int = 0


@dataclass(frozen=True)
class HistoryQuery:
    """Filters of the physicist's history; an empty one lets everything through.

    Attributes:
        since: unix seconds, inclusive; None for no limit.
        until: unix seconds, exclusive; None for no limit.
        limit: most results returned, newest first, 1 to 5000.
    """

    scanner: str = ""
    protocol: str = ""
    verdict: str = ""
    since: float | None = None
    until: float | None = None
    limit: int = 500


@dataclass(frozen=True)
class HistoryFacets:
    """What there is to filter by."""

    scanners: tuple[str, ...] = field(default=())
    protocols: tuple[str, ...] = field(default=())


class PageStore(Protocol):
    """The page's window into the daemon. Every method may be called from any thread and returns quickly."""

    def version(self) -> str:
        """A word that changes whenever `scanners` would answer something else."""
        ...

    def heartbeat_age_s(self) -> float:
        """Seconds since the main loop last showed that it lives, on a clock that cannot jump."""
        ...

    def not_ready(self) -> Sequence[str]:
        """Why no verdict would come now, in plain words; empty when one would."""
        ...

    def scanners(self) -> Sequence[ScannerView]:
        """Every configured scanner, in the order of the configuration, and the unknown one once it has sent."""
        ...

    def history(self, query: HistoryQuery) -> Sequence[Entry]:
        """Final results and those still provisional, newest first."""
        ...

    def facets(self) -> HistoryFacets:
        """The scanners and protocols that the history holds."""
        ...

    def export(self, table: Table, query: HistoryQuery) -> Iterator[str]:
        """The lines of one table as CSV, oldest first, with a header; the query's limit is not asked."""
        ...

    def entry(self, result_id: str) -> Entry | None:
        """One result, whatever its age."""
        ...

    def acknowledge(self, alert_id: str, reason: AckReason, by: str) -> None:
        """Record durably that a person has seen an alert and what they decided.

        Raises:
            NoSuchAlert: the ledger does not know it.
            AlertClosed: it was resolved, superseded, withdrawn or has expired; the message says which.
        """
        ...

    def score_now(self, scanner: str) -> None:
        """A person waits for the verdict of what this scanner is sending: judge it now, provisionally.

        Raises:
            NoSuchScanner: no scanner of this name is configured.
        """
        ...

    def displayed(self, alert_id: str) -> None:
        """Record the first time a page showed an alert; later calls change nothing."""
        ...

    def picture(self, result_id: str, name: str) -> bytes | None:
        """One PNG of a result's worst slices, or None."""
        ...
