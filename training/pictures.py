"""Pictures that one looks at before one trusts a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daemon.prepare import prepare
from daemon.words import ARTEFACTS, Array, Refusal
from training import kspace
from training.anatomy import Head, Source, make_head
from training.bank import GREY, IMAGES, Case, corrupted_volume, to_input
from training.network import UNet

SEVERITIES: dict[str, list[kspace.Corruption]] = {
    "noise": [kspace.Corruption(noise=kspace.Noise(db, 7)) for db in (30.0, 15.0, 5.0, -5.0)],
    "spike": [kspace.Corruption(spike=kspace.Spike((14, 9, -20), m, 1.0)) for m in (0.1, 0.4, 1.0, 4.0)],
    "blur": [kspace.Corruption(blur=kspace.Blur((1.0, r, r))) for r in (1.5, 2.5, 4.0, 8.0)],
    "wrap": [kspace.Corruption(fold=kspace.FoldOver(1, f)) for f in (0.1, 0.2, 0.3, 0.45)],
    "motion": [
        kspace.Corruption(motion=kspace.Motion(1, (0.4, 0.55), ((a, 0, a), (0, a, 0)), ((0, a, 0), (a, 0, 0))))
        for a in (0.5, 2.0, 5.0, 10.0)
    ],
}
"""Four severities of each artefact, rising."""


def head_sheet(sources: Sequence[Source], out: Path, count: int = 20) -> None:
    """Twenty synthetic heads, one sagittal and one axial slice each."""
    figure, axes = _grid(4, 10)
    for number in range(count):
        head = _any_head(sources[number % len(sources)], number)
        image = prepare(head.clean).image
        row, column = divmod(number, 10)
        _show(axes[2 * row][column], image[image.shape[0] // 2 - 4].T)
        _show(axes[2 * row + 1][column], image[:, :, 52].T)
    _save(figure, out)


def artefact_sheet(source: Source, out: Path) -> None:
    """Each artefact at four severities on one head, with the clean image first."""
    head = _any_head(source, 1)
    box = prepare(head.clean).box
    figure, axes = _grid(len(ARTEFACTS), 5)
    for row, artefact in enumerate(ARTEFACTS):
        for column, corruption in enumerate([kspace.Corruption(), *SEVERITIES[artefact]]):
            image = prepare(corrupted_volume(head.clean, corruption), box).image
            _show(axes[row][column], image[:, :, 52].T)
            axes[row][column].set_title(f"{artefact} {column}" if column else "clean", fontsize=7)
    _save(figure, out)


def network_sheet(network: UNet, case: Case, names: Sequence[str], out: Path) -> None:
    """What a network makes of a clean head and of one with each artefact: sample, truth, segmentation, each variance.

    Args:
        network: in evaluation mode.
        case: of the bank.
        names: of the network's variances.
        out: PNG file.
    """
    figure, axes = _grid(1 + len(ARTEFACTS), 3 + len(names))
    for row, image in enumerate(("clean", *(f"{a}_a" for a in ARTEFACTS))):
        values, _ = to_input(case.images[IMAGES.index(image)])
        segmented, variances = _read(network, values)
        level = values.shape[2] // 2
        for axis, title, picture in zip(
            axes[row], (image, "truth", "segmented"), (values, case.labels & GREY, segmented), strict=False
        ):
            _show(axis, np.asarray(picture)[:, :, level].T)
            axis.set_title(title, fontsize=7)
        for axis, name, variance in zip(axes[row][3:], names, variances, strict=True):
            axis.imshow(variance[:, :, level].T, origin="lower", cmap="inferno", vmin=0, vmax=1.5)
            axis.set_title(name, fontsize=7)
    _save(figure, out)


@torch.no_grad()
def _read(network: UNet, values: Array) -> tuple[Array, Array]:
    """Segmentation (D, H, W) and variances (V, D, H, W) of one whole image."""
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        logits, log_variance = network(torch.from_numpy(values)[None, None].to(device))
    segmented = torch.softmax(logits[0].float(), 0)[1]
    return segmented.cpu().numpy(), torch.exp(log_variance[0]).cpu().numpy()


def _any_head(source: Source, seed: int) -> Head:
    """A head that preparation accepts; draws until one is found."""
    for attempt in range(20):
        head = make_head(source, np.random.default_rng((77, seed, attempt)), 0.05)
        try:
            prepare(head.clean)
        except Refusal:
            continue
        return head
    raise ValueError(f"{source.name}: none of 20 drawn heads could be prepared; is it a whole head?")


def _grid(rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _show(axis: Any, picture: Any) -> None:
    axis.imshow(picture, origin="lower", cmap="gray", vmin=0, vmax=max(1.5, float(np.percentile(picture, 99))))


def _save(figure: Any, out: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout(pad=0.2)
    figure.savefig(out, dpi=70, facecolor="white")
    plt.close(figure)
