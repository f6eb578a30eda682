"""A stack: the images that make one volume, and what is to be done with it."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.geometry import Geometry
from daemon.header import Frame, Header
from daemon.spool import StoredInstance
from daemon.words import Reason


@dataclass(frozen=True)
class Evidence:
    """What is known about completeness.

    Attributes:
        completeness: why the stack was judged now.
        instances: images held; an Enhanced instance counts as many as its frames.
        expected: images that the header announces, None where it does not tell.
        rule: the attribute that announces them, None likewise.
    """

    completeness: str
    instances: int
    expected: int | None
    rule: str | None


@dataclass(frozen=True, slots=True)
class Plane:
    """One image plane of a stack: which instance holds it, as which frame (from 0), and its facts."""

    instance: int
    frame: int
    facts: Frame


@dataclass(frozen=True)
class Stack:
    """The images that make one volume.

    Attributes:
        key: stable name of the stack.
        scanner: configured slug, else "unknown".
        series_uid, study_uid: of the first instance.
        instances: each once, in the order of position where it is known.
        planes: in the order of position where it is known; `Plane.instance` counts in `instances`.
        representative: header of one instance; it keeps the first of its frames alone.
        geometry: the regular grid of the planes, or why there is none.
        volumes: how many volumes the stack holds; only the first whole one is here.
        orientations: how many orientations its series has.
        coils: how many receive coils its series names.
        expected: planes that the header announces for this volume, None where it does not tell.
        expected_from: the attribute that announces them.
        better_twin: a stack of the same acquisition is preferred (distortion-corrected, normalised).
    """

    key: str
    scanner: str
    series_uid: str
    study_uid: str
    instances: tuple[StoredInstance, ...]
    planes: tuple[Plane, ...]
    representative: Header
    geometry: Geometry | Reason
    volumes: int = 1
    orientations: int = 1
    coils: int = 1
    expected: int | None = None
    expected_from: str | None = None
    better_twin: bool = False

    def evidence(self, completeness: str) -> Evidence:
        """What a result says about completeness."""
        return Evidence(str(completeness), len(self.planes), self.expected, self.expected_from)

    @property
    def is_whole(self) -> bool:
        """Whether the geometry is closed and nothing that was announced is missing."""
        return isinstance(self.geometry, Geometry) and (self.expected is None or len(self.planes) >= self.expected)


@dataclass(frozen=True)
class Judge:
    """Judge this stack."""

    stack: Stack
    final: bool
    revision: int
    evidence: Evidence


@dataclass(frozen=True)
class Refuse:
    """Refuse these instances: they make no stack at all."""

    stack: Stack
    reason: Reason
    final: bool
    revision: int
    evidence: Evidence


Action = Judge | Refuse
