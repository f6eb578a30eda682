"""What the page shows, taken from the ledger, the pictures and the running flow: one implementation of `PageStore`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from daemon import ledger as ledgers
from daemon import pictures
from daemon.alert import NOT_CONCLUDED, AckReason, State
from daemon.config import UNKNOWN_SCANNER, AlertMode, Settings
from daemon.history import Wanted, export
from daemon.ledger import Ledger
from daemon.page.store import (
    AlertClosed,
    AlertFacts,
    Entry,
    HistoryFacets,
    HistoryQuery,
    NoSuchAlert,
    NoSuchScanner,
    Progress,
    ScannerView,
    Table,
)

EXAM_ENTRIES = 30
"""Most series of one exam shown to the technologist."""


@dataclass(frozen=True)
class Current:
    """What a scanner's current series is doing, as the main loop saw it last.

    Attributes:
        exam_ref: keyed hash of the exam that the newest instance belongs to.
        progress: None between series.
    """

    exam_ref: str
    progress: Progress | None


class Board:
    """Where the main loop writes what the page reads; safe between threads, because each word is replaced whole."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._current: Mapping[str, Current] = {}
        self._number = 0
        self._waiting: set[str] = set()

    def show(self, current: Mapping[str, Current]) -> None:
        """Replace what every scanner is doing."""
        with self._lock:
            if current != self._current:
                self._current, self._number = dict(current), self._number + 1

    def touch(self) -> None:
        """Something else that the page shows has changed, such as a picture."""
        with self._lock:
            self._number += 1

    def wait_at(self, scanner: str) -> None:
        """A person at this scanner asks for the verdict now."""
        with self._lock:
            self._waiting.add(scanner)

    def take_waiting(self) -> set[str]:
        """The scanners at which a person waits; asked once, answered once."""
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        return waiting

    def of(self, scanner: str) -> Current | None:
        """What one scanner is doing."""
        return self._current.get(scanner)

    @property
    def number(self) -> int:
        """Grows with every change."""
        return self._number


class Store:
    """The page's window into the daemon."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        ledger: Ledger,
        board: Board,
        age_s: Callable[[], float],
        not_ready: Callable[[], Sequence[str]],
        wake: Callable[[], None],
    ) -> None:
        """Show these parts.

        Args:
            settings: those in force now.
            ledger: results and alerts.
            board: what each scanner is doing.
            age_s: seconds since the main loop last turned.
            not_ready: why no verdict would come now.
            wake: tells the publisher that the ledger holds something new.
        """
        self._settings, self._ledger, self._board = settings, ledger, board
        self._age_s, self._not_ready, self._wake = age_s, not_ready, wake

    @property
    def _pictures(self) -> Path:
        return pictures_folder(self._settings())

    def version(self) -> str:
        """A word that changes whenever `scanners` would answer something else."""
        return f"{self._ledger.version()}.{self._board.number}"

    def heartbeat_age_s(self) -> float:
        """Seconds since the main loop last turned."""
        return self._age_s()

    def not_ready(self) -> Sequence[str]:
        """Why no verdict would come now."""
        return self._not_ready()

    def scanners(self) -> Sequence[ScannerView]:
        """Every configured scanner, and the unknown one once it has sent or where it is the only one."""
        configured = self._settings().scanners
        views = [self._view(s.slug, s.room or s.slug, s.alerts is AlertMode.SHADOW) for s in configured]
        unknown = self._view(UNKNOWN_SCANNER, UNKNOWN_SCANNER, shadow=False)
        if not configured or unknown.progress is not None or unknown.exam:
            views.append(unknown)
        return views

    def _view(self, slug: str, room: str, shadow: bool) -> ScannerView:
        current = self._board.of(slug)
        exam = current.exam_ref if current is not None else self._newest_exam(slug)
        entries = (self._exam(slug, exam) if exam else ()) + self._left_open(slug, exam)
        suppressed = self._ledger.suppressed(slug, exam) if exam else 0
        return ScannerView(slug, room, shadow, current.progress if current else None, entries, suppressed)

    def _newest_exam(self, slug: str) -> str:
        found = self._ledger.results(scanner=slug, limit=1)
        return str(found[0][1].get("exam_ref", "")) if found else ""

    def _exam(self, slug: str, exam_ref: str) -> tuple[Entry, ...]:
        found = self._ledger.results(scanner=slug, exam_ref=exam_ref, limit=EXAM_ENTRIES)
        return tuple(self._entry(at, result) for at, result in found)

    def _left_open(self, slug: str, exam_ref: str) -> tuple[Entry, ...]:
        """Results of other exams whose alert still waits: of a caller nobody claims no exam ends another's alerts."""
        waiting = [a for a in self._ledger.open_alerts(slug) if a.state is State.RAISED and a.exam_ref != exam_ref]
        found = [self._ledger.result(alert.result_id) for alert in waiting]
        return tuple(self._entry(*each) for each in found if each is not None)

    def history(self, query: HistoryQuery) -> Sequence[Entry]:
        """Results by filter, newest first."""
        found = self._ledger.results(
            scanner=query.scanner,
            rule=query.protocol,
            verdict=query.verdict,
            since=query.since,
            until=query.until,
            limit=query.limit,
        )
        return [self._entry(at, result) for at, result in found]

    def facets(self) -> HistoryFacets:
        """What there is to filter by."""
        scanners, rules = self._ledger.facets()
        return HistoryFacets(tuple(scanners), tuple(rules))

    def export(self, table: Table, query: HistoryQuery) -> Iterator[str]:
        """One table as the lines of a CSV file, as `rescan history` writes it."""
        wanted = Wanted(query.scanner, query.protocol, query.verdict, query.since, query.until)
        return export(self._ledger, table, wanted)

    def entry(self, result_id: str) -> Entry | None:
        """One result, whatever its age."""
        found = self._ledger.result(result_id)
        return None if found is None else self._entry(*found)

    def _entry(self, at: float, result: Mapping[str, Any]) -> Entry:
        series = result.get("series", {})
        alert = self._ledger.alert_of_stack(result["stack_ref"])
        return Entry(
            result_id=result["id"],
            at=at,
            ended_at=series.get("ended_at"),
            exam=result.get("exam_ref", ""),
            series_number=series.get("number"),
            protocol=result["policy"].get("rule") or "",
            result=result,
            alert=None if alert is None else _facts(alert),
            pictures=pictures.read_manifest(self._pictures, result.get("pictures", "-")),
        )

    def acknowledge(self, alert_id: str, reason: AckReason, by: str) -> None:
        """Record durably what a person decided.

        Raises:
            NoSuchAlert: the ledger does not know it.
            AlertClosed: it has ended.
        """
        try:
            self._ledger.acknowledge(alert_id, str(reason), by)
        except ledgers.NoSuchAlert as error:
            raise NoSuchAlert(str(error)) from None
        except ledgers.AlertClosed as error:
            raise AlertClosed(str(error)) from None
        self._wake()

    def score_now(self, scanner: str) -> None:
        """A person waits for the verdict of what this scanner is sending."""
        if scanner != UNKNOWN_SCANNER and self._settings().scanner(scanner) is None:
            raise NoSuchScanner("No scanner of this name is configured.")
        self._board.wait_at(scanner)

    def displayed(self, alert_id: str) -> None:
        """Record the first time a page showed an alert."""
        try:
            self._ledger.displayed(alert_id)
        except ledgers.NoSuchAlert as error:
            raise NoSuchAlert(str(error)) from None

    def picture(self, result_id: str, name: str) -> bytes | None:
        """One PNG of a result's worst slices, or None."""
        found = self._ledger.result(result_id)
        return None if found is None else pictures.read_picture(self._pictures, found[1].get("pictures", "-"), name)


def pictures_folder(settings: Settings) -> Path:
    """Where the pictures lie."""
    return settings.state / "pictures"


def _facts(alert: ledgers.Alert) -> AlertFacts:
    facts = AlertFacts(alert.alert_id, str(alert.state), alert.raised_at, not_concluded=NOT_CONCLUDED)
    return replace(facts, reason=alert.reason or "", by=alert.by or "", acknowledged_at=alert.acknowledged_at)
