"""The cascade of Shaw 2021: task -> five teachers -> student. Three steps that read as three steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from daemon.words import ARTEFACTS
from training.augment import augment, draw_augmentation
from training.bank import GREY, IMAGES, Case, list_cases, read_case
from training.loop import Schedule, Stage, processes, rank, train
from training.loss import Likelihood, Parts, combine, mean_parts
from training.network import NetworkConfig, UNet, load_network, warm_start
from training.pictures import network_sheet
from training.validate import validate_student, validate_task, validate_teacher

log = logging.getLogger("rescan.training")

TEACHER_SEGMENTS = 2
"""A teacher starts from a trained trunk and has few steps: its rate falls once."""

FINE_TUNE = 0.125
"""Rate, relative to the profile's, of the teachers and the student that start from the trunk the artefacts shared: what that
trunk ended with. With four times as much the student forgot a part of what told motion from wrap (docs/decisions/0011)."""

CLEAN_SHARE = 0.4
"""Of a teacher's images."""

TARGET_MAX = 20.0
"""Frozen networks' variances are cut here: twice the cross entropy of a voxel that is certainly wrong."""


Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """A whole cascade in numbers.

    Attributes:
        widths: of the network.
        crops: cells per axis that one sample shows, in the task, teacher and student stage; the network has no spatial
            statistics, so a crop and the whole head give the same answer away from the crop's edge.
        steps: of the task, each teacher, the student.
        joint_steps: of the five teachers on one trunk, which each of them and the student start from; 0: from the task's.
        rate, eps, segments: see `Schedule`.
        likelihood: see `training.loss`.
        train_cases, validation_cases: size of the bank.
        ranges: `product` or `paper`.
        free_contrast: share of heads with freely drawn contrast.
        flips: probability per axis.
        validate_every: steps between validations.
        autocast: bfloat16 in the trunk.
    """

    widths: tuple[int, ...]
    crops: tuple[Shape, Shape, Shape]
    steps: tuple[int, int, int]
    joint_steps: int
    rate: float
    eps: float
    segments: int
    likelihood: Likelihood
    train_cases: int
    validation_cases: int
    ranges: str
    free_contrast: float
    flips: tuple[float, float, float]
    validate_every: int
    autocast: bool


CPU = Profile(
    widths=(16, 24, 32, 64, 64),
    crops=((64, 80, 64), (48, 64, 48), (48, 48, 48)),
    steps=(1800, 150, 600),
    joint_steps=2500,
    rate=2e-3,
    eps=0.05,
    segments=4,
    likelihood="faithful",
    train_cases=160,
    validation_cases=2,
    ranges="product",
    free_contrast=0.05,
    flips=(0.5, 0.0, 0.0),
    validate_every=275,
    autocast=True,
)

PROFILES = {
    "smoke": replace(
        CPU,
        widths=(8, 12, 16),
        crops=((32, 48, 32),) * 3,
        steps=(1000, 10, 30),
        joint_steps=100,
        rate=4e-3,
        train_cases=3,
        validation_cases=1,
        free_contrast=0.0,
        validate_every=1000,
    ),
    "cpu": CPU,
    "tune": replace(
        CPU,
        steps=(0, 40, 240),
        joint_steps=4000,
        rate=1.5e-3,
        train_cases=64,
        validation_cases=4,
        validate_every=600,
    ),
    "gpu": replace(
        CPU,
        widths=(16, 32, 64, 128, 128),
        crops=((96, 112, 96),) * 3,
        steps=(12000, 4000, 16000),
        joint_steps=0,
        segments=5,
        train_cases=600,
        validation_cases=12,
        validate_every=1000,
    ),
    "paper": replace(
        CPU,
        widths=(30, 60, 120, 240, 480),
        crops=((96, 96, 96),) * 3,
        steps=(30000, 30000, 30000),
        joint_steps=0,
        rate=1e-4,
        segments=7,
        likelihood="paper",
        train_cases=600,
        validation_cases=12,
        ranges="paper",
        free_contrast=0.0,
        flips=(0.5, 0.5, 0.5),
        validate_every=1000,
        autocast=False,
    ),
}


def find_profile(name: str) -> Profile:
    """The profile of this name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in PROFILES:
        raise ValueError(f"--profile: expected one of {', '.join(PROFILES)}, got {name!r}")
    return PROFILES[name]


def run(
    bank: Path,
    out: Path,
    profile: Profile,
    device: torch.device,
    facts: dict[str, Any],
    only: Sequence[str] = (),
    first: UNet | None = None,
) -> list[str]:
    """Train the cascade; stages that are finished are read, not repeated.

    Args:
        bank: folder with `train` and `val` banks (see `training.bank`); they may still be growing.
        profile: sizes and schedule.
        device: where to train.
        facts: what each checkpoint shall say of its origin.
        out: leaves `task.pt`, `teacher_<artefact>.pt`, `student.pt` and their curves.
        only: names of stages to train here (teachers may run side by side on several devices); empty: all.
        first: a trained student to go on from; None: train the task network, and start from that.

    Returns:
        Names of the stages that did not meet their own criterion.
    """
    out.mkdir(parents=True, exist_ok=True)
    cascade = Cascade(Samples(bank, profile, device), out, facts, tuple(only), [], first)
    # 1. The task network learns grey matter, and its own uncertainty, from clean images.
    task = cascade.task()
    # 2. Each teacher learns what one artefact adds to it; the frozen task network fixes the task's part.
    start = cascade.joint(task)
    teachers = cascade.teachers(task, start)
    # 3. The student learns all of it at once, from images in which any of the artefacts may be.
    if cascade.wants("student"):
        cascade.student(task, teachers, start)
    return cascade.weak


@dataclass(frozen=True)
class Cascade:
    """The stages of one run; each returns its frozen network, trained here or read.

    Attributes:
        samples: what they learn from.
        out, facts, only: see `run`.
        weak: names of the stages that did not meet their own criterion so far.
        first: a trained student to go on from, or None.
    """

    samples: Samples
    out: Path
    facts: dict[str, Any]
    only: tuple[str, ...]
    weak: list[str]
    first: UNet | None = None

    @property
    def profile(self) -> Profile:
        """Sizes and schedule."""
        return self.samples.profile

    def wants(self, name: str) -> bool:
        """Whether this stage is among those to train here."""
        return not self.only or name in self.only

    def task(self) -> UNet:
        """Eq. 4 on clean images; of a student to go on from, its task part."""
        held_out = self.samples.validation
        network = UNet(NetworkConfig(self.profile.widths, 1))
        if self.first is not None:
            warm_start(network, task_weights(self.first))
        return self._stage(
            "task", network, task_loss(self.samples), lambda n: validate_task(n, held_out), self.profile.steps[0]
        )

    def joint(self, task: UNet) -> UNet:
        """What the teachers and the student start from: a trunk that learnt all artefacts, or the task's."""
        if not self.profile.joint_steps:
            return task
        held_out, loss = self.samples.validation, joint_loss(self.samples, task)
        network = _student_network(self.profile, self.first or task)
        return self._stage("joint", network, loss, lambda n: validate_student(n, held_out), self.profile.joint_steps)

    def teachers(self, task: UNet, start: UNet) -> list[UNet]:
        """Eq. 6, one artefact each; only those that are trained here or that the student needs."""
        held_out, trained = self.samples.validation, []
        for i, artefact in enumerate(ARTEFACTS):
            name = f"teacher_{artefact}"
            if not self.wants(name) and not self.wants("student"):
                continue
            teacher, loss = UNet(NetworkConfig(self.profile.widths, 2)), teacher_loss(self.samples, artefact, task)
            warm_start(teacher, teacher_weights(start, i))
            judge = partial(validate_teacher, cases=held_out, artefact=artefact)
            trained.append(self._stage(name, teacher, loss, judge, self.profile.steps[1]))
        return trained

    def student(self, task: UNet, teachers: Sequence[UNet], start: UNet) -> UNet:
        """The sum of Eq. 6 over the artefacts, against the frozen teachers."""
        held_out, loss = self.samples.validation, student_loss(self.samples, task, teachers)
        network = _student_network(self.profile, start)
        return self._stage("student", network, loss, lambda n: validate_student(n, held_out), self.profile.steps[2])

    def _stage(self, name: str, network: UNet, loss: Any, validate: Any, steps: int) -> UNet:
        """Train a stage, or read it where it is finished or not wanted here; frozen."""
        if self.wants(name) or not (self.out / f"{name}.pt").exists():
            profile = self.profile
            tuned = profile.joint_steps and name not in ("task", "joint")
            rate = profile.rate * (FINE_TUNE if tuned else 1.0)
            segments = TEACHER_SEGMENTS if name.startswith("teacher") else profile.segments
            schedule = Schedule(steps, rate, profile.eps, segments)
            picture = _picture(self.samples.validation[0], network.config.variances, name)
            what = Stage(name, network, loss, validate, schedule, picture)
            last = train(what, self.out, self.samples.device, profile.validate_every, self.facts)
            if not last["validation"].get("converged", 1.0):
                self.weak.append(name)
        frozen: UNet = load_network(self.out / f"{name}.pt")[0].requires_grad_(False)
        return frozen.to(self.samples.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def _picture(case: Case, variances: int, name: str) -> Any:
    """Draws a held-out head, clean and with each artefact, as the network of a stage sees it."""
    own = [name.removeprefix("teacher_")] if variances == 2 else list(ARTEFACTS)
    names = ["task", *own][:variances]
    return lambda network, file: network_sheet(network, case, names, file)


def _student_network(profile: Profile, start: UNet) -> UNet:
    """Six variances, on the trunk of a trained network."""
    network = UNet(NetworkConfig(profile.widths, 1 + len(ARTEFACTS)))
    warm_start(network, start.state_dict())
    return network


def task_weights(student: UNet) -> dict[str, Tensor]:
    """A student's weights without the variances of its artefacts."""
    weights = dict(student.state_dict())
    for part in ("log_variance.weight", "log_variance.bias"):
        weights[part] = weights[part][:1]
    return weights


def teacher_weights(start: UNet, artefact: int) -> dict[str, Tensor]:
    """Weights that a teacher starts from: of a trunk that learnt all artefacts, the task's channel and its own."""
    weights = dict(start.state_dict())
    if start.config.variances > 2:
        for part in ("log_variance.weight", "log_variance.bias"):
            weights[part] = weights[part][[0, 1 + artefact]]
    return weights


@dataclass(frozen=True)
class Sample:
    """One crop of one head, on the device.

    Attributes:
        images: (T, d, h, w): the twins asked for; negative outside the field of view.
        labels: (1, d, h, w) int64, 1 in grey matter.
    """

    images: Tensor
    labels: Tensor

    def image(self, twin: int) -> Tensor:
        """(1, 1, d, h, w) network input."""
        return self.images[twin].clamp_min(0.0)[None, None]

    def weight(self, twin: int) -> Tensor:
        """(1, d, h, w) float32: 1 inside the field of view."""
        return (self.images[twin] >= 0.0).float()[None]


class Samples:
    """Crops from a bank; what a step sees depends on its number (and process) alone, so a resumed run sees the same."""

    def __init__(self, bank: Path, profile: Profile, device: torch.device) -> None:
        self.folder, self.profile, self.device = bank / "train", profile, device
        self.validation = [read_case(p) for p in list_cases(bank / "val")[: profile.validation_cases]]
        self.cases: list[Case] = []
        self.errors: dict[Path, list[float]] = {}

    def rng(self, *key: int) -> np.random.Generator:
        """Draws of one step, whose number comes last in the key; each of several processes has its own."""
        *kind, step = key
        return np.random.default_rng((*kind, step * processes() + rank()))

    def case(self, rng: np.random.Generator) -> Case:
        """Any case of the bank; looks for new ones now and then while it grows."""
        if len(self.cases) < self.profile.train_cases and (not self.cases or rng.random() < 0.05):
            known = {c.folder for c in self.cases}
            self.cases += [read_case(p) for p in list_cases(self.folder)[: self.profile.train_cases] if p not in known]
        if not self.cases:
            raise ValueError(f"{self.folder}: holds no case yet; run rescan-train bank first")
        return self.cases[int(rng.integers(len(self.cases)))]

    def visible(self, rng: np.random.Generator, case: Case, artefact: str) -> int:
        """Of two images with this artefact alone the one further from the clean image, four times in five.

        Most drawn severities are invisible, and an artefact nobody sees teaches little.
        """
        if case.folder not in self.errors:
            clean = np.asarray(case.images[0][::2, ::2, ::2], dtype=np.float32)
            self.errors[case.folder] = [float(np.abs(i[::2, ::2, ::2] - clean).mean()) for i in case.images]
        alone = np.arange(len(ARTEFACTS)) == ARTEFACTS.index(artefact)
        pair = rng.permutation(np.flatnonzero((case.present == alone).all(axis=1)))[:2]
        further = int(self.errors[case.folder][pair[1]] > self.errors[case.folder][pair[0]])
        return int(pair[further if rng.random() < 0.8 else 1 - further])

    def draw(self, rng: np.random.Generator, case: Case, twins: Sequence[int], crop: Shape) -> Sample:
        """The same crop of several images of one case, augmented alike."""
        corner = self._corner(rng, case, crop)
        where = tuple(slice(c, c + n) for c, n in zip(corner, crop, strict=True))
        images = torch.from_numpy(np.stack([np.asarray(case.images[t][where], dtype=np.float32) for t in twins]))
        labels = torch.from_numpy((case.labels[where] & GREY).astype(np.int64))
        images, labels = augment(images, labels, draw_augmentation(rng, self.profile.flips))
        return Sample(images.to(self.device), labels[None].to(self.device))

    def _corner(self, rng: np.random.Generator, case: Case, crop: Shape) -> list[int]:
        """A crop whose middle lies near a random grey voxel."""
        shape = case.labels.shape
        for_grey = [int(rng.integers(0, max(n - c, 0) + 1)) for n, c in zip(shape, crop, strict=True)]
        for _ in range(8):
            at = [int(rng.integers(n)) for n in shape]
            if case.labels[tuple(at)] & GREY:
                return [
                    min(max(a - c // 2 + int(rng.integers(-c // 4, c // 4 + 1)), 0), n - c)
                    for a, c, n in zip(at, crop, shape, strict=True)
                ]
        return for_grey

    def forward(self, network: Any, image: Tensor) -> tuple[Tensor, Tensor]:
        """Run a network on one crop with the profile's precision; float32 out."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.profile.autocast):
            out: tuple[Tensor, Tensor] = network(image)
            return out

    @torch.no_grad()
    def clean_ce(self, network: Any, sample: Sample) -> Tensor:
        """(1, d, h, w) cross entropy of a network on the clean twin, which is twin 0."""
        logits, _ = self.forward(network, sample.image(0))
        return F.cross_entropy(logits, sample.labels, reduction="none")

    @torch.no_grad()
    def variance(self, network: UNet, image: Tensor) -> Tensor:
        """sigma^2 of a frozen network, (1, V, d, h, w)."""
        return torch.exp(self.forward(network, image)[1]).clamp_max(TARGET_MAX)


def task_loss(samples: Samples) -> Any:
    """Eq. 4 on a clean image."""

    def loss(step: int, eps: float, network: Any) -> Parts:
        rng = samples.rng(1, step)
        sample = samples.draw(rng, samples.case(rng), [IMAGES.index("clean")], samples.profile.crops[0])
        logits, log_variance = samples.forward(network, sample.image(0))
        return combine(logits, log_variance, sample.labels, sample.weight(0), None, eps, samples.profile.likelihood)

    return loss


def teacher_loss(samples: Samples, artefact: str, task: UNet) -> Any:
    """Eq. 6: some of the images are clean; the frozen task network sees the clean twin (S2)."""

    def loss(step: int, eps: float, network: Any) -> Parts:
        rng = samples.rng(2, ARTEFACTS.index(artefact), step)
        case = samples.case(rng)
        twins = [IMAGES.index("clean"), samples.visible(rng, case, artefact)]
        sample = samples.draw(rng, case, twins, samples.profile.crops[1])
        seen = int(rng.random() >= CLEAN_SHARE)
        logits, log_variance = samples.forward(network, sample.image(seen))
        target, form = samples.variance(task, sample.image(0)), samples.profile.likelihood
        clean = samples.clean_ce(network, sample) if seen and form == "faithful" else None
        return combine(logits, log_variance, sample.labels, sample.weight(seen), target, eps, form, None, 1, clean)

    return loss


def joint_loss(samples: Samples, task: UNet) -> Any:
    """Eq. 6 for five teachers on one trunk: the same crop clean and with each artefact; absent ones have no variance.

    All of them in one step: what the artefacts have in common cancels, and the step is about what tells them apart. With
    one artefact a step, noise and spike were not told apart in 4,000 steps (docs/decisions/0011). Motion comes twice: it
    is the hardest to see.
    """

    def loss(step: int, eps: float, network: Any) -> Parts:
        rng = samples.rng(4, step)
        case, form = samples.case(rng), samples.profile.likelihood
        own = [None, *range(1, 1 + len(ARTEFACTS)), 1 + ARTEFACTS.index("motion")]
        twins = [0, *(samples.visible(rng, case, ARTEFACTS[i - 1]) for i in own if i)]
        sample = samples.draw(rng, case, twins, samples.profile.crops[2])
        logits, log_variance = samples.forward(network, sample.images.clamp_min(0.0)[:, None])
        target = samples.variance(task, sample.image(0))
        targets = torch.cat([target, *[torch.zeros_like(target)] * len(ARTEFACTS)], 1)
        clean = F.cross_entropy(logits[:1].detach(), sample.labels, reduction="none")
        parts = []
        for n, variance in enumerate(own):
            channels = torch.ones(targets.shape[1], device=samples.device)
            if variance is not None:
                channels[variance] = 0.0
            image = (logits[n : n + 1], log_variance[n : n + 1], sample.labels, sample.weight(n))
            parts.append(combine(*image, targets, eps, form, channels, variance, clean))
        return mean_parts(parts)

    return loss


def student_loss(samples: Samples, task: UNet, teachers: Sequence[UNet]) -> Any:
    """The student sees any artefacts together; teacher i sees the same head with only artefact i, same draw (S3).

    One crop a step: clean, with three of the artefacts, and with several at once. A teacher whose artefact is absent from
    an image sees the clean twin.
    """

    def loss(step: int, eps: float, network: Any) -> Parts:
        rng = samples.rng(3, step)
        case, form = samples.case(rng), samples.profile.likelihood
        seen = _student_images(rng, samples, case)
        heard = [_singles(case, image) for image in seen]
        twins = sorted({0, *seen, *(t for row in heard for t in row)})
        sample = samples.draw(rng, case, twins, samples.profile.crops[2])
        at = twins.index
        stack = sample.images[[at(image) for image in seen]]
        logits, log_variance = samples.forward(network, stack.clamp_min(0.0)[:, None])
        target = samples.variance(task, sample.image(0))
        said = {
            (i, t): samples.variance(teachers[i], sample.image(at(t)))[:, 1:2]
            for i, t in sorted({(i, t) for row in heard for i, t in enumerate(row)})
        }
        parts = []
        for n, image in enumerate(seen):
            targets = torch.cat([target, *(said[i, t] for i, t in enumerate(heard[n]))], 1)
            outputs = (logits[n : n + 1], log_variance[n : n + 1])
            parts.append(combine(*outputs, sample.labels, sample.weight(at(image)), targets, eps, form))
        return mean_parts(parts)

    return loss


def _student_images(rng: np.random.Generator, samples: Samples, case: Case) -> list[int]:
    """Which images the student sees in one step: clean, three artefacts alone, one image with several."""
    alone = [samples.visible(rng, case, ARTEFACTS[i]) for i in rng.permutation(len(ARTEFACTS))[:3]]
    return [0, *alone, IMAGES.index(f"composite_{'ab'[int(rng.integers(2))]}")]


def _singles(case: Case, image: int) -> list[int]:
    """For each artefact the image that holds it alone in the same draw; the clean one where it is absent.

    An image with one artefact is that image; composites are made of the first draws.
    """
    if case.present[image].sum() <= 1:
        return [image if p else 0 for p in case.present[image]]
    return [IMAGES.index(f"{a}_a") if p else 0 for a, p in zip(ARTEFACTS, case.present[image], strict=True)]
