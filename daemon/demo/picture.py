"""One picture for each verdict: the worst slice of each plane, plain and with what the student is unsure of."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

from daemon import NOTICE
from daemon.pictures import read_manifest, read_picture

LAYERS = ("total", "outline")
"""Laid over the grey image: all artefacts' uncertainty (magenta), the border of predicted grey matter (cyan)."""

BACKGROUND, INK = "#10141a", "#e8edf2"


def write_picture(pictures: Path, result: dict[str, Any], title: str, out: Path) -> bool:
    """Compose what the daemon drew into one PNG.

    Args:
        pictures: the daemon's folder of pictures.
        result: its result object.
        title: what was scanned.
        out: the file to write.

    Returns:
        False where the daemon has drawn nothing for this result (yet).
    """
    folder = str(result.get("pictures", "-"))
    manifest = read_manifest(pictures, folder)
    if manifest is None:
        return False
    planes = [plane["plane"] for plane in manifest["planes"]]
    images = {
        name: _decode(read_picture(pictures, folder, f"{name}.png"))
        for plane in planes
        for name in (plane, *(f"{plane}-{layer}" for layer in LAYERS))
    }
    _compose(planes, images, _caption(result, title), out)
    return True


def _decode(data: bytes | None) -> Any:
    from matplotlib import image

    return None if data is None else image.imread(io.BytesIO(data), format="png")


def _caption(result: dict[str, Any], title: str) -> str:
    scores = result["scores"]
    parts = [f"{title}: {result['verdict']}"]
    if result["dominant_artefact"]:
        parts.append(f"looks most like {result['dominant_artefact']}")
    if "predicted_dice" in scores:
        parts.append(f"predicted Dice {scores['predicted_dice']:.2f}")
    return ", ".join(parts)


def _compose(planes: list[str], images: dict[str, Any], caption: str, out: Path) -> None:
    """Two rows: what was acquired; the same with the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(planes), 8.0), facecolor=BACKGROUND)
    axes = figure.subplots(2, len(planes), squeeze=False)
    for column, plane in enumerate(planes):
        for row in (0, 1):
            panel = axes[row][column]
            panel.set_axis_off()
            layers = (plane, *(f"{plane}-{layer}" for layer in LAYERS)) if row else (plane,)
            for name in layers:
                if images[name] is not None:
                    panel.imshow(images[name], cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        axes[0][column].set_title(plane, color=INK, fontsize=10)
    figure.suptitle(caption, color=INK, fontsize=13)
    legend = "Below: magenta, where artefacts make the result uncertain; cyan, the border of predicted grey matter."
    figure.text(0.5, 0.065, legend, color=INK, fontsize=8, ha="center")
    figure.text(0.5, 0.012, textwrap.fill(NOTICE, 130), color=INK, fontsize=6.5, ha="center")
    figure.subplots_adjust(0.01, 0.1, 0.99, 0.91, 0.02, 0.02)
    figure.savefig(out, dpi=110, facecolor=BACKGROUND)
