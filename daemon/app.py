"""`rescan serve`: the flow in one place.

The parts are built in the order of the data, started, supervised, and stopped in reverse:

    receiver -> spool -> reader -> series -> scorer -> judge -> ledger -> publish, metrics, page

The receiver, the reader and the scorer are processes of their own; what they do is made durable by the spool before and by
the ledger after, so each of them, and this one, may die at any moment. One thread owns all state here: the main loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from daemon import __version__
from daemon.alert import Effect
from daemon.audit import FILE_NAME as AUDIT_FILE
from daemon.audit import Audit, Kind, file_sha256
from daemon.calibration import FILE_NAME, CalibrationError, SiteCalibration, in_force, load_site
from daemon.child import Child
from daemon.config import UNKNOWN_SCANNER, ConfigError, Settings, load, needs_restart
from daemon.flow import Flow, Served, Verdicts
from daemon.ledger import AlertChange, Ledger
from daemon.log import Event, Log, quiet_libraries
from daemon.metrics import OTHER, Metrics
from daemon.page.guard import Access
from daemon.page.routes import routes as page_routes
from daemon.page_store import Board, Store, pictures_folder
from daemon.pictures import remove_older
from daemon.publish import Publisher
from daemon.reader import spool_folder
from daemon.reasons import REASONS
from daemon.result import SiteKey
from daemon.rules import RuleError, load_rules
from daemon.scorer import Scored
from daemon.series import Assembly
from daemon.spool import SpoolError, SpoolReader, StoredInstance, remove_segments
from daemon.watchdog import notify
from daemon.web import Probes, Web, make_app
from daemon.words import Reason

IN_FLIGHT = 32
"""Headers asked for and not yet answered: enough to keep the reader busy, few enough that no pipe fills."""

WAITING = 4096
"""Records taken from the spool and not yet applied."""

HEADER_LIMIT_S = 15.0
"""A header that takes longer hangs; its instance is skipped."""

HEADER_STRIKES = 3
"""Deaths of the reader at the same instance after which that instance is skipped."""

TURN_S = 0.5
"""The main loop turns at least this often."""

GAUGES_S = 0.2
"""Between looks at what the page and the gauges show of the running flow."""

SLOW_TURN_S = 10.0
"""Between looks at what changes slowly: disk, memory, retention."""

STAGES = {"volume": "assemble", "prepare": "preprocess", "infer": "infer", "score": "postprocess"}
"""The scorer's steps -> the stages of the metrics."""

STOP_LIMIT_S = {"receiver": 15.0, "scorer": 2.0, "reader": 2.0}
"""What each child may take to finish: the receiver lets associations end; what the others hold is durable in the spool."""

LOADING = "the model is being loaded and checked"

JUDGED_FILE = "judged.json"

FORCED = 130
"""Exit status after a second signal."""


class App:
    """The running daemon."""

    def __init__(self, settings: Settings, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> None:
        """Build every part that needs no process.

        Args:
            settings: in force.
            file: TOML file that is read again at SIGHUP.
            flags: what the command line set, as `load` takes it.

        Raises:
            ConfigError: settings that cannot be used here; the message is one line.
        """
        self.settings, self.file, self.flags = settings, file, flags or {}
        self.log = Log(settings.log.format)
        self._lock = lock_state(settings.state)
        self.key = _site_key(settings.state)
        self.rules = load_rules(settings.rules)
        self.metrics = Metrics([s.slug for s in settings.scanners], [r.name for r in self.rules], REASONS)
        self.ledger = Ledger(settings.state / "ledger.db", settings.alerts, on_change=self._count_alert)
        self.audit = Audit(settings.state / AUDIT_FILE)
        self.publisher = Publisher(settings.events, self.ledger, ready=lambda: not self.not_ready())
        self.calibration = _Calibration(settings.state / FILE_NAME)
        self.flow = Flow(
            settings,
            self.key,
            self.rules,
            Assembly(settings),
            self.ledger,
            self.calibration.for_scan,
            on_failure=lambda error: self.log.failure(error, process="main", step="assembly"),
        )
        self.children = {name: Child(name, settings) for name in ("receiver", "reader", "scorer")}
        self.board = Board()
        store = Store(lambda: self.settings, self.ledger, self.board, self.age_s, self.not_ready, self.publisher.wake)
        page = page_routes(store, Access.from_settings(settings.http), stopping=lambda: bool(self._signals))
        self.web = Web(settings.http, make_app(Probes(self.age_s, self.not_ready, self._scrape), page))
        self.spool: SpoolReader | None = None
        self.dicom_port: int | None = None
        self.model_reason: str | None = LOADING
        self._turned = time.monotonic()
        self._started = (time.time(), time.monotonic())
        self._signals: list[int] = []
        self._reload_asked = self._said_started = False
        self._startup_fault: str | None = None
        self._ledger_fault: str | None = None
        self._wake, self._waker = socket.socketpair()
        self._unwritten: deque[Verdicts] = deque()
        self._replays_counted = 0
        self._in_flight: deque[StoredInstance] = deque()
        self._unsent: deque[StoredInstance] = deque()
        self._answered = time.monotonic()
        self._reader_strikes: tuple[int, int] = (-1, 0)
        self._job_started: float | None = None
        self._drawing = False
        self._position = self._replay_until = 0
        self._slow_due = self._gauges_due = 0.0

    # --- start, turn, stop --------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until a signal."""
        self.start()
        while not self._signals and self._startup_fault is None:
            self.turn(TURN_S)
        self.stop()
        if self._startup_fault is not None:
            raise ConfigError(self._startup_fault)
        return 0

    def start(self) -> None:
        """Start the parts in the order of the data."""
        (self.settings.state / "ports.json").unlink(missing_ok=True)
        spool_folder(self.settings).mkdir(mode=0o700, exist_ok=True)
        self._catch_signals()
        self._begin_audit()
        self.metrics.set("start_time_seconds", self._started[0])
        self.metrics.set("config_last_reload_successful", 1)
        for scanner in self._scanners():
            self._show_alerts(scanner)
        self.publisher.start()
        for child in self.children.values():
            child.start()
            self.log.write(Event.PROCESS_STARTED, process=child.name)
        self.web.start()

    def turn(self, limit_s: float) -> None:
        """One turn of the main loop: wait for news, take it in, move everything that can move."""
        self._turned = time.monotonic()
        for child in self._with_news(limit_s):
            self._listen_to(child)
        self._restart_the_dead()
        self._judge(())
        if self.spool is not None and self._ledger_fault is None:
            self._move(self.spool)
        self._look_at_what_changes_slowly()

    def _move(self, spool: SpoolReader) -> None:
        """From the spool as far towards the ledger as things can go now."""
        self.flow.clock_step_s = time.time() - self.now()
        self._take_records(spool)
        self._ask_for_headers()
        self._judge(self.flow.apply(self.now()))
        self._note_exams()
        self._end_replay()
        for scanner in self.board.take_waiting():
            self._judge(self.flow.score_now(scanner, self.now()))
        self._judge(self.flow.apply_time(self.now()))
        self._give_job()

    def stop(self) -> None:
        """Stop the parts in reverse; a second signal ends the process at once."""
        self.log.write(Event.STOPPING, signal=signal.Signals(self._signals[0]).name if self._signals else None)
        notify("STOPPING=1")
        self.web.stop()
        for name in ("receiver", "scorer", "reader"):
            self.children[name].end(limit_s=STOP_LIMIT_S[name])
        self.publisher.stop()
        self.ledger.close()
        (self.settings.state / "ports.json").unlink(missing_ok=True)
        self._lock.close()
        self.log.write(Event.STOPPED)

    def now(self) -> float:
        """Unix seconds that never jump while the daemon runs."""
        wall, monotonic = self._started
        return wall + time.monotonic() - monotonic

    def age_s(self) -> float:
        """Seconds since the main loop last turned."""
        return time.monotonic() - self._turned

    def not_ready(self) -> list[str]:
        """Why no verdict would come now; empty when ready."""
        reasons = [f"the {name} is starting again" for name, child in self.children.items() if child.due is not None]
        if self.dicom_port is None:
            reasons.append("the DICOM port is not open yet")
        if self.model_reason is not None:
            reasons.append(self.model_reason)
        if self._ledger_fault is not None:
            reasons.append(self._ledger_fault)
        if not self.publisher.alive():
            reasons.append("events are not being published")
        if self.flow.replaying:
            reasons.append("the spool is being read again")
        return reasons

    # --- news ---------------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """Note signals and wake the main loop; a second request to stop ends the process at once."""

        def note(number: int, _frame: object) -> None:
            if number == signal.SIGHUP:
                self._reload_asked = True
                return
            if self._signals:
                os._exit(FORCED)
            self._signals.append(number)

        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, note)

    def _with_news(self, limit_s: float) -> list[Child]:
        """Wait for any child to say something or die, for a signal, or for the next thing that is due."""
        due = [child.due - time.monotonic() for child in self.children.values() if child.due is not None]
        deadline = self.flow.next_deadline()
        if deadline is not None and self._ledger_fault is None:
            due.append(deadline - self.now())
        controls = {child.control: child for child in self.children.values() if child.control is not None}
        ready = wait([*controls, self._wake], max(min([limit_s, *due]), 0.0))
        if self._wake in ready:
            self._wake.recv(4096)
        return [controls[each] for each in ready if isinstance(each, Connection)]

    def _listen_to(self, child: Child) -> None:
        try:
            messages = child.receive()
        except EOFError:
            self._lost(child)
            return
        hear = {"receiver": self._hear_receiver, "reader": self._hear_reader, "scorer": self._hear_scorer}[child.name]
        for message in messages:
            hear(message)

    def _hear_receiver(self, message: dict[str, Any]) -> None:
        if message["kind"] == "listening":
            self.dicom_port = message["port"]
            self.children["receiver"].settings = _with_port(self.settings, message["port"])
            self.spool = self.spool or self._open_spool()
            self._say_where()
        elif message["kind"] == "failed":
            self.log.write(Event.RECEIVER, level="error", reason=message["text"])
            self._startup_fault = None if self._said_started else message["text"]
        elif message["kind"] == "count":
            self.metrics.apply(message["metric"], message["labels"], message["value"])

    def _hear_reader(self, message: dict[str, Any]) -> None:
        self._in_flight.popleft()
        self._answered = time.monotonic()
        self._take_header(message["position"], message["header"])

    def _hear_scorer(self, message: dict[str, Any]) -> None:
        if message["kind"] == "loaded":
            self._take_model(message)
        elif message["kind"] == "unusable":
            self.model_reason = message["text"]
            notify(f"STATUS=receiving; {self.model_reason}")
            self.log.write(Event.NOT_READY, level="error", reason=message["text"])
        elif message["kind"] == "drawn":
            self._drawing = False
            self.board.touch()
        elif message["kind"] == "scored":
            self._job_started, self._drawing = None, True
            self._count_stages(message["scored"])
            self._judge(self.flow.scored(message["job"], message["scored"], self.now()))

    # --- the spool and its headers ------------------------------------------------------------------------------------

    def _open_spool(self) -> SpoolReader:
        spool = SpoolReader(spool_folder(self.settings))
        self._replay_until = spool.durable_position()
        return spool

    def _take_records(self, spool: SpoolReader) -> None:
        if len(self.flow.waiting) >= WAITING:
            return
        for record in spool.follow(self._position):
            self._position = record.position
            self.flow.add(record)
            if isinstance(record, StoredInstance):
                self._unsent.append(record)

    def _ask_for_headers(self) -> None:
        batch: list[StoredInstance] = []
        while self._unsent and len(self._in_flight) < IN_FLIGHT:
            batch.append(self._unsent.popleft())
            self._in_flight.append(batch[-1])
        if batch:
            if len(batch) == len(self._in_flight):
                self._answered = time.monotonic()
            self.children["reader"].send({"kind": "read", "instances": batch})
        elif self._in_flight and time.monotonic() - self._answered > HEADER_LIMIT_S:
            self._lost(self.children["reader"])

    def _take_header(self, position: int, header: Any) -> None:
        if isinstance(header, Reason):
            self.metrics.count("header_errors_total", reason=header.code)
        self.flow.add_header(position, header)

    def _note_exams(self) -> None:
        """A new exam on a scanner ends the alerts of the one before."""
        exams, self.flow.new_exams = self.flow.new_exams, []
        for exam in exams:
            with contextlib.suppress(sqlite3.Error):  # the result of the exam's first series says it again
                self.ledger.exam_started(exam.scanner, exam.exam_ref, exam.at, exam.device)

    def _end_replay(self) -> None:
        if self.flow.replaying and self._position >= self._replay_until and not self.flow.waiting:
            self._judge(self.flow.end_replay(self.now()))
            self.log.write(Event.RESTORED, position=self._position)

    # --- children that died -------------------------------------------------------------------------------------------

    def _lost(self, child: Child) -> None:
        status = child.lost()
        self.metrics.count("process_restarts_total", process=child.name)
        self.log.write(
            Event.PROCESS_ENDED,
            level="error",
            process=child.name,
            status=status,
            restarts=child.restarts,
            next=child.wait_s,
        )
        if child.name == "reader":
            self._reader_lost()
        elif child.name == "scorer":
            self._scorer_lost()
        else:
            self.dicom_port = None

    def _reader_lost(self) -> None:
        """Ask again for what was not answered; give up on an instance that the reader keeps dying of."""
        if not self._in_flight:
            return
        suspect = self._in_flight[0].position
        strikes = self._reader_strikes[1] + 1 if self._reader_strikes[0] == suspect else 1
        self._reader_strikes = (suspect, strikes)
        if strikes >= HEADER_STRIKES:
            self._in_flight.popleft()
            self._take_header(suspect, Reason("bad_header", REASONS["bad_header"]))
        self._unsent.extendleft(reversed(self._in_flight))
        self._in_flight.clear()

    def _scorer_lost(self) -> None:
        self._job_started, self._drawing = None, False
        self.flow.served = None
        self.model_reason = LOADING
        self.metrics.count("inference_errors_total", reason="scorer_crashed")
        self._judge(self._set_aside(self.flow.scorer_died(self.now())))

    def _set_aside(self, verdicts: Iterable[Verdicts]) -> Iterator[Verdicts]:
        """Count and tell the series that are set aside."""
        for verdict in verdicts:
            self.metrics.count("series_quarantined_total")
            self.log.write(Event.QUARANTINED, level="error", series_ref=verdict.identity.series_ref)
            yield verdict

    def _restart_the_dead(self) -> None:
        for child in self.children.values():
            if child.due is not None and child.due <= time.monotonic():
                child.start()
                self.log.write(Event.PROCESS_STARTED, process=child.name)

    # --- scoring and results ------------------------------------------------------------------------------------------

    def _take_model(self, message: dict[str, Any]) -> None:
        engine = message["engine"]
        self.flow.served = Served(message["card"], message["sha256"], engine)
        self.model_reason = None
        self.metrics.only(
            "build_info",
            1,
            version=__version__,
            model=f"{message['card'].name} {message['card'].version}",
            ort=str(engine.get("runtime", "")),
            provider=str(engine["provider"]),
        )
        self.metrics.set("engine_fallback", bool(message["fallback"]))
        self._write_down(
            lambda: self.audit.differing(
                Kind.MODEL,
                name=message["card"].name,
                version=message["card"].version,
                sha256=message["sha256"],
                engine=str(engine["provider"]),
            )
        )
        self.log.write(
            Event.ENGINE,
            level="error" if message["fallback"] else None,
            reason=message["fallback"] or None,
            model=f"{message['card'].name} {message['card'].version}",
            engine=engine["provider"],
            precision=engine["precision"],
            device=engine["device"],
        )
        self._say_where()

    def _give_job(self) -> None:
        """Give the scorer the next job; end a scoring that hangs."""
        limit_s = self.settings.model.time_limit_s
        if self._job_started is not None and time.monotonic() - self._job_started > limit_s:
            self._lost(self.children["scorer"])
        if self.flow.served is None or self._drawing:
            return
        job = self.flow.next_job()
        if job is not None:
            self._job_started = time.monotonic()
            wanted = "pictures" in job.rule.outputs
            picture = self.flow.picture_name(job.stack, job.content) if wanted else None
            self.children["scorer"].send({"kind": "score", "job": job.number, "stack": job.stack, "picture": picture})

    def _judge(self, verdicts: Iterable[Verdicts]) -> None:
        """Write results down; everything else shows what is in the ledger. What cannot be written now is kept for later."""
        try:
            for verdict in verdicts:
                self._unwritten.append(verdict)
                self._write()
            self._write()
        except sqlite3.Error as error:
            if self._ledger_fault is None:
                self.log.failure(error, process="main", step="ledger")
            self._ledger_fault = "the ledger cannot be used; see the disk"

    def _write(self) -> None:
        """Write down what waits; an error leaves it waiting."""
        while self._unwritten:
            verdict = self._unwritten[0]
            recorded = self.ledger.record(verdict.result)
            self._unwritten.popleft()
            if recorded.new:
                self._show(verdict)
        if self._ledger_fault is not None:
            self.ledger.last_number()
            self._ledger_fault = None

    def _show(self, verdict: Verdicts) -> None:
        """Tell the world what is in the ledger now."""
        result = verdict.result
        self.publisher.wake()
        self._count_verdict(verdict)
        self.log.write(
            Event.SERIES,
            series_ref=result["series_ref"],
            scanner=result["scanner"],
            verdict=result["verdict"],
            final=result["final"],
            revision=result["revision"],
            artefact=result["dominant_artefact"],
            predicted_dice=result["scores"].get("predicted_dice"),
            required_dice=result.get("required_dice"),
            reasons=",".join(reason["code"] for reason in result["reasons"]),
            completeness=result["evidence"].get("completeness"),
            instances=result["evidence"].get("instances"),
            rule=result["policy"]["rule"],
            seconds=result["timing_s"].get("last_instance_to_verdict"),
        )

    # --- what is said and counted -------------------------------------------------------------------------------------

    def _count_verdict(self, verdict: Verdicts) -> None:
        result, scanner = verdict.result, verdict.identity.scanner
        refused = result["verdict"] == "CANNOT_JUDGE"
        waited_s = result["timing_s"].get("last_instance_to_verdict", 0.0)
        if result["revision"] == 1 and result["supersedes"] is None:
            self.metrics.observe("last_slice_to_verdict_seconds", waited_s, scanner=scanner)
        if not result["final"]:
            return
        rule = result["policy"]["rule"] or ""
        self.metrics.count("verdicts_total", scanner=scanner, rule=rule, verdict=result["verdict"])
        self.metrics.count("series_total", scanner=scanner, outcome=_outcome(result))
        if refused:
            self.metrics.count("series_skipped_total", reason=result["reasons"][0]["code"])
        if "predicted_dice" in result["scores"]:
            self.metrics.observe("quality_score", result["scores"]["predicted_dice"], scanner=scanner, rule=rule)
        for name, artefact in result["artefacts"].items():
            if "score" in artefact:
                self.metrics.observe("artefact_score", artefact["score"], scanner=scanner, artefact=name)

    def _count_stages(self, scored: Scored) -> None:
        for ours, stage in STAGES.items():
            if ours in scored.seconds:
                self.metrics.observe("stage_duration_seconds", scored.seconds[ours], stage=stage)
        if scored.scores is not None:
            self.metrics.set("last_inference_timestamp_seconds", time.time())
        elif scored.refusal is not None and scored.refusal.code == "scorer_failed":
            self.metrics.count("inference_errors_total", reason="scorer_failed")

    def _say_where(self) -> None:
        """Once all ports are known, write them down; once the model is ready too, say so."""
        if self.dicom_port is None:
            return
        ports = {
            "dicom": self.dicom_port,
            "events": self.publisher.publish_port,
            "replay": self.publisher.replay_port,
            "http": self.web.port,
        }
        write_json(self.settings.state / "ports.json", ports)
        if not self._said_started:
            self._said_started = True
            self.log.write(Event.STARTED, version=__version__, **ports)
            notify(f"READY=1\nSTATUS=receiving; {self.model_reason or 'ready'}")
        if self.model_reason is None:
            self.log.write(Event.READY)
            notify("STATUS=ready")

    def _look_at_what_changes_slowly(self) -> None:
        notify("WATCHDOG=1")
        self._set_gauges()
        if self._reload_asked:
            self._reload_asked = False
            self.reload()
        if time.monotonic() < self._slow_due or self.spool is None:
            return
        self._slow_due = time.monotonic() + SLOW_TURN_S
        try:
            self._measure(self.spool)
            self._retire()
            self.audit.flush()
        except OSError as error:  # a full or failing disk must not end the main loop
            self.log.failure(error, process="main", step="housekeeping")

    def _measure(self, spool: SpoolReader) -> None:
        """Disk, memory and clock."""
        facts = spool.facts()
        self.metrics.set("spool_bytes", facts.size_bytes)
        self.metrics.set("spool_free_bytes", facts.free_bytes)
        self.metrics.set("spool_disk_bytes", shutil.disk_usage(self.settings.state).total)
        self.metrics.set("spool_quota_bytes", self.settings.spool.quota_bytes)
        self.metrics.set("spool_oldest_age_seconds", facts.oldest_age_s or 0.0)
        self.metrics.set("clock_step_seconds", time.time() - self.now())
        running = {child.name: child.process.pid for child in self.children.values() if child.process is not None}
        for name, pid in {"main": os.getpid(), **running}.items():
            self.metrics.set("process_memory_bytes", resident_bytes(pid), process=name)

    def _retire(self) -> None:
        """Remove what is judged and older than the retention time."""
        keep_s = self.settings.spool.retention_s
        judged = self.flow.judged_before(self.now())
        write_json(self.settings.state / JUDGED_FILE, {"before_position": judged})
        removed = remove_segments(spool_folder(self.settings), judged, keep_s)
        remove_older(pictures_folder(self.settings), time.time() - keep_s)
        if removed:
            self.log.write(Event.RETENTION, count=removed)

    def _set_gauges(self) -> None:
        if time.monotonic() < self._gauges_due:
            return
        self._gauges_due = time.monotonic() + GAUGES_S
        flow, now = self.flow, self.now()
        facts = self.publisher.facts()
        self.metrics.set("ready", not self.not_ready())
        self.metrics.set("queue_depth", len(flow.waiting), stage="headers")
        self.metrics.set("queue_depth", len(flow.queue) + int(flow.running is not None), stage="score")
        self.metrics.set("queue_oldest_age_seconds", flow.oldest_wait_s(now), stage="score")
        self.metrics.set("zmq_subscribers", facts["subscriptions"])
        self.metrics.set("outbox_pending", facts["outbox_pending"])
        self.metrics.count("replay_requests_total", facts["replay_requests"] - self._replays_counted)
        self._replays_counted = facts["replay_requests"]
        self.board.show(flow.progress())
        self.metrics.set("ledger_pending", len(self._unwritten))
        self.metrics.set("audit_pending", self.audit.pending)
        opened = Counter(scanner for _, _, scanner, _, _ in flow.assembly.open_stacks())
        for scanner in self._scanners():
            self.metrics.set("series_open", opened[scanner], scanner=scanner)

    def _scanners(self) -> tuple[str, ...]:
        """Every value of the label `scanner`."""
        return (*(s.slug for s in self.settings.scanners), UNKNOWN_SCANNER)

    def _scrape(self) -> bytes:
        """The metrics; called from the HTTP thread."""
        self.metrics.set("clock_seconds", time.time())
        return self.metrics.scrape()

    def _count_alert(self, change: AlertChange) -> None:
        """Called by the ledger, in the thread that made the change."""
        alert, metrics = change.alert, self.metrics
        if change.effect is Effect.RAISE:
            metrics.count(
                "alerts_total", scanner=alert.scanner, severity=change.severity, reason=change.artefact or OTHER
            )
            if change.seconds is not None:
                metrics.observe("last_slice_to_alert_seconds", change.seconds, scanner=alert.scanner)
        elif change.effect is Effect.COUNT:
            metrics.count("alerts_suppressed_total", scanner=alert.scanner)
        elif change.effect is Effect.ACKNOWLEDGE:
            metrics.count("alert_feedback_total", scanner=alert.scanner, verdict=alert.reason or OTHER)
            if change.seconds is not None:
                metrics.observe("alert_ack_seconds", change.seconds, scanner=alert.scanner)
            told = (alert.alert_id, alert.scanner, alert.reason, alert.by, alert.changed_at)
            self._write_down(lambda: self.audit.acknowledged(*told))
        elif change.happened is None and change.seconds is not None:
            metrics.observe("alert_display_seconds", change.seconds, scanner=alert.scanner)
        self._show_alerts(alert.scanner)

    def _show_alerts(self, scanner: str) -> None:
        """How many alerts of a scanner are open, and how many of them wait for an answer."""
        found = self.ledger.open_alerts(scanner)
        self.metrics.set("alerts_open", len(found), scanner=scanner)
        self.metrics.set("alerts_waiting", sum(a.acknowledged_at is None for a in found), scanner=scanner)

    # --- the audit ----------------------------------------------------------------------------------------------------

    def _begin_audit(self) -> None:
        """What is in force from now on, and the acknowledgements that an earlier crash kept out."""
        self._write_down(lambda: self.audit.write(Kind.STARTED, version=__version__))
        self._write_down(lambda: self.audit.settings(self.settings))
        self._write_down(self._audit_calibration)
        self._write_down(lambda: self.audit.catch_up(self.ledger.feedback()))

    def _audit_calibration(self) -> None:
        self.audit.differing(Kind.CALIBRATION, sha256=file_sha256(self.settings.state / FILE_NAME))

    def _write_down(self, write: Callable[[], None]) -> None:
        """Write to the audit; what a failing disk does not take waits there and is tried again."""
        try:
            write()
        except OSError as error:
            self.log.failure(error, process="main", step="audit")

    # --- SIGHUP -------------------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the settings again: all of them or none; what needs a restart is named."""
        try:
            new = load(self.file, self.flags).settings
            rules = load_rules(new.rules)
            waiting = needs_restart(self.settings, new)
            if not waiting:
                self.calibration.read()
        except (ConfigError, RuleError, CalibrationError) as error:
            self._refuse_reload("error", str(error))
            return
        if waiting:
            self._refuse_reload("warning", "needs a restart", waiting)
            return
        self.settings, self.rules = new, rules
        self.flow.settings, self.flow.rules = new, rules
        self.ledger.alerts = new.alerts
        self.metrics.allow_rules(rule.name for rule in rules)
        self.metrics.set("config_last_reload_successful", 1)
        self._write_down(lambda: self.audit.settings(new))
        self._write_down(self._audit_calibration)
        self.log.write(Event.RELOADED)

    def _refuse_reload(self, level: str, reason: str, waiting: Iterable[str] = ()) -> None:
        """Nothing changes; say why, and which settings need a restart."""
        named = ",".join(waiting) or None
        self.metrics.set("config_last_reload_successful", 0)
        self._write_down(lambda: self.audit.write(Kind.RELOAD_REFUSED, reason=reason, settings=named))
        self.log.write(Event.RELOAD_REFUSED, level=level, reason=reason, settings=named)


class _Calibration:
    """STATE/calibration.json, read at start and at SIGHUP."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._document: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Read the file again.

        Raises:
            CalibrationError: it cannot be used; what was read before stays.
        """
        self._document = load_site(self._path)

    def for_scan(self, model_sha256: str, scanner: str, rule: str) -> SiteCalibration | None:
        """The site's numbers for one scan, or None."""
        return in_force(self._document, model_sha256, scanner, rule)


def lock_state(state: Path) -> IO[str]:
    """Make the state folder this process's alone.

    Raises:
        ConfigError: another daemon uses it, or it cannot be made.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"state: {state}: {error.strerror}; give a folder that this user may write: --state DIR"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            f"state: {state} is in use by another rescan serve; stop that one or give another --state"
        ) from None
    return lock


def _site_key(state: Path) -> SiteKey:
    try:
        return SiteKey.load(state)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _with_port(settings: Settings, port: int) -> Settings:
    """The settings with the DICOM port that was chosen, so that a receiver that starts again takes the same one."""
    return dataclasses.replace(settings, dicom=dataclasses.replace(settings.dicom, port=port))


def write_json(path: Path, values: Mapping[str, int]) -> None:
    """Write a small file, whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(values) + "\n", encoding="utf-8")
    fresh.replace(path)


def read_judged(state: Path) -> int:
    """Spool position before which everything was judged when the daemon last looked; 0 where it never did."""
    try:
        return int(json.loads((state / JUDGED_FILE).read_text(encoding="utf-8"))["before_position"])
    except (OSError, ValueError, KeyError):
        return 0


def resident_bytes(pid: int) -> float:
    """Resident memory of a process; 0 where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _outcome(result: dict[str, Any]) -> str:
    """What became of a stack, as the metric says it."""
    if result["verdict"] != "CANNOT_JUDGE":
        return "scored"
    code = result["reasons"][0]["code"]
    if code in {"scorer_crashed", "scorer_failed"}:
        return "failed"
    return "incomplete" if code in {"incomplete", "missing_slices", "partial_coverage"} else "skipped"


def run(settings: Settings, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> int:
    """Be the daemon until a signal.

    Raises:
        ConfigError: it cannot start; one line.
    """
    quiet_libraries(Log(settings.log.format), "main")
    try:
        return App(settings, file, flags).run()
    except (CalibrationError, RuleError, SpoolError) as error:
        raise ConfigError(str(error)) from None
