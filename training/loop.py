"""One training loop for every stage: step, validate, schedule, checkpoint, resume."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from training.loss import Parts
from training.network import UNet, save_network

log = logging.getLogger("rescan.training")

CHECKPOINT_EVERY_S = 120.0
GRADIENT_CLIP = 1.0


class Diverged(Exception):
    """The loss is not a number. Restart from the last checkpoint with a lower rate."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(
            f"{stage}: the loss is not a number at step {step}; lower --rate and run the same command again"
        )


@dataclass(frozen=True)
class Schedule:
    """Learning rate and epsilon fall together, halved at the start of each of `segments` equal parts but the first.

    Attributes:
        steps: optimiser steps of the stage.
        rate: Adam's learning rate at the start.
        eps: added to the variance at the start.
        segments: how many equal parts.
    """

    steps: int
    rate: float
    eps: float
    segments: int

    def at(self, step: int) -> tuple[float, float]:
        """Learning rate and epsilon of one step; the first 50 steps warm the rate up."""
        factor = 0.5 ** min(self.segments - 1, step * self.segments // max(self.steps, 1))
        return self.rate * factor * min(1.0, (step + 1) / 50.0), self.eps * factor


@dataclass
class Stage:
    """What differs between the task, a teacher and the student.

    Attributes:
        name: `task`, `teacher_noise`, ..., `student`.
        network: what is trained.
        loss: (step, eps, network) -> Parts, drawing its own sample; deterministic in the step number.
        validate: network -> flat numbers; `converged` (1.0 or 0.0) among them.
        schedule: of the stage.
        picture: (network, file) -> None, drawn at every validation; None draws nothing.
    """

    name: str
    network: UNet
    loss: Callable[[int, float, torch.nn.Module], Parts]
    validate: Callable[[UNet], dict[str, float]]
    schedule: Schedule
    picture: Callable[[UNet, Path], None] | None = None


def train(stage: Stage, out: Path, device: torch.device, validate_every: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Train one stage to its end, or continue it; a finished stage is only read.

    Args:
        stage: what to train.
        device: where.
        out: folder; leaves `<stage>.pt`, and `<stage>.curve.jsonl` with one line per validation.
        validate_every: steps between validations.
        facts: goes into the checkpoint (profile, data, commit).

    Returns:
        The facts of the finished checkpoint, with the last validation.

    Raises:
        Diverged: the loss is not a number.
        OSError: a checkpoint cannot be written; the previous one stays whole.
    """
    done, state_file = out / f"{stage.name}.pt", out / f"{stage.name}.state"
    if done.exists():
        checkpoint = torch.load(done, map_location="cpu", weights_only=True)
        stage.network.load_state_dict(checkpoint["weights"])
        log.info("%s: finished earlier", stage.name)
        return dict(checkpoint)
    # Channels last: a quarter less time per step on a CPU (docs/benchmarks.md), the same on a GPU.
    network = stage.network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    # A short memory of gradient sizes: a new variance head starts with large ones that must not slow it for long.
    optimizer = torch.optim.Adam(network.parameters(), lr=stage.schedule.rate, betas=(0.9, 0.99))
    first = _resume(state_file, network, optimizer)
    model = DistributedDataParallel(network) if torch.distributed.is_initialized() else network
    # Of several processes the first one watches, validates and writes; the others only step.
    meter = Meter(stage, out, first) if rank() == 0 else None
    saved = time.monotonic()
    for step in range(first, stage.schedule.steps):
        parts = _step(stage, step, model, optimizer)
        if meter is None:
            continue
        meter.add(parts)
        if (step + 1) % validate_every == 0 or step + 1 == stage.schedule.steps:
            network.eval()
            meter.report(step, stage.validate(network))
            _draw(stage, network, out / "pictures" / f"{stage.name}_{step + 1:06d}.png")
            network.train()
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            _save_state(state_file, network, optimizer, step + 1)
            saved = time.monotonic()
    if meter is not None:
        _finish(stage, network, meter, done, facts)
        state_file.unlink(missing_ok=True)
    wait_for_all()
    last = torch.load(done, map_location="cpu", weights_only=True)
    return {k: v for k, v in last.items() if k not in ("config", "weights")}


def rank() -> int:
    """Number of this process among those that train together; 0 alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _finish(stage: Stage, network: UNet, meter: Meter, done: Path, facts: dict[str, Any]) -> None:
    """Write the stage's checkpoint, and say so when it did not meet its own criterion."""
    steps = stage.schedule.steps
    last = {**facts, "stage": stage.name, "steps": steps, "validation": meter.last, "hours": meter.hours()}
    save_network(network.cpu(), done, **last)
    if not meter.last.get("converged", 1.0):
        log.warning("%s: NOT CONVERGED by its own criterion: %s", stage.name, meter.last)


def _step(stage: Stage, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Parts:
    rate, eps = stage.schedule.at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parts = stage.loss(step, eps, model)
    if not math.isfinite(float(parts.total.detach())):
        raise Diverged(stage.name, step)
    optimizer.zero_grad(set_to_none=True)
    parts.total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    optimizer.step()
    return parts


def _draw(stage: Stage, network: UNet, file: Path) -> None:
    """The stage's picture, where matplotlib is installed (a machine without a registry may lack it)."""
    if stage.picture is None or importlib.util.find_spec("matplotlib") is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    stage.picture(network, file)


def _save_state(path: Path, network: UNet, optimizer: torch.optim.Optimizer, step: int) -> None:
    temporary = path.with_suffix(".state.part")
    torch.save({"weights": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(path)


def _resume(path: Path, network: UNet, optimizer: torch.optim.Optimizer) -> int:
    """Continue from a state file; one with half-precision weights and no optimizer restarts Adam's moments only."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({k: v.float() for k, v in state["weights"].items()})
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    log.info("resuming at step %d", state["step"])
    return int(state["step"])


class Meter:
    """Progress bar, curves and the numbers between two validations."""

    def __init__(self, stage: Stage, out: Path, first: int) -> None:
        from tqdm import tqdm

        self.stage, self.out, self.last = stage, out, dict[str, float]()
        self.bar = tqdm(total=stage.schedule.steps, initial=first, desc=stage.name, unit="step", mininterval=5.0)
        self.sums: dict[str, float] = {}
        self.count, self.begun, self.writer = 0, time.monotonic(), _tensorboard(out / "tensorboard" / stage.name)

    def add(self, parts: Parts) -> None:
        """Take one step's numbers."""
        values: dict[str, Tensor] = {
            k: getattr(parts, k) for k in ("total", "ce", "likelihood", "consistency", "weight_p99")
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.count += 1
        self.bar.update()
        if self.count % 20 == 0:
            self.bar.set_postfix({k: f"{v / self.count:.3f}" for k, v in self.sums.items() if k != "likelihood"})

    def report(self, step: int, validation: dict[str, float]) -> None:
        """Write a point of every curve."""
        means = {k: v / max(self.count, 1) for k, v in self.sums.items()}
        self.sums, self.count, self.last = {}, 0, validation
        line = {"step": step + 1, **means, **validation}
        with (self.out / f"{self.stage.name}.curve.jsonl").open("a") as file:
            file.write(json.dumps({k: round(v, 5) for k, v in line.items()}) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                self.writer.add_scalar(name, value, step + 1)
        log.info("%s %s", self.stage.name, " ".join(f"{k}={v:.4g}" for k, v in line.items()))

    def hours(self) -> float:
        """Time spent in this run of the stage."""
        self.bar.close()
        return round((time.monotonic() - self.begun) / 3600.0, 3)


def _tensorboard(folder: Path) -> Any:
    """TensorBoard's writer, or None where the package is not installed (a machine without a registry)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
