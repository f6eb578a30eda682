"""From what was received to results, without a process, a socket or a thread: everything comes in and goes out by value.

The spool is a log of records. Each is applied in order to the assembly of stacks; the stacks that it calls complete become
scoring jobs; what the scorer answers becomes a result. After a restart the same records give the same stacks, and the
ledger says which results exist already: a result's id follows from its stack, revision, state and content.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from daemon import judge as judging
from daemon.calibration import SiteCalibration
from daemon.card import Card
from daemon.completeness import State
from daemon.config import UNKNOWN_SCANNER, AlertMode, Settings
from daemon.header import Frame, Header
from daemon.ledger import Last
from daemon.page.store import Phase, Progress
from daemon.page_store import Current
from daemon.reasons import REASONS
from daemon.result import Identity, Said, SiteKey, build_result
from daemon.rules import Rule, match_rule
from daemon.score import WorstSlice
from daemon.scorer import Scored
from daemon.series import Assembly
from daemon.spool import AssociationEnded, StoredInstance
from daemon.stack import Action, Evidence, Judge, Refuse, Stack
from daemon.words import Reason, Refusal, Verdict

Record = StoredInstance | AssociationEnded
"""One entry of the spool's log."""

KEPT_OUTCOMES = 32
"""Scores of stacks whose final result is still to come, kept so that nothing is inferred twice."""


SETTLE_S = 60.0
"""Beyond the longest time that a stack stays open, before its instances count as judged."""

KEPT_EXAMS = 1000
"""Exams whose last arrival is remembered, to score the newest first."""


DEVICE_ATTRIBUTES = ("Manufacturer", "ManufacturerModelName", "StationName", "InstitutionName")
"""What tells machines apart that share the name `unknown`; the calling AE title may be that of an archive."""

MAX_SHARED = 20_000
"""Values kept for sharing between headers; beyond it the collection starts anew."""


class Shared:
    """Equal values become one object: the slices of a series differ in their position and little else."""

    def __init__(self) -> None:
        """Start empty."""
        self._known: dict[Any, Any] = {}

    def one(self, value: Any) -> Any:
        """The first value seen that is equal and of the same type."""
        if len(self._known) > MAX_SHARED:
            self._known.clear()
        return self._known.setdefault((type(value), value), value)

    def record(self, record: Record) -> Record:
        """The same record, its repeated words shared."""
        if not isinstance(record, StoredInstance):
            return record
        names = ("sop_class_uid", "transfer_syntax_uid", "scanner", "size_bytes", "association", "segment")
        return replace(record, **{name: self.one(getattr(record, name)) for name in names})

    def header(self, header: Header, record: StoredInstance) -> Header:
        """The same header, its repeated values shared with others and with its record."""
        names = (
            "sop_class_uid",
            "series_uid",
            "study_uid",
            "frame_of_reference_uid",
            "photometric",
            "scanning",
            "variant",
        )
        same = {name: self.one(getattr(header, name)) for name in names}
        if header.sop_instance_uid == record.sop_instance_uid:
            same["sop_instance_uid"] = record.sop_instance_uid
        return replace(header, frames=tuple(self._frame(frame) for frame in header.frames), **same)

    def _frame(self, frame: Frame) -> Frame:
        names = ("orientation", "pixel_spacing_mm", "thickness_mm", "image_type", "component", "coil")
        numbers = ("echo_time_ms", "inversion_time_ms", "b_value")
        return replace(frame, **{name: self.one(getattr(frame, name)) for name in (*names, *numbers)})


class Book(Protocol):
    """What the flow asks the ledger; `daemon.ledger.Ledger` is one."""

    def last_result(self, stack_ref: str) -> Last | None:
        """The newest result of a stack."""

    def seen(self, result_id: str) -> bool:
        """Whether a result was written."""

    def strike(self, stack_ref: str) -> int:
        """Count a death of the scorer while it held this stack, and say how many there are."""


@dataclass(frozen=True)
class Served:
    """The model in use.

    Attributes:
        card: its contract.
        sha256: of the file.
        engine: provider, precision, device.
    """

    card: Card
    sha256: str
    engine: Mapping[str, Any]

    def model(self) -> dict[str, str]:
        """The `model` object of a result."""
        return {"name": self.card.name, "version": self.card.version, "sha256": self.sha256}


@dataclass(frozen=True)
class Job:
    """One stack to score.

    Attributes:
        number: of the job.
        action: what the assembly asked for.
        rule: the selection rule that admitted it.
        content: hash of what the stack holds.
        asked_at: when it was asked for.
    """

    number: int
    action: Judge
    rule: Rule
    content: str
    asked_at: float

    @property
    def stack(self) -> Stack:
        """The stack to score."""
        return self.action.stack


@dataclass(frozen=True)
class Verdicts:
    """One result with what only the main process needs to know of it."""

    result: dict[str, Any]
    identity: Identity
    study_uid: str
    last_received_at: float


@dataclass(frozen=True)
class NewExam:
    """The first instance of an exam has come.

    Attributes:
        scanner: configured slug, else `unknown`.
        exam_ref: of the exam.
        at: when, on the main loop's clock.
        device: keyed hash of the machine, where the scanner has no configured name and the header names the machine.
    """

    scanner: str
    exam_ref: str
    at: float
    device: str | None


@dataclass
class Arriving:
    """The series that a scanner sent an instance of last.

    Attributes:
        series_uid: of the series; stays in the main process.
        exam_ref: reference of its exam.
        number: as on the console, or None.
        expected: images that the header announces, or None.
        since: unix seconds of its first image.
        instances: images so far.
    """

    series_uid: str
    exam_ref: str
    number: int | None
    expected: int | None
    since: float
    instances: int = 0


@dataclass
class _Waiting:
    """A record that has not been applied; an instance waits for its header."""

    record: Record
    header: Header | Reason | None = None


@dataclass
class Flow:
    """The state between the spool and the ledger.

    Attributes:
        settings: in force.
        key: turns UIDs into references.
        rules: selection rules, first match wins.
        book: the ledger.
        site_calibration: (model hash, scanner, rule) -> the site's own numbers, or None.
        served: the model in use; None until it is loaded.
        on_failure: told of an error that a single instance caused.
        clock_step_s: how far the wall clock, which stamps records, is ahead of the main loop's clock, which never jumps.
    """

    settings: Settings
    key: SiteKey
    rules: tuple[Rule, ...]
    assembly: Assembly
    book: Book
    site_calibration: Callable[[str, str, str], SiteCalibration | None]
    served: Served | None = None
    on_failure: Callable[[BaseException], None] = lambda _: None
    clock_step_s: float = 0.0
    replaying: bool = True
    waiting: deque[_Waiting] = field(default_factory=deque)
    queue: dict[str, Job] = field(default_factory=dict)
    running: Job | None = None
    new_exams: list[NewExam] = field(default_factory=list)
    arriving: dict[str, Arriving] = field(default_factory=dict)
    _recent: deque[tuple[float, float, int]] = field(default_factory=deque)
    _by_position: dict[int, _Waiting] = field(default_factory=dict)
    _outcomes: OrderedDict[tuple[str, str], Scored] = field(default_factory=OrderedDict)
    _asked: dict[str, Action] = field(default_factory=dict)
    _exam_seen: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _shared: Shared = field(default_factory=Shared)
    _jobs: int = 0
    _at: float = 0.0
    _settled: int = 0

    # --- records in ---------------------------------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        """Take the next record of the log."""
        waiting = _Waiting(self._shared.record(record))
        self.waiting.append(waiting)
        if isinstance(record, StoredInstance):
            self._by_position[record.position] = waiting

    def add_header(self, position: int, header: Header | Reason) -> None:
        """Take what the reader found in an instance."""
        waiting = self._by_position.pop(position, None)
        if waiting is None:
            return
        if isinstance(header, Header) and isinstance(waiting.record, StoredInstance):
            header = self._shared.header(header, waiting.record)
        waiting.header = header

    def apply(self, now: float) -> Iterator[Verdicts]:
        """Apply, in order, the records that can be applied; yield the results that follow at once."""
        while self.waiting and (
            self.waiting[0].header is not None or isinstance(self.waiting[0].record, AssociationEnded)
        ):
            waiting = self.waiting.popleft()
            self._at = at = self._time_of(waiting.record, now)
            self._note_time(at, waiting.record.position)
            self._ask(self.assembly.on_time(at))
            self._ask(self._apply_one(waiting, at))
        yield from self._act(now)

    def apply_time(self, now: float) -> Iterator[Verdicts]:
        """Let time pass: up to now, or to the arrival of the oldest record that waits, which counts before what is later."""
        if not self.replaying:
            self._at = self._time_of(self.waiting[0].record, now) if self.waiting else max(self._at, now)
            self._ask(self.assembly.on_time(self._at))
        yield from self._act(now)

    def score_now(self, scanner: str, now: float) -> Iterator[Verdicts]:
        """A person at this scanner waits: judge, provisionally, what has come of every stack that is open."""
        for key, _, of, *_ in self.assembly.open_stacks():
            if of == scanner and not self.replaying:
                self._ask(self.assembly.on_score_now(key, self._at))
        yield from self._act(now)

    def next_deadline(self) -> float | None:
        """When time alone changes something; None while records wait."""
        return None if self.waiting or self.replaying else self.assembly.next_deadline()

    def end_replay(self, now: float) -> Iterator[Verdicts]:
        """All records from before this start are applied: act on what is new among what they say."""
        self.replaying = False
        yield from self.apply_time(now)

    def judged_before(self, now: float) -> int:
        """Position before which every record belongs to stacks that are judged for good.

        A stack is final at the latest `max_open_s` after it opened; what is still to be applied or scored counts as open.
        """
        settled = now - self.settings.completeness.max_open_s - SETTLE_S
        judged = 0
        while self._recent and self._recent[0][0] < settled:
            judged = self._recent.popleft()[2]
        self._settled = max(self._settled, judged)
        held = [stored.position for job in self._jobs_in_hand() for stored in job.stack.instances]
        held += [waiting.record.position for waiting in list(self.waiting)[:1]]
        return min([self._settled + 1, *held])

    def _note_time(self, at: float, position: int) -> None:
        """Remember when a record was applied, once a second."""
        if self._recent and at - self._recent[-1][1] < 1.0:
            self._recent.append((at, self._recent.pop()[1], position))
        else:
            self._recent.append((at, at, position))

    def _jobs_in_hand(self) -> list[Job]:
        return [*self.queue.values(), *([self.running] if self.running else [])]

    def _apply_one(self, waiting: _Waiting, at: float) -> list[Action]:
        if isinstance(waiting.record, AssociationEnded):
            return self.assembly.on_association_ended(waiting.record, at)
        header = waiting.header
        if isinstance(header, Header):
            self._note_exam(waiting.record.scanner, header, at)
            self._note_arrival(waiting.record.scanner, header, at)
        if header is None:
            return []
        facts = header if isinstance(header, Header) else Refusal(header.code, header.text)
        try:
            return self.assembly.on_instance(waiting.record, facts, at)
        except Exception as error:  # noqa: BLE001  (border: one strange header must not end the main loop at every start)
            self.on_failure(error)
            return []

    def _note_arrival(self, scanner: str, header: Header, at: float) -> None:
        found = self.arriving.get(scanner)
        if found is None or found.series_uid != header.series_uid:
            frames = header.number_of_frames if header.number_of_frames > 1 else None
            expected = header.expected_slices or header.expected_images or frames
            exam = self.key.ref(header.study_uid)
            found = Arriving(header.series_uid, exam, header.series_number, expected, at)
            self.arriving[scanner] = found
        found.instances += max(header.number_of_frames, 1)

    def progress(self) -> dict[str, Current]:
        """What each scanner is doing, for the page."""
        judging = {job.stack.series_uid for job in self._jobs_in_hand()}
        receiving = {uid for _, uid, _, state, _ in self.assembly.open_stacks() if state is State.OPEN}
        return {scanner: self._current(a, judging, receiving) for scanner, a in self.arriving.items()}

    def _current(self, arriving: Arriving, judging: set[str], receiving: set[str]) -> Current:
        uid = arriving.series_uid
        phase = Phase.JUDGING if uid in judging else Phase.RECEIVING if uid in receiving else None
        if phase is None:
            return Current(arriving.exam_ref, None)
        facts = (self.key.ref(uid), arriving.number, arriving.instances, arriving.expected, arriving.since)
        return Current(arriving.exam_ref, Progress(phase, *facts))

    def _note_exam(self, scanner: str, header: Header, at: float) -> None:
        study_uid = header.study_uid
        if study_uid not in self._exam_seen:
            self.new_exams.append(NewExam(scanner, self.key.ref(study_uid), at, self._device(scanner, header)))
        self._exam_seen[study_uid] = max(at, self._exam_seen.pop(study_uid, 0.0))
        while len(self._exam_seen) > KEPT_EXAMS:
            self._exam_seen.popitem(last=False)

    def _time_of(self, record: Record, now: float) -> float:
        """When a record arrived, on the clock of the main loop: never backwards, never in the future."""
        return max(self._at, min(record.received_at - self.clock_step_s, now))

    # --- actions ------------------------------------------------------------------------------------------------------

    def _ask(self, actions: list[Action]) -> None:
        """Note the newest word about each stack."""
        self._asked |= {action.stack.key: action for action in actions}

    def _act(self, now: float) -> Iterator[Verdicts]:
        """Act on what was asked; in a replay, only once all has been read. What fails stays asked."""
        while self._asked and not self.replaying:
            key, action = next(iter(self._asked.items()))
            verdict = self._act_on(action, now)
            del self._asked[key]
            if verdict is not None:
                yield verdict

    def _act_on(self, action: Action, now: float) -> Verdicts | None:
        """Refuse, reuse what is known, or ask for scores."""
        key, content = action.stack.key, content_hash(action.stack)
        if self._is_known(action, content):
            self.queue.pop(key, None)
            return None
        rule = match_rule(action.stack, self.rules, self.served.card.name if self.served else None)
        known = self._outcomes.get((key, content))
        if isinstance(action, Refuse):
            known = Scored(None, action.reason)
        elif isinstance(rule, Reason):
            known = Scored(None, rule)
        elif known is None:
            self._jobs += 1
            self.queue[key] = Job(self._jobs, action, rule, content, now)
            return None
        verdict = self._verdict(action, rule if isinstance(rule, Rule) else None, known, content, now)
        self.queue.pop(key, None)
        return verdict

    def _is_known(self, action: Action, content: str) -> bool:
        """Whether the ledger holds this very result, or the final one of the same content."""
        identity = self.identity(action.stack)
        last = self.book.last_result(identity.stack_ref)
        finals = (True,) if action.final else (True, False)
        revisions = range(1, last.revision + 1) if last is not None else ()
        return any(self.book.seen(self.result_id(identity, r, f, content)) for r in revisions for f in finals)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """The job to score now: of the newest exam first, then the one that waits longest. Marks it as running."""
        if self.running is not None or self.replaying or not self.queue:
            return None
        key = min(
            self.queue, key=lambda k: (-self._exam_seen.get(self.queue[k].stack.study_uid, 0.0), self.queue[k].asked_at)
        )
        self.running = self.queue.pop(key)
        return self.running

    def oldest_wait_s(self, now: float) -> float:
        """Seconds since the oldest stack that waits for its scores was asked for; 0 when none waits."""
        return max((now - job.asked_at for job in self._jobs_in_hand()), default=0.0)

    def scored(self, number: int, scored: Scored, now: float) -> Iterator[Verdicts]:
        """Take the scorer's answer."""
        job, self.running = self.running, None
        if job is None or job.number != number:
            return
        self._outcomes[job.stack.key, job.content] = scored
        while len(self._outcomes) > KEPT_OUTCOMES:
            self._outcomes.popitem(last=False)
        newer = self.queue.get(job.stack.key, job)
        if newer.content == job.content:
            self.queue.pop(job.stack.key, None)
            self._asked.setdefault(job.stack.key, newer.action)
        yield from self._act(now)

    def scorer_died(self, now: float) -> Iterator[Verdicts]:
        """The scorer ended: try its job again, or set the series aside after too many times."""
        job, self.running = self.running, None
        if job is None:
            return
        self.queue.setdefault(job.stack.key, job)
        if self.book.strike(self.identity(job.stack).stack_ref) < self.settings.model.strikes:
            return
        self.running = job
        yield from self.scored(job.number, Scored(None, Reason("scorer_crashed", REASONS["scorer_crashed"])), now)

    # --- results ------------------------------------------------------------------------------------------------------

    def identity(self, stack: Stack) -> Identity:
        """References of a stack."""
        return self.key.identity(stack.series_uid, stack.study_uid, stack.key, stack.scanner)

    def result_id(self, identity: Identity, revision: int, final: bool, content: str) -> str:
        """The id of a result; the same facts give the same id."""
        return self.key.ref(f"{identity.stack_ref} {revision} {'final' if final else 'provisional'} {content}")

    def _verdict(self, action: Action, rule: Rule | None, scored: Scored, content: str, now: float) -> Verdicts:
        identity = self.identity(action.stack)
        last = self.book.last_result(identity.stack_ref)
        revision = 1 if last is None else last.revision + int(last.final)
        scanner = self.settings.scanner(identity.scanner)
        received = [stored.received_at for stored in action.stack.instances]
        seconds = scored.seconds
        result = make_result(
            identity,
            scored,
            self.served,
            rule,
            self._site(identity.scanner, rule),
            action.evidence,
            result_id=self.result_id(identity, revision, action.final, content),
            final=action.final,
            revision=revision,
            supersedes=None if last is None else last.id,
            shadow=scanner is not None and scanner.alerts is AlertMode.SHADOW,
            timing_s={
                "receive": max(received) - min(received),
                "assemble": seconds.get("volume"),
                **{name: seconds.get(name) for name in ("prepare", "infer", "score")},
                "last_instance_to_verdict": max(now - max(received), 0.0),
            },
            extra={
                "series": self._series_facts(action.stack, min(received), max(received)),
                **({} if scored.scores is None else {"pictures": self.picture_name(action.stack, content)}),
            },
        )
        return Verdicts(result, identity, action.stack.study_uid, max(received))

    def picture_name(self, stack: Stack, content: str) -> str:
        """What the pictures of a scored stack are filed under: the same for its provisional and its final result."""
        return self.key.ref(f"pictures {stack.key} {content}")

    def _series_facts(self, stack: Stack, began_at: float, ended_at: float) -> dict[str, Any]:
        """What a person at the console knows a series by, and nothing that tells who; what is unknown is absent."""
        header = stack.representative
        protocol = header.attributes.get("ProtocolName") or header.attributes.get("SeriesDescription")
        facts = {
            "number": header.series_number,
            "instances": len(stack.instances),
            "began_at": began_at,
            "ended_at": ended_at,
            "duration_s": header.attributes.get("AcquisitionDuration"),
            "protocol_ref": self.key.ref(f"protocol {protocol}") if protocol else None,
            "device_ref": self._device(stack.scanner, header),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _device(self, scanner: str, header: Header) -> str | None:
        """Keyed hash of the machine that the header names; None where the scanner has a name of its own, or none is given."""
        named = [str(header.attributes.get(name, "")).strip() for name in DEVICE_ATTRIBUTES]
        if scanner != UNKNOWN_SCANNER or not any(named):
            return None
        return self.key.ref("device " + "\n".join(named))

    def _site(self, scanner: str, rule: Rule | None) -> SiteCalibration | None:
        if self.served is None or rule is None:
            return None
        return self.site_calibration(self.served.sha256, scanner, rule.name)


def content_hash(stack: Stack) -> str:
    """Hash of what a stack holds, whatever the order of arrival."""
    return hashlib.sha256("".join(sorted(stored.sha256 for stored in stack.instances)).encode()).hexdigest()


def make_result(
    identity: Identity,
    scored: Scored,
    served: Served | None,
    rule: Rule | None,
    site: SiteCalibration | None,
    evidence: Evidence | None,
    *,
    extra: Mapping[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """The result object of one scored or refused stack; `rest` goes to `build_result` as it is."""
    calibration = "none"
    if scored.scores is None or served is None:
        reason = scored.refusal or Reason("scorer_failed", REASONS["scorer_failed"])
        said = Said(Verdict.CANNOT_JUDGE, (reason,), (judging.ADVICE_BY_HAND,), None, _required(rule, served))
    else:
        judgement = judging.judge(scored.scores, served.card, rule, site, evidence)
        calibration = judgement.calibration
        said = Said(
            judgement.verdict, judgement.reasons, judgement.advice, judgement.dominant_artefact, judgement.required_dice
        )
    found = scored.scores
    extra = {**(extra or {}), "worst_slices": [] if found is None else [worst_slice(each) for each in found.slices]}
    return build_result(
        identity,
        said,
        evidence={} if evidence is None else _plain(evidence),
        model={} if served is None else served.model(),
        engine={} if served is None else served.engine,
        policy={"rule": None if rule is None else rule.name, "calibration": calibration},
        scores={} if found is None else {**found.flat(), "risk": found.risk},
        artefacts=None if found is None else found.artefacts,
        extra=extra,
        **rest,
    )


def worst_slice(found: WorstSlice) -> dict[str, Any]:
    """A worst slice as a result tells it."""
    return {
        "plane": found.plane,
        "index": found.index,
        "place": found.place,
        "variance": float(f"{found.variance:.4g}"),
    }


def _required(rule: Rule | None, served: Served | None) -> float | None:
    if rule is not None and rule.required_dice is not None:
        return rule.required_dice
    if served is not None and served.card.calibration is not None:
        return served.card.calibration.required_dice
    return None


def _plain(evidence: Evidence) -> dict[str, Any]:
    return {
        "completeness": str(evidence.completeness),
        "instances": evidence.instances,
        "expected": evidence.expected,
        "rule": evidence.rule,
    }
