"""Which instances make a stack, and when it is complete.

A pure table: instances, ends of associations and the time go in, actions come out; no clock, no disk, no engine. The same
records in the same order give the same stacks and actions, so a restart replays the spool and stands where it stood.

An instance costs the same whether it is the tenth or the ten-thousandth: geometry is looked at only when the evidence of
completeness is, never per instance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from daemon.completeness import TABLE, Complete, Effect, Event, State
from daemon.config import CompletenessSettings, Settings
from daemon.geometry import Geometry, first_volume, measure
from daemon.header import MAX_FRAMES, MULTI_FRAME, SUPPORTED, Frame, Header
from daemon.reasons import REASONS
from daemon.series_pack import Packed, pack, unpack
from daemon.spool import AssociationEnded, StoredInstance
from daemon.stack import Action, Judge, Plane, Refuse, Stack
from daemon.words import Reason, Refusal

# --- What tells one stack from another --------------------------------------------------------------------------------

ORIENTATION_TOLERANCE = 1e-3
"""Direction cosines of one stack agree to this: 0.06 degrees, coarser than any rounding seen, finer than any replan."""

SPACING_TOLERANCE = 1e-3
"""Pixel spacings of one stack agree to 0.001 mm."""

ECHO_TOLERANCE_MS = 0.05
"""Echo times of one stack agree to this; the echoes of a multi-echo series lie 0.5 ms or more apart."""

INVERSION_TOLERANCE_MS = 1.0
B_VALUE_TOLERANCE = 0.5

MAX_CLASSES = 64
"""Orientations, echoes, b-values of one series that are told apart by tolerance; beyond it they are compared exactly, so
that an instance costs the same in a radial or diffusion series of thousands."""

ONE_UID_PER_SLICE = ("CANON", "TOSHIBA")
"""Makers whose classic images carry a SeriesInstanceUID for each slice; their series is known by its number."""

LATE_LIMIT_S = 20.0
"""A scanner's learnt quiet time grows no further: nobody stands at the console for longer without a word."""

FORGET_S = 24 * 3600.0
"""A stack is forgotten so long after its last image, when its bytes may have left the spool. The ledger still knows its results."""

PACK_AGAIN_S = 60.0
"""Copies of a judged series that come so long after one another each get its images out anew."""

GAP_FACTOR = 3.0
"""Adaptive quiet time: silence means something only when it is this many times the longest pause within the stack."""

LATE_FACTOR = 1.5
"""After an image that came later than the quiet time, the scanner's quiet time becomes this many times that pause."""

CALM = 0.8
"""How much of a scanner's learnt quiet time is left after each stack that ended without a late image."""

_PREFERENCE = {"DIS3D": 4, "DIS2D": 2, "NORM": 1}
"""Word of ImageType -> how much it is preferred among twins: distortion-corrected is what radiologists read."""

_TWIN_WORDS = frozenset((*_PREFERENCE, "ND"))

Features = tuple[float | None, ...]

_TOLERANCES = (
    *([ORIENTATION_TOLERANCE] * 6),
    *([SPACING_TOLERANCE] * 2),
    ECHO_TOLERANCE_MS,
    INVERSION_TOLERANCE_MS,
    B_VALUE_TOLERANCE,
)
_ROUND = (3, 3, 3, 3, 3, 3, 3, 3, 1, 0, 0)


def _features(frame: Frame) -> Features:
    """The numbers in which the planes of a stack agree, each to its tolerance."""
    orientation = frame.orientation or (None,) * 6
    spacing = frame.pixel_spacing_mm or (None,) * 2
    return (*orientation, *spacing, frame.echo_time_ms, frame.inversion_time_ms, frame.b_value)


def _agree(a: Features, b: Features) -> bool:
    return all(
        x is y or (x is not None and y is not None and abs(x - y) <= tolerance)
        for x, y, tolerance in zip(a, b, _TOLERANCES, strict=True)
    )


def _preference(frame: Frame) -> int:
    return sum(_PREFERENCE.get(word, 0) for word in set(frame.image_type))


def _twin_name(scanner: str, header: Header, frame: Frame) -> tuple[object, ...] | None:
    """What twins share: one acquisition, reconstructed more than once; None where the header does not tell."""
    if not header.acquired_at or not _TWIN_WORDS.intersection(frame.image_type):
        return None
    words = tuple(word for word in frame.image_type if word not in _TWIN_WORDS)
    return (scanner, header.study_uid, header.acquired_at, header.rows, header.columns, words, frame.component)


Group = tuple[str, ...]


def _group(scanner: str, header: Header) -> Group:
    """What a scanner calls a series; Canon's is known by its number."""
    maker = str(header.attributes.get("Manufacturer", "")).upper()
    by_number = maker.startswith(ONE_UID_PER_SLICE) and header.series_number is not None and header.study_uid
    name = f"number {header.series_number}" if by_number else header.series_uid
    return (scanner, header.study_uid, name)


def _kind(header: Header, frame: Frame) -> tuple[object, ...]:
    """The words and whole numbers in which the planes of a stack agree."""
    return (
        header.sop_class_uid in MULTI_FRAME,
        header.sop_class_uid if header.sop_class_uid not in SUPPORTED else "",
        header.frame_of_reference_uid,
        header.rows,
        header.columns,
        header.samples_per_pixel,
        header.photometric,
        frame.image_type,
        frame.component,
        frame.echo_number,
        frame.coil,
    )


# --- The state of one stack -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """One plane held."""

    stored: StoredInstance
    frame: int
    facts: Frame


@dataclass(slots=True)
class _Count:
    """How many images a header announces for an acquisition, and how many of them have come."""

    expected: int
    uids: set[str] = field(default_factory=set)
    stacks: dict[str, _Open] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Open:
    """A stack being assembled."""

    key: str
    group: Group
    series_uid: str
    study_uid: str
    scanner: str
    features: Features
    header: Header
    refusal: Reason | None
    opened_at: float
    last_at: float
    held: dict[tuple[str, int], _Held] = field(default_factory=dict)
    frames_announced: dict[str, int] = field(default_factory=dict)
    state: State = State.OPEN
    revision: int = 1
    longest_gap_s: float = 0.0
    feeding: set[int] = field(default_factory=set)
    clean: bool = False
    ended_at: float = 0.0
    count: _Count | None = None
    tried: set[Event] = field(default_factory=set)
    told: bytes | None = None
    told_final: bool = False
    scheduled: float | None = None
    names: list[tuple[object, ...]] = field(default_factory=list)
    twins: tuple[object, ...] | None = None
    packed: Packed | None = None

    @property
    def planes(self) -> int:
        """How many planes it holds, at hand or packed."""
        return self.packed.planes if self.packed is not None else len(self.held)


class Assembly:
    """All stacks of all scanners."""

    def __init__(self, settings: Settings) -> None:
        """Start empty.

        Args:
            settings: for the completeness times and the scanners' own quiet times.
        """
        self._settings = settings
        self._stacks: dict[str, _Open] = {}
        self._classes: dict[tuple[object, ...], list[_Open]] = {}
        self._exact: dict[tuple[object, ...], _Open] = {}
        self._groups: dict[Group, list[_Open]] = {}
        self._of_instance: dict[tuple[Group, str], tuple[str, list[_Open]]] = {}
        self._counts: dict[tuple[object, ...], _Count] = {}
        self._twins: dict[tuple[object, ...], list[_Open]] = {}
        self._fed: dict[int, dict[str, _Open]] = {}
        self._learnt_s: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self.conflicts = 0
        self.duplicates = 0

    @property
    def _times(self) -> CompletenessSettings:
        return self._settings.completeness

    # --- events ---------------------------------------------------------------------------------------------------

    def on_instance(self, stored: StoredInstance, header: Header | Refusal, now: float) -> list[Action]:
        """Take an image.

        Args:
            stored: where its bytes lie.
            header: its facts, or why there are none.
            now: seconds since 1970, at least that of the last call.

        Returns:
            Actions that follow at once (none today: all evidence waits for a moment).
        """
        if isinstance(header, Refusal):
            self._take_unreadable(stored, header.reason, now)
            return []
        group = _group(stored.scanner, header)
        self._unpack(group, now)
        known = self._of_instance.get((group, header.sop_instance_uid))
        if known is not None and known[0] == stored.sha256:
            self.duplicates += 1
            self._feed(stored, known[1])
            return []
        event = Event.NEW if known is None else Event.CONFLICT
        touched = self._place(stored, header, group, now)
        if known is not None:
            self.conflicts += 1
            self._drop(stored, known[1], now)
        self._of_instance[group, header.sop_instance_uid] = (stored.sha256, touched)
        self._count(header, group, touched)
        for stack in touched:
            self._arrive(stack, event, now)
        self._feed(stored, touched)
        return []

    def on_association_ended(self, ended: AssociationEnded, now: float) -> list[Action]:
        """An association is over: a clean release is evidence for the stacks it fed, anything else is not."""
        for stack in self._fed.pop(ended.association, {}).values():
            stack.feeding.discard(ended.association)
            stack.clean, stack.ended_at = ended.released, now
            stack.tried.discard(Event.RELEASED)
            self._schedule(stack)
        return []

    def on_time(self, now: float) -> list[Action]:
        """Let time pass: act on every stack whose evidence has become sufficient."""
        actions: list[Action] = []
        while self._heap and self._heap[0][0] <= now:
            _, _, key = heapq.heappop(self._heap)
            stack = self._stacks.get(key)
            if stack is None:
                continue
            stack.scheduled = None
            actions += self._act_if_due(stack, now)
        return actions

    def on_score_now(self, name: str, now: float) -> list[Action]:  # noqa: ARG002  (all events tell the time)
        """A person waits for the verdict.

        Args:
            name: key of a stack, or a SeriesInstanceUID for all its stacks.
            now: seconds since 1970.
        """
        actions: list[Action] = []
        for stack in list(self._stacks.values()):
            if name in (stack.key, stack.series_uid):
                actions += self._happen(stack, Event.SCORE_NOW)
        return actions

    def next_deadline(self) -> float | None:
        """When `on_time` has something to look at, None if never."""
        return self._heap[0][0] if self._heap else None

    def open_stacks(self) -> list[tuple[str, str, str, State, int]]:
        """Key, SeriesInstanceUID, scanner, state and number of images of every stack that is not final."""
        return [
            (s.key, s.series_uid, s.scanner, s.state, s.planes)
            for s in self._stacks.values()
            if s.state is not State.FINAL
        ]

    def all_stacks(self) -> list[Stack]:
        """Every stack as it stands, in the order in which they opened."""
        for group in self._groups:
            self._unpack(group, 0.0)
        return [self._build(stack) for stack in self._stacks.values()]

    # --- placing images ---------------------------------------------------------------------------------------------

    def _place(self, stored: StoredInstance, header: Header, group: Group, now: float) -> list[_Open]:
        """Put each frame of an instance into its stack."""
        touched: dict[str, _Open] = {}
        announced = header.number_of_frames if header.sop_class_uid in MULTI_FRAME else 1
        for number, frame in enumerate(header.frames or (Frame(),)):
            stack = self._stack_of(stored, header, frame, group, now)
            stack.held[header.sop_instance_uid, number] = _Held(stored, number, frame)
            if announced > max(len(header.frames), 1):
                stack.frames_announced[header.sop_instance_uid] = announced - len(header.frames)
            touched[stack.key] = stack
        return list(touched.values())

    def _stack_of(self, stored: StoredInstance, header: Header, frame: Frame, group: Group, now: float) -> _Open:
        kind = (group, _kind(header, frame))
        features = _features(frame)
        found = self._exact.get((kind, features))
        if found is not None:
            return found
        classes = self._classes.setdefault(kind, [])
        found = next((stack for stack in classes[:MAX_CLASSES] if _agree(stack.features, features)), None)
        if found is None:
            found = self._open(stored, header, frame, (group, kind, features), now)
            classes.append(found)
        self._exact[kind, features] = found
        found.names.append((kind, features))
        return found

    def _open(
        self, stored: StoredInstance, header: Header, frame: Frame, identity: tuple[object, ...], now: float
    ) -> _Open:
        group = _group(stored.scanner, header)
        rounded = [None if x is None else round(x, n) + 0.0 for x, n in zip(_features(frame), _ROUND, strict=True)]
        text = repr((identity[1], rounded))
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        while key in self._stacks:
            key = hashlib.sha256(key.encode()).hexdigest()[:32]
        stack = _Open(
            key=key,
            group=group,
            series_uid=header.series_uid,
            study_uid=header.study_uid,
            scanner=stored.scanner,
            features=_features(frame),
            header=dataclasses.replace(header, frames=(frame,)),
            refusal=_not_an_image(header),
            opened_at=now,
            last_at=now,
            twins=_twin_name(stored.scanner, header, frame),
        )
        self._stacks[key] = stack
        if stack.twins is not None:
            self._twins.setdefault(stack.twins, []).append(stack)
        self._groups.setdefault(group, []).append(stack)
        return stack

    def _take_unreadable(self, stored: StoredInstance, reason: Reason, now: float) -> None:
        """Instances without a readable header, kept together by their association."""
        header = Header(series_uid=f"unreadable {stored.association}", sop_instance_uid=stored.sop_instance_uid)
        group = (stored.scanner, "", header.series_uid)
        self._unpack(group, now)
        if (group, header.sop_instance_uid) in self._of_instance:
            self.duplicates += 1
            return
        stack = self._stack_of(stored, header, Frame(), group, now)
        stack.refusal = reason
        stack.held[stored.sop_instance_uid, 0] = _Held(stored, 0, Frame())
        self._of_instance[group, stored.sop_instance_uid] = (stored.sha256, [stack])
        self._arrive(stack, Event.NEW, now)
        self._feed(stored, [stack])

    def _drop(self, newer: StoredInstance, stacks: Iterable[_Open], now: float) -> None:
        """Take what an instance replaces out of its stacks; where nothing is left, forget the stack."""
        uid = newer.sop_instance_uid
        for stack in stacks:
            planes = [(name, held) for name, held in stack.held.items() if name[0] == uid]
            for name, held in planes:
                if held.stored.sha256 != newer.sha256:
                    del stack.held[name]
            if all(held.stored.sha256 != newer.sha256 for _, held in planes):
                stack.frames_announced.pop(uid, None)
            if stack.held:
                self._arrive(stack, Event.CONFLICT, now)
            else:
                self._forget(stack)

    def _count(self, header: Header, group: Group, touched: list[_Open]) -> None:
        """Count images against what the header announces for the acquisition."""
        if header.expected_images is None or header.sop_class_uid in MULTI_FRAME:
            return
        name = (group, header.acquisition_number, header.expected_images)
        count = self._counts.setdefault(name, _Count(header.expected_images))
        count.uids.add(header.sop_instance_uid)
        for stack in touched:
            stack.count = count
            count.stacks[stack.key] = stack
        if len(count.uids) == count.expected:
            for stack in count.stacks.values():
                self._schedule(stack)

    def _feed(self, stored: StoredInstance, stacks: Iterable[_Open]) -> None:
        """Remember which association feeds which stacks."""
        fed = self._fed.setdefault(stored.association, {})
        for stack in stacks:
            fed[stack.key] = stack
            stack.feeding.add(stored.association)

    def _arrive(self, stack: _Open, event: Event, now: float) -> None:
        """An image of the stack came at this time."""
        effect, state = TABLE[stack.state, event]
        gap = now - stack.last_at
        if effect is Effect.REVISE:
            stack.opened_at = now
        elif gap <= self._times.quiet_final_s:
            stack.longest_gap_s = max(stack.longest_gap_s, gap)
        if event is Event.NEW and stack.state is not State.OPEN and gap < self._times.max_open_s:
            learnt = min(LATE_FACTOR * gap, LATE_LIMIT_S)
            self._learnt_s[stack.scanner] = max(learnt, self._learnt_s.get(stack.scanner, 0.0))
        stack.state, stack.last_at = state, now
        stack.tried.clear()
        self._schedule(stack)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def _act_if_due(self, stack: _Open, now: float) -> list[Action]:
        """Try the evidence that is due, and set the next time to look."""
        actions: list[Action] = []
        while stack.key in self._stacks:
            due, event = self._next(stack)
            if due > now:
                break
            if event is None:
                self._forget(stack)
                break
            stack.tried.add(event)
            actions += self._happen(stack, event)
        if stack.key in self._stacks:
            self._schedule(stack)
            self._pack(stack.group)
        return actions

    def _happen(self, stack: _Open, event: Event) -> list[Action]:
        """Look the event up in the table and do what it says."""
        effect, state = TABLE[stack.state, event]
        if effect not in (Effect.TELL, Effect.CONFIRM):
            return []
        built = self._build(stack)
        if event in _NEEDS and not _NEEDS[event](built):
            return []
        stack.state = state
        final = effect is Effect.CONFIRM
        if final and self._learnt_s.get(stack.scanner):
            self._learnt_s[stack.scanner] *= CALM
        return self._tell(stack, built, final, Complete(event.value))

    def _tell(self, stack: _Open, built: Stack, final: bool, why: Complete) -> list[Action]:
        """Say it, unless the very same was said before; other images than in a final verdict are the next revision."""
        content = hashlib.sha256("".join(sorted(stored.sha256 for stored in built.instances)).encode()).digest()
        if content == stack.told and (stack.told_final or not final):
            return []
        if stack.told_final:
            stack.revision += 1
        stack.told, stack.told_final = content, final
        evidence = built.evidence(why)
        if stack.refusal is not None:
            return [Refuse(built, stack.refusal, final, stack.revision, evidence)]
        return [Judge(built, final, stack.revision, evidence)]

    def _next(self, stack: _Open) -> tuple[float, Event | None]:
        """When which evidence becomes sufficient, if nothing comes before; None: when to forget the stack."""
        if stack.state is State.FINAL:
            return stack.last_at + FORGET_S, None
        times = self._times
        quiet = self.quiet_s(stack.scanner, stack.longest_gap_s)
        due: dict[Event, float] = {}
        if stack.state is State.OPEN:
            # The strongest evidence first: it is told where several become due together.
            if self._is_counted(stack):
                due[Event.COUNTED] = stack.last_at + times.counted_s
            if stack.clean and not stack.feeding:
                pause = max(times.released_s, GAP_FACTOR * stack.longest_gap_s)
                due[Event.RELEASED] = max(stack.last_at + pause, stack.ended_at)
            due[Event.QUIET] = stack.last_at + quiet
        due[Event.QUIET_FINAL] = stack.last_at + max(times.quiet_final_s, quiet)
        due[Event.TIMEOUT] = stack.opened_at + times.max_open_s
        event = min((e for e in due if e not in stack.tried), key=lambda e: due[e], default=None)
        return (stack.last_at + FORGET_S, None) if event is None else (due[event], event)

    def quiet_s(self, scanner: str, longest_gap_s: float = 0.0) -> float:
        """Silence that makes a stack provisional: configured, or longer where the sender pauses or came late before."""
        configured = self._settings.scanner(scanner)
        base = configured.quiet_provisional_s if configured else None
        base = self._times.quiet_provisional_s if base is None else base
        longest = max(base, GAP_FACTOR * longest_gap_s, self._learnt_s.get(scanner, 0.0))
        return min(longest, max(base, self._times.quiet_final_s))

    def _is_counted(self, stack: _Open) -> bool:
        """Whether as many images have come as announced; the geometry is looked at when the time comes."""
        header = stack.header
        if header.sop_class_uid in MULTI_FRAME:
            return not stack.frames_announced
        if stack.count is not None:
            return len(stack.count.uids) >= stack.count.expected
        return header.expected_slices is not None and len(stack.held) >= header.expected_slices

    def _schedule(self, stack: _Open) -> None:
        """See that the heap looks at the stack no later than its next deadline; looking too early does no harm."""
        due, _ = self._next(stack)
        if stack.scheduled is None or due < stack.scheduled:
            stack.scheduled = due
            heapq.heappush(self._heap, (due, next(self._numbers), stack.key))

    # --- building -----------------------------------------------------------------------------------------------------

    def _build(self, stack: _Open) -> Stack:
        """The stack as it stands: one volume, ordered by position."""
        held = list(stack.held.values())
        chosen, volumes = first_volume([h.facts for h in held])
        held = [held[i] for i in chosen]
        geometry = stack.refusal or measure([h.facts for h in held], _nominal_mm(stack.header))
        if isinstance(geometry, Geometry):
            held = [held[i] for i in geometry.order]
            geometry = dataclasses.replace(geometry, order=tuple(range(len(held))))
        instances: dict[str, int] = {}
        stored: list[StoredInstance] = []
        planes = []
        for h in held:
            if h.stored.sha256 not in instances:
                instances[h.stored.sha256] = len(stored)
                stored.append(h.stored)
            planes.append(Plane(instances[h.stored.sha256], h.frame, h.facts))
        expected, source = self._expected(stack, len(held), volumes)
        return Stack(
            key=stack.key,
            scanner=stack.scanner,
            series_uid=stack.series_uid,
            study_uid=stack.study_uid,
            instances=tuple(stored),
            planes=tuple(planes),
            representative=stack.header,
            geometry=geometry,
            volumes=volumes,
            orientations=len({s.features[:6] for s in self._groups[stack.group]}),
            coils=len({s.header.frames[0].coil for s in self._groups[stack.group]}),
            expected=expected,
            expected_from=source,
            better_twin=self._has_better_twin(stack),
        )

    def _has_better_twin(self, stack: _Open) -> bool:
        """Whether the same acquisition is held in a preferred form, with as many images."""
        if stack.twins is None:
            return False
        own = _preference(stack.header.frames[0])
        return any(
            _preference(other.header.frames[0]) > own
            and other.planes >= stack.planes
            and _agree(other.features, stack.features)
            for other in self._twins[stack.twins]
        )

    def _expected(self, stack: _Open, planes: int, volumes: int) -> tuple[int | None, str | None]:
        """How many planes this volume should have, and who says so."""
        header = stack.header
        if header.sop_class_uid in MULTI_FRAME:
            return planes + sum(stack.frames_announced.values()), "NumberOfFrames"
        if header.expected_slices is not None:
            return header.expected_slices, "NumberOfSlicesMR"
        if stack.count is None or volumes > 1:
            return None, None
        return planes + max(stack.count.expected - len(stack.count.uids), 0), "ImagesInAcquisition"

    # --- what is judged, out of the way ---------------------------------------------------------------------------------

    def _pack(self, group: Group) -> None:
        """Put the images of a series away once all its stacks are final; whatever comes next gets them out again."""
        stacks = self._groups[group]
        if any(stack.state is not State.FINAL or stack.packed is not None for stack in stacks):
            return
        for stack in stacks:
            counted = stack.count.uids if stack.count is not None else ()
            stack.packed = pack(((uid, n, held.stored, held.facts) for (uid, n), held in stack.held.items()), counted)
            for sop_instance_uid, _ in stack.held:
                self._of_instance.pop((group, sop_instance_uid), None)
        for stack in stacks:
            stack.held = {}
            if stack.count is not None:
                stack.count.uids = set()

    def _unpack(self, group: Group, now: float) -> None:
        """Get the images of a series back, to compare them with what comes."""
        for stack in self._groups.get(group, ()):
            if stack.packed is None:
                continue
            planes, counted = unpack(stack.packed)
            stack.packed = None
            if stack.count is not None:
                stack.count.uids.update(counted)
            for uid, number, stored, facts in planes:
                stack.held[uid, number] = _Held(stored, number, facts)
                _, stacks = self._of_instance.setdefault((group, uid), (stored.sha256, []))
                if not stacks or stacks[-1] is not stack:
                    stacks.append(stack)
            stack.scheduled = now + PACK_AGAIN_S
            heapq.heappush(self._heap, (stack.scheduled, next(self._numbers), stack.key))

    def _forget(self, stack: _Open) -> None:
        """Drop all traces of a stack."""
        del self._stacks[stack.key]
        kind = (stack.group, _kind(stack.header, stack.header.frames[0]))
        classes = self._classes.get(kind, [])
        if stack in classes:
            classes.remove(stack)
        if stack.twins is not None:
            self._twins[stack.twins].remove(stack)
            if not self._twins[stack.twins]:
                del self._twins[stack.twins]
        for name in stack.names:
            self._exact.pop(name, None)
        if stack.count is not None:
            stack.count.stacks.pop(stack.key, None)
        group = self._groups[stack.group]
        group.remove(stack)
        for sop_instance_uid, _ in stack.held:
            self._of_instance.pop((stack.group, sop_instance_uid), None)
        if not group:
            del self._groups[stack.group]
            for name in [name for name in self._counts if name[0] == stack.group]:
                del self._counts[name]
        for association in stack.feeding:
            self._fed.get(association, {}).pop(stack.key, None)


def _is_regular(stack: Stack) -> bool:
    return isinstance(stack.geometry, Geometry)


_NEEDS: dict[Event, Callable[[Stack], bool]] = {
    Event.COUNTED: lambda stack: stack.is_whole,
    Event.RELEASED: _is_regular,
}
"""What a stack must be for this evidence to count; the others count as they are."""


def _nominal_mm(header: Header) -> float | None:
    """Distance between slices that the header announces; for 3D without it, the slice thickness."""
    spacing = header.attributes.get("SpacingBetweenSlices")
    if isinstance(spacing, float) and spacing > 0:
        return spacing
    if header.acquisition_type == "3D" and header.frames:
        return header.frames[0].thickness_mm
    return None


def _not_an_image(header: Header) -> Reason | None:
    """Why these instances can make no volume, whatever the rules say."""
    if header.sop_class_uid not in SUPPORTED:
        return Reason("unsupported_sop", REASONS["unsupported_sop"])
    if header.number_of_frames > MAX_FRAMES:
        return Reason("too_large", f"The instance has {header.number_of_frames} frames; at most {MAX_FRAMES} are read.")
    return None


def stacks_of(instances: Iterable[tuple[StoredInstance, Header | Refusal]]) -> list[Stack]:
    """The stacks in a set of instances of which nothing more will come, in the order of arrival."""
    assembly = Assembly(Settings())
    for stored, header in instances:
        assembly.on_instance(stored, header, 0.0)
    return assembly.all_stacks()
