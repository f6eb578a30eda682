"""A site's own calibration: `STATE/calibration.json`, keyed by model hash, scanner and protocol.

It replaces the card's Test B threshold (and, where Dice is known on site, the upper offset of predicted Dice) by numbers of
the site's own clean scans. The most specific level that rests on enough scans is in force: protocol, then scanner, then
global, which is the card itself. The model file never changes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "calibration.json"
FORMAT_VERSION = 1
DEFAULT_RATE = 0.05
DEFAULT_CONFIDENCE = 0.95


class CalibrationError(Exception):
    """A calibration that cannot be read or fitted; the message is one line with the remedy."""


@dataclass(frozen=True)
class SiteCalibration:
    """Numbers in force for one scanner or protocol.

    Attributes:
        level: `protocol` or `scanner`.
        alarm_risk: Test B fires above it.
        alarm_rate: its stated false-alarm rate.
        alarm_confidence: confidence that the rate is not exceeded.
        scans: clean scans it rests on, one per exam.
        dice_high: offset of predicted Dice for Test A from scans with known Dice, >= 0; None where there are too few.
        dice_scans: scans with known Dice that the offset rests on.
    """

    level: str
    alarm_risk: float
    alarm_rate: float
    alarm_confidence: float
    scans: int
    dice_high: float | None = None
    dice_scans: int = 0


@dataclass(frozen=True)
class HistoryItem:
    """One clean scan of a site.

    Attributes:
        scanner: configured slug.
        protocol: name of the rule that admitted it.
        exam: keyed hash of the exam; repeated scans of one exam are not independent and count once.
        risk: of the scan.
        predicted_dice: of the scan.
        dice: known Dice against a reference segmentation, or None.
    """

    scanner: str
    protocol: str
    exam: str
    risk: float
    predicted_dice: float
    dice: float | None = None


def order_statistic_rank(scans: int, rate: float, confidence: float) -> int | None:
    """Rank of the clean score that a threshold must equal, or None where there are too few scans.

    The smallest rank k (1-based, ascending) for which the k-th of `scans` clean scores is exceeded by a new clean scan
    with probability at most `rate`, with at least the given confidence: P(Binomial(n, 1 - rate) >= k) <= 1 - confidence.

    Args:
        scans: number of independent clean scans.
        rate: false-alarm rate, in (0, 1).
        confidence: in (0, 1).

    Source: Tong, Feng, Li, Sci. Adv. 4:eaao1659 (2018), proposition 1; at least ln(1-confidence)/ln(1-rate) scans: 59 for 5 %, 95 %.
    """
    tail = 0.0
    rank = None
    for k in range(scans, 0, -1):
        log_term = (
            math.lgamma(scans + 1)
            - math.lgamma(k + 1)
            - math.lgamma(scans - k + 1)
            + k * math.log1p(-rate)
            + (scans - k) * math.log(rate)
        )
        tail += math.exp(log_term)
        if tail > 1.0 - confidence:
            break
        rank = k
    return rank


def conformal_rank(scans: int, rate: float) -> int | None:
    """Rank of the residual that bounds a new one with probability 1 - rate: ceil((n+1)(1-rate)), None where n is too small.

    Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, section 4 (split conformal).
    """
    rank = math.ceil((scans + 1) * (1.0 - rate) - 1e-9)
    return rank if rank <= scans else None


def load_site(path: Path) -> dict[str, Any]:
    """Read STATE/calibration.json; an absent file is an empty calibration.

    Raises:
        CalibrationError: unreadable, not JSON, or of another version.
    """
    if not path.exists():
        return {"version": FORMAT_VERSION, "models": {}}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path.name}: cannot be read ({error}); run `rescan calibrate` again") from None
    if not isinstance(document, dict) or document.get("version") != FORMAT_VERSION:
        raise CalibrationError(f"{path.name}: expected version {FORMAT_VERSION}; run `rescan calibrate` again")
    return document


def in_force(document: dict[str, Any], model_sha256: str, scanner: str, protocol: str) -> SiteCalibration | None:
    """The most specific calibration for a scan; None: the card's own (level `global`).

    Raises:
        CalibrationError: the entry is not one that `rescan calibrate` wrote.
    """
    entry = document.get("models", {}).get(model_sha256, {}).get(scanner, {})
    for level, found in (
        ("protocol", entry.get("protocols", {}).get(protocol)),
        ("scanner", entry.get("scanner")),
    ):
        if found is not None:
            try:
                return SiteCalibration(**{**found, "level": level})
            except TypeError as error:
                raise CalibrationError(f"{FILE_NAME}: {scanner}: {error}; run `rescan calibrate` again") from None
    return None


def fit_site(
    history: Iterable[HistoryItem],
    rate: float = DEFAULT_RATE,
    confidence: float = DEFAULT_CONFIDENCE,
) -> dict[str, Any]:
    """Fit every scanner and protocol that has enough clean scans.

    Returns:
        scanner -> {"scanner": calibration or absent, "protocols": {name: calibration}}.
    """
    by_scanner: dict[str, list[HistoryItem]] = defaultdict(list)
    for item in history:
        by_scanner[item.scanner].append(item)
    fitted: dict[str, Any] = {}
    for scanner, items in by_scanner.items():
        protocols = {name: [i for i in items if i.protocol == name] for name in sorted({i.protocol for i in items})}
        levels = {name: _fit("protocol", group, rate, confidence) for name, group in protocols.items()}
        whole = _fit("scanner", items, rate, confidence)
        fitted[scanner] = {
            **({"scanner": asdict(whole)} if whole else {}),
            "protocols": {name: asdict(found) for name, found in levels.items() if found},
        }
    return fitted


def _fit(level: str, items: Sequence[HistoryItem], rate: float, confidence: float) -> SiteCalibration | None:
    worst_of_exam: dict[str, float] = {}
    for item in items:
        worst_of_exam[item.exam] = max(item.risk, worst_of_exam.get(item.exam, -math.inf))
    risks = sorted(worst_of_exam.values())
    rank = order_statistic_rank(len(risks), rate, confidence)
    if rank is None:
        return None
    residuals = sorted(
        i.dice - i.predicted_dice
        for i in {i.exam: i for i in items if i.dice is not None}.values()
        if i.dice is not None
    )
    dice_rank = conformal_rank(len(residuals), rate)
    dice_high = max(residuals[dice_rank - 1], 0.0) if dice_rank is not None else None
    return SiteCalibration(level, risks[rank - 1], rate, confidence, len(risks), dice_high, len(residuals))


def read_history(path: Path) -> tuple[str, list[HistoryItem]]:
    """Read a history: JSON lines of result objects, of clean scans judged by one model; or the CSV of `rescan history --to`.

    A line may carry `dice` (known Dice against a reference). Results that are not final, carry no risk or were refused are left out.

    Returns:
        The hash of the model and the items.

    Raises:
        CalibrationError: unreadable, not JSON lines, nothing usable, or results of several models.
    """
    if path.is_dir() or path.suffix == ".csv":
        from daemon.site_calibrate import read_table

        selection = read_table(path)
        print(selection.text, file=sys.stderr)
        return selection.model_sha256, selection.items
    items: list[HistoryItem] = []
    models: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            result = json.loads(line) if line.strip() else {}
            if result.get("final") and "risk" in result.get("scores", {}):
                models.add(result["model"]["sha256"])
                items.append(_history_item(result, number))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path.name}: not a history of results ({error!r}); export one with `rescan history --json`"
        ) from None
    if len(models) != 1:
        raise CalibrationError(
            f"{path.name}: expected scored results of one model, got {len(models)}; keep those of the model in use"
        )
    return models.pop(), items


def _history_item(result: dict[str, Any], number: int) -> HistoryItem:
    scores = result["scores"]
    return HistoryItem(
        scanner=result["scanner"],
        protocol=str(result.get("policy", {}).get("rule", "")),
        exam=str(result.get("exam_ref", number)),
        risk=float(scores["risk"]),
        predicted_dice=float(scores["predicted_dice"]),
        dice=None if result.get("dice") is None else float(result["dice"]),
    )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan calibrate HISTORY`: fit a site's own thresholds from its clean scans."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit this site's alarm thresholds from a history of clean scans",
    )
    parser.add_argument(
        "history",
        type=Path,
        help="the folder or verdicts.csv of `rescan history --to`, or JSON lines of results of clean scans alone, each optionally with its known `dice`",
    )
    parser.add_argument(
        "--state",
        type=Path,
        required=True,
        help=f"state folder; {FILE_NAME} is written there",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=DEFAULT_RATE,
        help="false-alarm rate, default %(default)s",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=DEFAULT_CONFIDENCE,
        help="confidence, default %(default)s",
    )
    parser.set_defaults(func=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    try:
        if not (0 < args.rate < 1 and 0 < args.confidence < 1):
            raise CalibrationError(f"rate {args.rate}, confidence {args.confidence}: both must lie between 0 and 1")
        model, items = read_history(args.history)
        fitted = fit_site(items, args.rate, args.confidence)
        document = load_site(args.state / FILE_NAME)
        document["models"][model] = {**document["models"].get(model, {}), **fitted}
        _write(args.state / FILE_NAME, document)
    except CalibrationError as error:
        print(f"rescan calibrate: {error}", file=sys.stderr)
        return 1
    for line in describe(items, fitted, args.rate, args.confidence):
        print(line, file=sys.stderr)
    print(json.dumps(fitted, indent=2))
    return 0


def describe(items: Sequence[HistoryItem], fitted: dict[str, Any], rate: float, confidence: float) -> list[str]:
    """Which level is in force for each scanner and protocol, and how many scans it rests on; one line each."""
    needed = math.ceil(math.log(1.0 - confidence) / math.log(1.0 - rate))
    lines = []
    for scanner, protocol in sorted({(i.scanner, i.protocol) for i in items}):
        exams = len({i.exam for i in items if (i.scanner, i.protocol) == (scanner, protocol)})
        entry = fitted[scanner]
        found = entry["protocols"].get(protocol) or entry.get("scanner")
        level = found["level"] if found else "global"
        rests = f"{found['scans']} scans" if found else f"the model card; {needed} scans of one kind are needed"
        lines.append(f"{scanner} / {protocol or '(no rule)'}: {exams} exams; in force: {level} ({rests})")
    return lines


def _write(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CalibrationError(
            f"{path}: cannot be written ({error.strerror}); give a folder this user may write to"
        ) from None
