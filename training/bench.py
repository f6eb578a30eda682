"""How fast training runs, what data generation costs, and how far from the machine's ceiling it is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from training.bank import IMAGES
from training.cascade import Samples, find_profile, task_loss
from training.network import NetworkConfig, UNet, conv_gflop

STEPS = 12


def bench(bank: Path, profile_name: str, device: torch.device) -> None:
    """Print steps per second, the share of data loading and the achieved GFLOP/s beside a measured matrix product."""
    profile = find_profile(profile_name)
    samples = Samples(bank, profile, device)
    network = UNet(NetworkConfig(profile.widths, 1)).to(device)
    network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer, loss = torch.optim.Adam(network.parameters(), 1e-4), task_loss(samples)
    loading = stepping = 0.0
    for step in range(STEPS + 2):
        begun = time.perf_counter()
        rng = np.random.default_rng((1, step))
        samples.draw(rng, samples.case(rng), [IMAGES.index("clean")], profile.crops[0])
        loaded = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss(step, profile.eps, network).total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= 2:  # the first steps compile kernels and warm caches
            loading += loaded - begun
            stepping += time.perf_counter() - loaded
    # Forward plus backward is three forward passes; the step draws its own sample again, hence the subtraction.
    gflop = 3.0 * conv_gflop(profile.widths, profile.crops[0], 1) * STEPS
    compute = stepping - loading
    print(f"profile {profile_name} on {device}, crop {profile.crops[0]}, {STEPS} steps")
    print(f"steps per second       {STEPS / stepping:8.2f}")
    print(f"share of data loading  {loading / stepping:8.1%}")
    print(f"achieved               {gflop / compute:8.0f} GFLOP/s")
    print(f"ceiling (bf16 matmul)  {ceiling(device):8.0f} GFLOP/s")


def ceiling(device: torch.device, n: int = 2048) -> float:
    """GFLOP/s of a large bfloat16 matrix product: what the machine can do at best."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begun)
    return 2e-9 * n**3 / best
