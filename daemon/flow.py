"""From what was received to results, without a process, a socket or a thread: everything comes in and goes out by value.

The spool is a log of records. Each is applied in order to the assembly of stacks; the stacks that it calls complete become
scoring jobs; what the scorer answers becomes a result. After a restart the same records give the same stacks, and the
ledger says which results exist already: a result's id follows from its stack, revision, state and content.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from daemon import judge as judging
from daemon.calibration import SiteCalibration
from daemon.card import Card
from daemon.config import AlertMode, Settings
from daemon.header import Header
from daemon.reasons import REASONS
from daemon.result import Identity, Said, SiteKey, build_result
from daemon.rules import Rule, match_rule
from daemon.scorer import Scored
from daemon.series import Action, Assembly, Evidence, Judge, Stack
from daemon.spool import AssociationEnded, StoredInstance
from daemon.words import Reason, Refusal, Verdict

Record = StoredInstance | AssociationEnded
"""One entry of the spool's log."""

KEPT_OUTCOMES = 32
"""Scores of stacks whose final result is still to come, kept so that nothing is inferred twice."""


class Last(Protocol):
    """What the ledger knows of a stack's newest result."""

    @property
    def id(self) -> str:
        """Id of the result."""

    @property
    def revision(self) -> int:
        """Its revision."""

    @property
    def final(self) -> bool:
        """Whether it was final."""


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
        strikes: how often the scorer died of it.
    """

    number: int
    action: Judge
    rule: Rule
    content: str
    asked_at: float
    strikes: int = 0

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


@dataclass
class _Waiting:
    """A record that has not been applied; an instance waits for its header."""

    record: Record
    header: Header | Refusal | None = None


@dataclass
class Flow:
    """The state between the spool and the ledger.

    Attributes:
        settings: in force.
        key: turns UIDs into references.
        rules: selection rules, first match wins.
        last_result: the ledger's newest result of a stack, by its reference.
        site_calibration: (model hash, scanner, rule) -> the site's own numbers, or None.
        served: the model in use; None until it is loaded.
    """

    settings: Settings
    key: SiteKey
    rules: tuple[Rule, ...]
    assembly: Assembly
    last_result: Callable[[str], Last | None]
    site_calibration: Callable[[str, str, str], SiteCalibration | None]
    served: Served | None = None
    replaying: bool = True
    waiting: deque[_Waiting] = field(default_factory=deque)
    queue: dict[str, Job] = field(default_factory=dict)
    running: Job | None = None
    _by_position: dict[int, _Waiting] = field(default_factory=dict)
    _outcomes: OrderedDict[tuple[str, str], Scored] = field(default_factory=OrderedDict)
    _held_back: dict[str, Action] = field(default_factory=dict)
    _exam_seen: dict[str, float] = field(default_factory=dict)
    _jobs: int = 0
    _replayed_at: float = 0.0

    # --- records in ---------------------------------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        """Take the next record of the log."""
        waiting = _Waiting(record)
        self.waiting.append(waiting)
        if isinstance(record, StoredInstance):
            self._by_position[record.position] = waiting

    def add_header(self, position: int, header: Header | Refusal) -> None:
        """Take what the reader found in an instance."""
        waiting = self._by_position.pop(position, None)
        if waiting is not None:
            waiting.header = header

    def apply(self, now: float) -> Iterator[Verdicts]:
        """Apply, in order, the records that can be applied; yield the results that follow at once."""
        while self.waiting and (
            self.waiting[0].header is not None or isinstance(self.waiting[0].record, AssociationEnded)
        ):
            waiting = self.waiting.popleft()
            at = self._time_of(waiting.record, now)
            if self.replaying:
                yield from self._act(self.assembly.on_time(at), at)
            yield from self._act(self._apply_one(waiting, at), at)

    def apply_time(self, now: float) -> Iterator[Verdicts]:
        """Let time pass; not while records wait, whose arrival counts before the silence after them."""
        if not self.waiting and not self.replaying:
            yield from self._act(self.assembly.on_time(now), now)

    def end_replay(self, now: float) -> Iterator[Verdicts]:
        """All records from before this start are applied: act on what is new among what they say."""
        self.replaying = False
        held, self._held_back = list(self._held_back.values()), {}
        yield from self._act(held, now)
        yield from self.apply_time(now)

    def _apply_one(self, waiting: _Waiting, at: float) -> list[Action]:
        if isinstance(waiting.record, AssociationEnded):
            return self.assembly.on_association_ended(waiting.record, at)
        if isinstance(waiting.header, Header):
            study = waiting.header.study_uid
            self._exam_seen[study] = max(at, self._exam_seen.get(study, 0.0))
            return self.assembly.on_instance(waiting.record, waiting.header, at)
        return []

    def _time_of(self, record: Record, now: float) -> float:
        """Live, the moment of applying; in a replay, the moment of arrival, never running backwards."""
        if not self.replaying:
            return now
        self._replayed_at = min(max(self._replayed_at, record.received_at), now)
        return self._replayed_at

    # --- actions ------------------------------------------------------------------------------------------------------

    def _act(self, actions: list[Action], now: float) -> Iterator[Verdicts]:
        for action in actions:
            if self.replaying:
                self._held_back[action.stack.key] = action
            else:
                yield from self._act_on(action, now)

    def _act_on(self, action: Action, now: float) -> Iterator[Verdicts]:
        """Refuse, reuse what is known, or ask for scores."""
        content = content_hash(action.stack)
        if self._is_known(action, content):
            self.queue.pop(action.stack.key, None)
            return
        rule = action.reason if not isinstance(action, Judge) else match_rule(action.stack, self.rules)
        if isinstance(rule, Reason):
            self.queue.pop(action.stack.key, None)
            yield self._verdict(action, None, Scored(None, rule), content, now)
            return
        known = self._outcomes.get((action.stack.key, content))
        if known is not None:
            self.queue.pop(action.stack.key, None)
            yield self._verdict(action, rule, known, content, now)
            return
        self._jobs += 1
        self.queue[action.stack.key] = Job(self._jobs, action, rule, content, now)

    def _is_known(self, action: Action, content: str) -> bool:
        """Whether the ledger holds this very result, or the final one of the same content."""
        identity = self.identity(action.stack)
        last = self.last_result(identity.stack_ref)
        if last is None:
            return False
        finals = (True,) if action.final else (True, False)
        return last.id in {self.result_id(identity, last.revision, final, content) for final in finals}

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
        jobs = [*self.queue.values(), *([self.running] if self.running else [])]
        return max((now - job.asked_at for job in jobs), default=0.0)

    def scored(self, number: int, scored: Scored, now: float) -> Iterator[Verdicts]:
        """Take the scorer's answer."""
        job, self.running = self.running, None
        if job is None or job.number != number:
            return
        key = (job.stack.key, job.content)
        self._outcomes[key] = scored
        while len(self._outcomes) > KEPT_OUTCOMES:
            self._outcomes.popitem(last=False)
        newer = self.queue.get(job.stack.key)
        if newer is None:
            yield self._verdict(job.action, job.rule, scored, job.content, now)
        elif newer.content == job.content:
            del self.queue[job.stack.key]
            yield self._verdict(newer.action, newer.rule, scored, newer.content, now)

    def scorer_died(self, now: float) -> Iterator[Verdicts]:
        """The scorer ended: try its job again, or set the series aside after too many times."""
        job, self.running = self.running, None
        if job is None:
            return
        job = dataclasses.replace(job, strikes=job.strikes + 1)
        newer = self.queue.get(job.stack.key)
        if job.strikes < self.settings.model.strikes:
            if newer is None or newer.content == job.content:
                self.queue[job.stack.key] = dataclasses.replace(newer or job, strikes=job.strikes)
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
        last = self.last_result(identity.stack_ref)
        revision = action.revision if last is None else max(action.revision, last.revision + int(last.final))
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
            extra={"series": series_facts(action.stack, max(received))},
        )
        return Verdicts(result, identity, action.stack.study_uid, max(received))

    def _site(self, scanner: str, rule: Rule | None) -> SiteCalibration | None:
        if self.served is None or rule is None:
            return None
        return self.site_calibration(self.served.sha256, scanner, rule.name)


def content_hash(stack: Stack) -> str:
    """Hash of what a stack holds, whatever the order of arrival."""
    return hashlib.sha256("".join(sorted(stored.sha256 for stored in stack.instances)).encode()).hexdigest()


def series_facts(stack: Stack, ended_at: float) -> dict[str, Any]:
    """What a person at the console knows a series by, and nothing that tells who: number, images, time since the end."""
    facts = {"number": stack.representative.series_number, "instances": len(stack.instances), "ended_at": ended_at}
    return {name: value for name, value in facts.items() if value is not None}


def make_result(
    identity: Identity,
    scored: Scored,
    served: Served | None,
    rule: Rule | None,
    site: SiteCalibration | None,
    evidence: Evidence | None,
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
    scores = {} if scored.scores is None else {**scored.scores.flat(), "risk": scored.scores.risk}
    return build_result(
        identity,
        said,
        evidence={} if evidence is None else _plain(evidence),
        model={} if served is None else served.model(),
        engine={} if served is None else served.engine,
        policy={"rule": None if rule is None else rule.name, "calibration": calibration},
        scores=scores,
        artefacts=None if scored.scores is None else scored.scores.artefacts,
        **rest,
    )


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
