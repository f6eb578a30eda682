"""Run by torchrun: a few steps of a tiny stage, alone or in several processes that share each step's samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from training.loop import Schedule, Stage, processes, rank, train
from training.loss import Parts, combine, mean_parts
from training.network import NetworkConfig, UNet

SAMPLES_PER_STEP = 2


def loss(step: int, eps: float, network: Any) -> Parts:
    """Mean over this process's share of the step's two samples."""
    share = SAMPLES_PER_STEP // processes()
    parts = []
    for number in range(rank() * share, (rank() + 1) * share):
        g = torch.Generator().manual_seed(SAMPLES_PER_STEP * step + number)
        image = torch.rand((1, 1, 8, 8, 8), generator=g)
        labels = (image[:, 0] > 0.5).long()
        logits, log_variance = network(image)
        parts.append(combine(logits, log_variance, labels, torch.ones(labels.shape), None, eps, "faithful"))
    return mean_parts(parts)


def main(out: Path, steps: int) -> None:
    """Train, then leave `tiny.pt`."""
    torch.manual_seed(0)
    if "--together" in sys.argv:
        torch.distributed.init_process_group("gloo")
    network = UNet(NetworkConfig((4, 8), 1))
    train(
        Stage("tiny", network, loss, lambda _: {"converged": 1.0}, Schedule(steps, 1e-3, 0.05, 1)),
        out,
        torch.device("cpu"),
        steps,
        {"data": "none"},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
