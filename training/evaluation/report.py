"""One self-contained page: goals beside what was reached, tables with intervals, figures inside the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from daemon import NOTICE
from daemon.words import ARTEFACTS
from training.evaluation.analysis import Goal, goals

PAPER = {"simulated": {"artefact_uncertainty": -0.850, "snr": 0.326, "cnr": 0.200}}
"""Shaw 2021, Table 1. Its p-values fit n = 84, not the 140 of the text."""

SETS = {
    "simulated": "Simulated experiment (paper's Table 1): test subjects, own simulator",
    "independent": "The same heads, artefacts of an independent simulator",
    "real": "Real heads with artefacts of both simulators",
    "real_own": "Real heads, own simulator",
    "real_independent": "Real heads, independent simulator",
}

REMARKS = {
    "simulated": "",
    "independent": "Noise, spike, blur and ghosting from TorchIO, motion composed in image space in NumPy. Ghosting counts as wrap.",
    "real": "Automatic labels (MUSE at 2 mm, FreeSurfer at 1 mm) are the reference; the Philips head came without labels, its "
    "reference is the student's own segmentation of the clean scan. The paper's Table 2, scans that really failed and were "
    "rated by people, cannot be repeated with these data.",
}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem; text-align: right } th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .missed { color: #a40000; font-weight: 600 } .met { color: #005a2b } .note { color: #555 }
"""


def number(value: Any, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(found: Mapping[str, Any] | None) -> str:
    """`rho [low, high]`."""
    if not found or "rho" not in found:
        return "-"
    return f"{found['rho']:.3f} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]"


def percent(found: Mapping[str, Any] | None) -> str:
    """`hits/n = share [low, high]` of an exact binomial interval."""
    if not found:
        return "-"
    text = f"{found['hits']}/{found['n']} = {found['value']:.3f}"
    return f"{text} [{found['low']:.3f}, {found['high']:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are escaped."""
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for the documentation."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def goal_rows(found: Sequence[Goal]) -> list[list[str]]:
    """Goal, value, met or not."""
    word = {True: "reached", False: "not reached", None: "not measured"}
    return [[g.text, number(g.value), word[g.met]] for g in found]


def experiment_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of one experiment: a row per measure."""
    head = ["measure", "rho with Dice [95 %]", "AURC [95 %]", *ARTEFACTS]
    rows = []
    for m in found.get("measures", {}).values():
        area = f"{m['aurc']:.4f} [{m['aurc_ci'][0]:.4f}, {m['aurc_ci'][1]:.4f}]"
        parts = [number(m["per_artefact"].get(a, {}).get("rho"), 2) for a in ARTEFACTS]
        counted = m["name"] if m["n"] == found["n"] else f"{m['name']} (n {m['n']})"
        rows.append([counted, with_interval(m), area, *parts])
    return head, rows


def artefact_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Eq. 9 and its grey-matter form within each artefact, with intervals."""
    head = ["artefact", "Eq. 9 [95 %]", "around grey matter [95 %]", "Eq. 9 without clean scans", "n"]
    measures = found.get("measures", {})
    rows = []
    for a in ARTEFACTS:
        eq9 = measures.get("artefact_uncertainty", {}).get("per_artefact", {}).get(a)
        near = measures.get("artefact_uncertainty_gm", {}).get("per_artefact", {}).get(a)
        if eq9:
            rows.append([a, with_interval(eq9), with_interval(near), number(eq9["rho_without_clean"]), str(eq9["n"])])
    return head, rows


def experiment_text(found: Mapping[str, Any]) -> str:
    """What the numbers of one experiment rest on."""
    counts = ", ".join(f"{n} {s}" for s, n in found.get("severity_counts", {}).items() if n)
    return (
        f"n = {found.get('n', 0)} scans of {found.get('n_anatomies', 0)} anatomies ({counts}); {found.get('refused', 0)} refused by "
        f"preparation. Grey-matter Dice on clean scans {number(found.get('dice_clean'))}, with artefacts "
        f"{number(found.get('dice_artefact'))}. Intervals: bootstrap over anatomies, then scans."
    )


def square(values: Sequence[Sequence[float]], digits: int) -> list[list[str]]:
    """Rows of a 5x5 table, named."""
    return [[a, *(number(v, digits) for v in row)] for a, row in zip(ARTEFACTS, values, strict=True)]


def sections(metrics: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[list[str], list[list[str]]]]]]:
    """Title, text and tables of every section, for the page and for the documentation."""
    out: list[tuple[str, str, list[tuple[list[str], list[list[str]]]]]] = [
        ("Goals", "", [(["goal", "value", ""], goal_rows(goals(metrics)))])
    ]
    for key, title in SETS.items():
        found = metrics.get(key)
        if found and found.get("measures"):
            text = f"{experiment_text(found)} {REMARKS.get(key, '')}"
            paper = PAPER.get(key)
            if paper:
                text += " Paper: artefact uncertainty -0.850, SNR 0.326, CNR 0.200 (p-values fit n = 84)."
            out.append((title, text, [experiment_rows(found), artefact_rows(found)]))
    out += [_decoupling(metrics), _error_bars(metrics), _refusal(metrics), _extremes(metrics), _decision(metrics)]
    return [s for s in out if s[2]]


def _decoupling(metrics: Mapping[str, Any]) -> tuple[str, str, list[tuple[list[str], list[list[str]]]]]:
    parts = metrics.get("decoupling")
    if not parts:
        return ("Decoupling", "", [])
    change = parts["task_change"]
    within = percent(change.get("within_20_percent"))
    named = (
        "comparable scores of the calibration" if parts["calibrated"] else "ratio to clean scans (no calibration yet)"
    )
    text = (
        "Rows: the artefact in the image. Mean sigma_i^2 around grey matter over that of clean scans, visible severity; then how "
        f"often each artefact is named ({named}). Right at visible severity: {percent(parts['top1'])}; over all: "
        f"{percent(parts['top1_all'])}. Task variance of mild scans over their clean twins: median {number(change.get('median'))}, "
        f"within 20 %: {within}."
    )
    confusion = [[float(v) for v in row] for row in parts["confusion"]]
    every = [[float(v) for v in row] for row in parts["confusion_all"]]
    matrix = [row or [float("nan")] * 5 for row in parts["matrix"]]
    head = ["given", *(f"sigma_{a}" for a in ARTEFACTS)]
    names = ["given, visible", *ARTEFACTS]
    return (
        "Decoupling",
        text,
        [(head, square(matrix, 2)), (names, square(confusion, 0)), (["given, all", *ARTEFACTS], square(every, 0))],
    )


def _error_bars(metrics: Mapping[str, Any]) -> tuple[str, str, list[tuple[list[str], list[list[str]]]]]:
    bars = metrics.get("error_bars")
    if not bars or "bias_ml" not in bars:
        return ("Error bars", "", [])
    rows = [
        ["coverage of the product's 95 % interval", percent(bars.get("coverage_interval"))],
        ["coverage of 1.96 sigma of Eq. 8", percent(bars.get("eq8_coverage"))],
        [
            "median half-width, product / Eq. 8, ml",
            f"{number(bars.get('half_width_ml'), 1)} / {number(bars.get('eq8_half_width_ml'), 1)}",
        ],
        [
            "mean error and mean absolute error, ml",
            f"{number(bars['bias_ml'], 1)} / {number(bars['mean_absolute_error_ml'], 1)}",
        ],
        [
            "width against severity, rank correlation, noise / blur",
            f"{number(bars.get('width_monotone_noise'))} / {number(bars.get('width_monotone_blur'))}",
        ],
    ]
    return (
        "Error bars on the grey-matter volume",
        f"n = {bars['n']} scans, clean and artefacted.",
        [(["", "value"], rows)],
    )


def _refusal(metrics: Mapping[str, Any]) -> tuple[str, str, list[tuple[list[str], list[list[str]]]]]:
    found = metrics.get("refusal")
    if not found or not found.get("kinds"):
        return ("Refusal", "", [])
    rows = [
        [
            kind,
            " or ".join(k["expected"]),
            f"{k['right']}/{k['n']}",
            ", ".join(f"{v} {c}" for v, c in k["verdicts"].items()),
        ]
        for kind, k in sorted(found["kinds"].items())
    ]
    text = (
        f"Headers blanked: the image alone decides. Refused of what must be refused: {percent(found['refused_of_must_refuse'])}. "
        f"Clean heads refused: {percent(found['clean_heads_refused'])}. Artefacted heads refused: "
        f"{percent(found['artefacted_heads_refused'])}. Visible artefacts given RESCAN: {percent(found['visible_heads_rescan'])}, "
        f"not passed: {percent(found['visible_heads_not_passed'])}."
    )
    return ("Refusal", text, [(["image", "allowed", "right", "verdicts"], rows)])


def _extremes(metrics: Mapping[str, Any]) -> tuple[str, str, list[tuple[list[str], list[list[str]]]]]:
    found = metrics.get("extremes")
    if not found:
        return ("Extremes", "", [])
    keys = ("artefact_uncertainty", "artefact_uncertainty_gm", "risk", "task_uncertainty")
    rows = [
        [
            kind,
            str(v["n"]),
            *(number(v.get(k)) for k in keys),
            f"{v['dice'][0]:.2f} to {v['dice'][-1]:.2f}" if v["dice"] else "-",
        ]
        for kind, v in found.items()
    ]
    text = "One head, one draw per process, its strength rising in ten steps. Rank correlation of severity and score."
    head = ["process", "n", "Eq. 9", "around grey matter", "risk", "task variance", "Dice, weakest to strongest"]
    return ("Extremes", text, [(head, rows)])


def _decision(metrics: Mapping[str, Any]) -> tuple[str, str, list[tuple[list[str], list[list[str]]]]]:
    d = metrics.get("decision")
    if not d or not d.get("calibrated"):
        return ("Decision", "", [])
    rows = [
        ["required Dice", number(d["required_dice"])],
        ["false alarms: RESCAN at or above it", percent(d["false_alarms_interval"])],
        ["sensitivity: RESCAN below it", percent(d["sensitivity_interval"])],
        ["RESCAN or REVIEW below it", percent(d["sensitivity_with_review"])],
        ["RESCAN of clean scans", percent(d["clean_rescan"])],
        ["REVIEW or worse of clean scans", percent(d["clean_not_passed"])],
        ["Test A fires at or above it", percent(d["test_a_on_acceptable"])],
        ["Test B fires on clean scans", percent(d["test_b_on_clean"])],
        [
            "mean absolute error of predicted Dice",
            f"{d['dice_mae']:.4f} [{d['dice_mae_ci'][0]:.4f}, {d['dice_mae_ci'][1]:.4f}]",
        ],
        ["Dice inside its predicted interval", percent(d["dice_interval_coverage"])],
    ]
    text = (
        f"n = {d['n']} test scans of {d['n_anatomies']} anatomies; exact binomial intervals take scans as independent."
    )
    return ("Decision", text, [(["", "value"], rows)])


def page(metrics: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The report as one HTML file that loads nothing."""
    parts = [f"<h1>Evaluation of {escape(str(metrics['model']))}</h1><p class='note'>{escape(NOTICE)}</p>"]
    facts = metrics["made"]
    parts.append(f"<p class='note'>{escape('; '.join(f'{k}: {v}' for k, v in facts.items()))}</p>")
    for title, text, tables in sections(metrics):
        parts.append(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>" + "".join(table(h, r) for h, r in tables))
    for caption, data in figures.items():
        parts.append(
            f"<figure><img alt='{escape(caption)}' src='{data}'><figcaption>{escape(caption)}</figcaption></figure>"
        )
    body = "\n".join(parts)
    for word, name in (("not reached", "missed"), ("reached", "met")):
        body = body.replace(f"<td>{word}</td>", f"<td class='{name}'>{word}</td>")
    return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Rescan evaluation</title><style>{STYLE}</style>{body}</html>"


def markdown(metrics: Mapping[str, Any]) -> str:
    """The same tables for `docs/student.md`."""
    parts = []
    for title, text, tables in sections(metrics):
        parts += [f"### {title}\n", f"{text}\n" if text else "", *(markdown_table(h, r) for h, r in tables)]
    return "\n".join(p for p in parts if p)
