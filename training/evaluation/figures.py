"""Figures of the report, as in the paper's Figs. 4 to 8 and for what the paper does not have; PNG in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from daemon.words import ARTEFACTS, Maps
from training.evaluation.analysis import MEASURES, Row, with_dice
from training.evaluation.scans import CLEAN, Stored
from training.evaluation.statistics import risk_coverage

COLOURS = {
    CLEAN: "#222222",
    "noise": "#0072b2",
    "spike": "#d55e00",
    "blur": "#009e73",
    "wrap": "#cc79a7",
    "motion": "#e69f00",
}
"""Okabe and Ito's palette: told apart by colour-blind readers."""


def _plot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def encode(figure: Any) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    _plot().close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def examples(seen: Sequence[tuple[Stored, Maps]]) -> str:
    """As Fig. 4: input, segmentation, task variance, own artefact variance, one column per artefact."""
    plt = _plot()
    figure, axes = plt.subplots(4, len(seen), figsize=(2.3 * len(seen), 9.6), squeeze=False)
    for column, (scan, maps) in enumerate(seen):
        artefact = scan.facts.artefact
        at = scan.prepared.image.shape[2] * 11 // 20
        own = (
            maps.artefact_variance[ARTEFACTS.index(artefact)]
            if artefact in ARTEFACTS
            else maps.artefact_variance.sum(0)
        )
        images = (scan.prepared.image, maps.gm_probability, maps.task_variance, own)
        for row, (values, top) in enumerate(zip(images, (1.6, 1.0, 1.5, 1.5), strict=True)):
            colours = "gray" if row < 2 else "inferno"
            axes[row, column].imshow(values[:, :, at].T, origin="lower", cmap=colours, vmin=0, vmax=top)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
        axes[0, column].set_title(f"{artefact}\nDice {_overlap(scan, maps):.2f}", fontsize=9)
    for row, name in enumerate(("input", "grey matter", "task variance", "artefact variance")):
        axes[row, 0].set_ylabel(name)
    return encode(figure)


def _overlap(scan: Stored, maps: Maps) -> float:
    from training.calibrate import dice_overlap

    return dice_overlap((maps.gm_probability > 0.5) & scan.prepared.native_mask, scan.truth())


def scatter(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """As Fig. 7: Dice against each measure."""
    plt = _plot()
    known = with_dice(rows)
    keys = [k for k in keys if any(k in r.measures for r in known)]
    figure, axes = plt.subplots(1, len(keys), figsize=(3.4 * len(keys), 3.3), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for artefact, colour in COLOURS.items():
            own = [r for r in known if r.facts.artefact == artefact and key in r.measures]
            axis.scatter(
                [r.measures[key] for r in own], [r.dice for r in own], s=12, c=colour, label=artefact, alpha=0.8
            )
        axis.set_xlabel(MEASURES[key][0], fontsize=8)
        axis.set_ylabel("grey-matter Dice")
        if key in ("artefact_uncertainty", "artefact_uncertainty_gm", "task_uncertainty"):
            axis.set_xscale("log")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return encode(figure)


def boxes(rows: Sequence[Row]) -> str:
    """As Figs. 6 and 8, right: artefact uncertainty by artefact and severity."""
    plt = _plot()
    groups = [
        (a, s) for a in (CLEAN, *ARTEFACTS) for s in (("clean",) if a == CLEAN else ("mild", "moderate", "visible"))
    ]
    data, labels, colours = [], [], []
    for artefact, severity in groups:
        values = [
            r.measures["artefact_uncertainty_gm"]
            for r in rows
            if r.facts.artefact == artefact and r.severity in (severity, "unknown") and r.measures
        ]
        if values:
            data.append(values)
            labels.append(artefact if artefact == CLEAN else f"{artefact}\n{severity}")
            colours.append(COLOURS[artefact])
    figure, axis = plt.subplots(figsize=(11, 3.4))
    if data:
        drawn = axis.boxplot(data, patch_artist=True, showfliers=True, flierprops={"markersize": 2})
        axis.set_xticks(range(1, len(data) + 1), labels, fontsize=7)
        for patch, colour in zip(drawn["boxes"], colours, strict=True):
            patch.set_facecolor(colour)
            patch.set_alpha(0.6)
        axis.set_yscale("log")
    axis.set_ylabel("artefact uncertainty, grey matter")
    return encode(figure)


def error_bar_ladder(bars: dict[str, Any]) -> str:
    """As Fig. 5: grey-matter volume with its interval over rising noise and blur, Eq. 8 beside the product's."""
    plt = _plot()
    kinds = list(bars.get("ladder", {}))
    figure, axes = plt.subplots(1, max(len(kinds), 1), figsize=(5.2 * max(len(kinds), 1), 3.4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=False):
        steps = bars["ladder"][kind]
        x = np.arange(len(steps))
        volume = np.array([s["gm_ml"] for s in steps])
        axis.plot(x, [s["truth_ml"] for s in steps], "k--", lw=1, label="exact volume")
        if all(s["half_width_ml"] is not None for s in steps):
            half = [s["half_width_ml"] for s in steps]
            axis.errorbar(x - 0.12, volume, half, fmt="o", ms=3, capsize=2, label="95 % interval of the product")
        eq8 = [s["eq8_half_width_ml"] for s in steps]
        axis.errorbar(x + 0.12, volume, eq8, fmt="s", ms=3, capsize=2, label="1.96 sigma of Eq. 8")
        axis.set_xticks(x, ["clean", *(f"{s['strength']:g}" for s in steps[1:])], fontsize=7)
        axis.set_xlabel("noise, dB" if kind == "noise" else "blur, ratio of truncation")
        axis.set_ylabel("grey matter, ml")
        axis.legend(fontsize=7)
    return encode(figure)


def matrices(parts: dict[str, Any]) -> str:
    """The decoupling matrix and the confusion of the dominant artefact, both at visible severity."""
    plt = _plot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    ratio = np.array([row or [np.nan] * 5 for row in parts["matrix"]], dtype=float)
    panels = (
        (np.log2(np.maximum(ratio, 1e-3)), ratio, "mean variance over clean, visible artefacts", "{:.1f}"),
        (np.array(parts["confusion"], float), parts["confusion"], "dominant artefact, visible", "{:d}"),
        (np.array(parts["confusion_all"], float), parts["confusion_all"], "dominant artefact, all severities", "{:d}"),
    )
    for axis, (colour, text, title, form) in zip(axes, panels, strict=True):
        axis.imshow(colour, cmap="Blues")
        middle = np.nanmin(colour) + 0.6 * (np.nanmax(colour) - np.nanmin(colour)) if np.isfinite(colour).any() else 0.0
        for i in range(5):
            for j in range(5):
                value = text[i][j]
                if np.isfinite(value):
                    shade = "white" if colour[i, j] > middle else "black"
                    axis.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color=shade)
        axis.set_xticks(range(5), ARTEFACTS, fontsize=8)
        axis.set_yticks(range(5), ARTEFACTS, fontsize=8)
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("artefact in the image")
    return encode(figure)


def coverage_curves(rows: Sequence[Row]) -> str:
    """Risk-coverage curves of all measures."""
    plt = _plot()
    figure, axis = plt.subplots(figsize=(5.6, 3.8))
    for key, (name, sign) in MEASURES.items():
        known = [r for r in with_dice(rows) if key in r.measures]
        if len(known) >= 3:
            coverage, risk = risk_coverage([sign * r.measures[key] for r in known], [r.dice for r in known])
            axis.plot(coverage, risk, label=name, lw=2 if key == "artefact_uncertainty_gm" else 1)
    axis.set_xlabel("share of scans kept")
    axis.set_ylabel("mean 1 - Dice of those kept")
    axis.legend(fontsize=6)
    return encode(figure)


def ladders(ladder: Sequence[Row]) -> str:
    """Score against severity, ten severities of one head per process."""
    plt = _plot()
    kinds = sorted({r.facts.kind for r in ladder if r.facts.artefact != CLEAN})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for kind in kinds:
        rungs = sorted((r for r in ladder if r.facts.kind == kind and r.measures), key=lambda r: r.facts.level)
        colour = COLOURS.get(kind, COLOURS["wrap"])
        style = "--" if kind == "lines" else "-"
        for axis, key in zip(axes, ("artefact_uncertainty_gm", "task_uncertainty"), strict=True):
            levels = [r.facts.level for r in rungs]
            axis.plot(levels, [r.measures[key] for r in rungs], style, marker="o", ms=3, c=colour, label=kind)
            axis.set_xlabel("severity")
            axis.set_ylabel(MEASURES[key][0])
    axes[0].legend(fontsize=7)
    return encode(figure)


def reliability_diagram(choice: dict[str, Any], rows: Sequence[Row]) -> str:
    """Predicted against observed Dice."""
    plt = _plot()
    figure, axis = plt.subplots(figsize=(4.2, 4.0))
    known = [r for r in with_dice(rows) if r.scores is not None and "predicted_dice" in r.scores.values]
    for artefact, colour in COLOURS.items():
        own = [r for r in known if r.facts.artefact == artefact]
        predicted = [r.scores.values["predicted_dice"] for r in own if r.scores is not None]
        axis.scatter(predicted, [r.dice for r in own], s=8, c=colour, label=artefact, alpha=0.6)
    points = choice.get("reliability", [])
    axis.plot([p[0] for p in points], [p[1] for p in points], "k-o", ms=4, label="mean of a tenth")
    axis.plot([0, 1], [0, 1], "k:", lw=1)
    axis.axhline(choice["required_dice"], c="grey", lw=1)
    axis.set_xlabel("predicted Dice")
    axis.set_ylabel("Dice")
    axis.legend(fontsize=6)
    return encode(figure)
