"""Which scans the evaluation is made of, and the making of one head's share of them.

Everything follows from `severities.json`, the split of the subjects and the seed in that file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from daemon.prepare import prepare
from daemon.words import ARTEFACTS, Refusal, Volume
from training import kspace
from training.anatomy import Source, make_head
from training.bank import corrupted_volume
from training.evaluation import independent
from training.evaluation.scans import CLEAN, Facts, exists, store

SEVERITIES = Path(__file__).parent.parent / "severities.json"
STREAMS = {"simulated": 11, "calibration": 12, "clean": 13, "artefact": 14, "independent": 15, "refusal": 16}
"""First word of each seed: no two sets share a draw."""


def read_severities(path: Path = SEVERITIES) -> dict[str, Any]:
    """The severity file.

    Raises:
        ValueError: unreadable or not JSON.
    """
    try:
        out: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: cannot be read ({error}); give the severity file of the repository") from error
    return out


@dataclass(frozen=True)
class Anatomy:
    """A clean scan with its reference.

    Attributes:
        name: of the head; `anatomy` of the label map or person behind it.
        clean: the scan.
        grey, white: masks in any geometry of the same patient space; None where there is no reference.
    """

    name: str
    anatomy: str
    clean: Volume
    grey: Volume | None
    white: Volume | None


@dataclass(frozen=True)
class Step:
    """One scan to make of a head."""

    artefact: str
    kind: str
    level: int
    strength: float
    simulator: str
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """All scans of one head in one set.

    Attributes:
        group: the set.
        head: name of the head.
        anatomy: makes or reads it; called only where a scan is missing.
        steps: the scans.
    """

    group: str
    head: str
    anatomy: Callable[[], Anatomy]
    steps: tuple[Step, ...]


CLEAN_STEP = Step(CLEAN, CLEAN, 0, 0.0, "none", ())


def step_name(head: str, step: Step) -> str:
    """File name of a scan."""
    if step.artefact == CLEAN:
        return f"{head}-clean"
    return f"{head}-{step.artefact}-{step.kind}-{step.level}-{step.simulator}"


def make(root: Path, job: Job) -> int:
    """Make the scans of one head that are missing.

    Returns:
        How many were made.
    """
    missing = [s for s in job.steps if not exists(root, job.group, step_name(job.head, s))]
    if not missing:
        return 0
    source = job.anatomy()
    for step in missing:
        volume, record = corrupt(source.clean, step)
        facts = Facts(
            group=job.group,
            name=step_name(job.head, step),
            anatomy=source.anatomy,
            head=job.head,
            artefact=step.artefact,
            kind=step.kind,
            level=step.level,
            strength=step.strength,
            simulator=step.simulator,
            record=record,
        )
        store(root, facts, volume, source.grey, source.white)
    return len(missing)


def corrupt(clean: Volume, step: Step) -> tuple[Volume, dict[str, Any]]:
    """The volume of one step, and what replays it."""
    if step.artefact == CLEAN:
        return clean, {}
    if step.simulator == "independent":
        seed = int(np.random.SeedSequence(step.seed).generate_state(1)[0])
        return independent.corrupt(clean, step.kind, step.strength, seed), {"seed": seed}
    rng = np.random.default_rng(step.seed)
    shape = (clean.voxels.shape[0], clean.voxels.shape[1], clean.voxels.shape[2])
    if step.kind == "drawn":
        corruption = kspace.draw(rng, kspace.PRODUCT, shape, (step.artefact,))
    else:
        corruption = fixed_corruption(step.kind, step.strength, rng, shape)
    return corrupted_volume(clean, corruption), corruption.record()


def fixed_corruption(kind: str, strength: float, rng: Generator, shape: tuple[int, int, int]) -> kspace.Corruption:
    """One artefact of stated strength; what else there is to draw (place, axis, trajectory) comes from `rng`.

    Raises:
        ValueError: an unknown kind.
    """
    s = strength
    exact = kspace.Ranges((s, s), (s, s), False, (s, s), (s, s), 0.0, (s, s))
    if kind == "noise":
        return kspace.Corruption(noise=kspace.draw_noise(rng, exact))
    if kind == "spike":
        return kspace.Corruption(spike=kspace.draw_spike(rng, exact, shape))
    if kind == "blur":
        return kspace.Corruption(blur=kspace.draw_blur(rng, exact))
    if kind == "fold":
        return kspace.Corruption(fold=kspace.FoldOver(int(rng.choice(3, p=[0.4, 0.5, 0.1])), s))
    if kind == "lines":
        return kspace.Corruption(mask=kspace.LineMask(int(rng.integers(3)), 0, 0, s, int(rng.integers(2**31))))
    if kind == "regular":
        return kspace.Corruption(mask=kspace.LineMask(int(rng.integers(3)), int(s), int(rng.integers(8)), 0.0, 0))
    if kind == "motion":
        return kspace.Corruption(motion=kspace.draw_motion(rng, exact))
    raise ValueError(f"kind: expected noise, spike, blur, fold, lines, regular or motion, got {kind!r}")


def draw_anatomy(subject: Source, seed: tuple[int, ...], name: str) -> Anatomy:
    """The head of one seed: T1 contrast, never one that preparation refuses (the next draw is taken then)."""
    for attempt in range(20):
        head = make_head(subject, np.random.default_rng((*seed, attempt)), 0.0)
        try:
            prepare(head.clean)
        except Refusal:
            continue
        return Anatomy(name, subject.name, head.clean, head.grey, head.white)
    raise ValueError(f"{name}: preparation refused twenty drawn heads of {subject.name} in a row")


def drawn_heads(
    subjects: list[Source], stream: str, count: int, seed: int
) -> Iterator[tuple[int, int, str, Callable[[], Anatomy]]]:
    """`count` heads of each subject: subject number, head number, name and maker; first head of each subject first."""
    for h in range(count):
        for i, subject in enumerate(subjects):
            name = f"{subject.name}-{stream}{h:02d}"
            words = (seed, STREAMS[stream], i, h)
            yield i, h, name, partial(draw_anatomy, subject, words, name)


def level_steps(severities: dict[str, Any], seed: tuple[int, ...], head: int) -> tuple[Step, ...]:
    """All five artefacts at every level, own simulator."""
    steps = []
    for a, artefact in enumerate(ARTEFACTS):
        for level in range(1, 5):
            kind = artefact
            if artefact == "wrap":
                kinds = severities["wrap_kinds"]
                kind = kinds[(3 * head + level) % len(kinds)]
            strength = float(severities["levels"][kind][level - 1])
            steps.append(Step(artefact, kind, level, strength, "own", (*seed, a, level)))
    return tuple(steps)


def independent_steps(severities: dict[str, Any], seed: tuple[int, ...], levels: tuple[int, ...]) -> tuple[Step, ...]:
    """All five artefacts of the independent simulator at some levels."""
    return tuple(
        Step(artefact, kind, level, float(severities["independent"][kind][level - 1]), "independent", (*seed, a, level))
        for a, (artefact, kind) in enumerate(independent.KINDS.items())
        for level in levels
    )


def simulated_jobs(subjects: list[Source], severities: dict[str, Any], heads: int) -> list[Job]:
    """The paper's simulated experiment on the test subjects."""
    seed, jobs = int(severities["seed"]), []
    for i, h, name, maker in drawn_heads(subjects, "simulated", heads, seed):
        words = (seed, STREAMS["artefact"], i, h)
        jobs.append(Job("simulated", name, maker, (CLEAN_STEP, *level_steps(severities, words, h))))
    return jobs


def independent_jobs(subjects: list[Source], severities: dict[str, Any], heads: int) -> list[Job]:
    """The same heads with artefacts of the other simulator: only the simulator differs."""
    seed, jobs = int(severities["seed"]), []
    for i, h, name, maker in drawn_heads(subjects, "simulated", heads, seed):
        steps = independent_steps(severities, (seed, STREAMS["independent"], i, h), ((1, 3), (2, 3))[(i + h) % 2])
        jobs.append(Job("independent", name, maker, (CLEAN_STEP, *steps)))
    return jobs


def calibration_jobs(subjects: list[Source], severities: dict[str, Any], heads: int) -> list[Job]:
    """Calibration heads, each clean and with each artefact drawn as in training."""
    seed, jobs = int(severities["seed"]), []
    for i, h, name, maker in drawn_heads(subjects, "calibration", heads, seed):
        steps = [
            Step(artefact, "drawn", 1, 0.0, "own", (seed, STREAMS["calibration"], 99, i, h, a))
            for a, artefact in enumerate(ARTEFACTS)
        ]
        jobs.append(Job("calibration", name, maker, (CLEAN_STEP, *steps)))
    return jobs


def clean_jobs(subjects: list[Source], severities: dict[str, Any], heads: int) -> list[Job]:
    """More clean heads of the test subjects, for the false alarms."""
    seed = int(severities["seed"])
    return [
        Job("clean", name, maker, (CLEAN_STEP,)) for _, _, name, maker in drawn_heads(subjects, "clean", heads, seed)
    ]


def ladder_jobs(subjects: list[Source], severities: dict[str, Any]) -> list[Job]:
    """Ten severities of one head per artefact: the same draw, only its strength rises."""
    seed = int(severities["seed"])
    _, _, name, maker = next(drawn_heads(subjects, "simulated", 1, seed))
    steps = [
        Step(
            "wrap" if kind in ("fold", "lines") else kind,
            kind,
            level,
            float(strength),
            "own",
            (seed, STREAMS["artefact"], 77, k),
        )
        for k, (kind, strengths) in enumerate(severities["ladder"].items())
        for level, strength in enumerate(strengths, start=1)
    ]
    return [Job("ladder", name, maker, (CLEAN_STEP, *steps))]
