"""`rescan score PATH`: judge a DICOM folder or file, or a NIfTI file, with the parts of the daemon and without the daemon."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daemon.calibration import FILE_NAME, CalibrationError, in_force, load_site
from daemon.card import CardError
from daemon.completeness import Complete
from daemon.config import Engine, load
from daemon.engines import EngineError
from daemon.flow import Served, content_hash, make_result
from daemon.prepare import to_source_grid
from daemon.result import SiteKey
from daemon.rules import Rule, RuleError, default_rule, load_rules, match_rule
from daemon.scorer import Scored, Seen, look_at, maps_of, open_student
from daemon.stack import Stack
from daemon.student import Student
from daemon.volume import volumes_from_path
from daemon.words import ARTEFACTS, Array, Reason, Refusal, Volume


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan score`."""
    parser = subparsers.add_parser(
        "score",
        help="judge a DICOM folder or file, or a NIfTI file",
        description="Judge every volume found at PATH, as the daemon would. The exit status is 0 whatever the verdict.",
        epilog="examples:\n  rescan score scan.nii.gz\n  rescan score dicom_folder --json | jq '.[].verdict'\n"
        "  rescan score dicom_folder --maps maps",
    )
    parser.add_argument("path", type=Path, help="DICOM folder or file, NIfTI or MGZ file")
    parser.add_argument("--json", action="store_true", help="print a list of result objects")
    parser.add_argument("--maps", type=Path, metavar="DIR", help="write the maps of each volume to DIR/<n>/")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file, for its rules and its model")
    parser.add_argument("--state", type=Path, metavar="DIR", help="state folder, for its calibration and references")
    parser.add_argument("--model", type=Path, metavar="FILE", help="the student (default: the one that ships)")
    parser.add_argument("--engine", choices=[*Engine], help="what runs the student (default: auto)")
    parser.set_defaults(func=run)


@dataclass(frozen=True)
class Judge:
    """What is needed to judge one volume after another."""

    student: Student
    rules: tuple[Rule, ...]
    key: SiteKey
    site: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Judge, print, write maps."""
    if not args.path.exists():
        text = "there is no such file or folder; name a DICOM folder, a DICOM file or a NIfTI file"
        print(f"rescan score: {args.path}: {text}", file=sys.stderr)
        return 1
    try:
        judge = _make_judge(args)
    except (CardError, EngineError, RuleError, CalibrationError) as error:
        print(f"rescan score: {error}", file=sys.stderr)
        return 1
    results = []
    for number, (result, seen) in enumerate(judge_path(args.path, judge), 1):
        results.append(result)
        if args.maps is not None:
            write_maps(args.maps / str(number), seen, judge.student)
        if not args.json:
            print(report(result))
    if args.json:
        print(json.dumps(results, indent=2))
    elif not results:
        print(f"rescan score: {args.path}: no image found", file=sys.stderr)
    return 0


def _make_judge(args: argparse.Namespace) -> Judge:
    flags = {"model.file": args.model, "model.engine": args.engine, "state": args.state}
    settings = load(args.config, {path: value for path, value in flags.items() if value is not None}).settings
    has_key = (settings.state / "site.key").is_file()
    return Judge(
        open_student(settings.model),
        load_rules(settings.rules),
        SiteKey.load(settings.state) if has_key else SiteKey(secrets.token_bytes(32)),
        load_site(settings.state / FILE_NAME),
    )


def judge_path(path: Path, judge: Judge) -> Iterator[tuple[dict[str, Any], Seen]]:
    """One result object per stack found, with what its maps can be written from."""
    for stack, found, source in volumes_from_path(path):
        rule = default_rule(judge.rules) if stack is None else match_rule(stack, judge.rules, judge.student.card.name)
        if isinstance(rule, Reason):
            seen = Seen(Scored(None, rule), found if isinstance(found, Volume) else None)
        elif isinstance(found, Refusal):
            seen = Seen(Scored(None, found.reason))
        else:
            seen = look_at(lambda found=found: found, judge.student)  # type: ignore[misc]
        yield _result(judge, stack, str(source), seen, rule if isinstance(rule, Rule) else None), seen


def _result(judge: Judge, stack: Stack | None, source: str, seen: Seen, rule: Rule | None) -> dict[str, Any]:
    student = judge.student
    names = (stack.series_uid, stack.study_uid, stack.key) if stack else (source, source, source)
    identity = judge.key.identity(*names, "unknown")
    site = None if rule is None else in_force(judge.site, student.sha256, identity.scanner, rule.name)
    content = content_hash(stack) if stack else source
    return make_result(
        identity,
        seen.scored,
        Served(student.card, student.sha256, student.describe()),
        rule,
        site,
        stack.evidence(Complete.FILE) if stack else None,
        result_id=judge.key.ref(f"{identity.stack_ref} {content}"),
        final=True,
        revision=1,
        supersedes=None,
        shadow=False,
        timing_s={name: seen.scored.seconds.get(name) for name in ("prepare", "infer", "score")},
        extra={"source": source},
    )


def report(result: dict[str, Any]) -> str:
    """One result for a person: verdict, numbers, reasons, advice."""
    scores = result["scores"]
    head = f"{result['verdict']:12} {result['source']}"
    if "predicted_dice" in scores:
        interval = f"{scores['predicted_dice_low']:.2f} to {scores['predicted_dice_high']:.2f}"
        head += (
            f"\n  predicted Dice {scores['predicted_dice']:.2f} ({interval}), required {result['required_dice']:.2f}"
        )
    told = [f"  - {reason['text']}" for reason in result["reasons"]] + [f"  > {a['text']}" for a in result["advice"]]
    return "\n".join([head, *told])


def write_maps(folder: Path, seen: Seen, student: Student) -> None:
    """Write the maps on the source grid and affine; nothing for a volume that was refused.

    Raises:
        OSError: the folder cannot be written.
    """
    maps = maps_of(seen, student)
    if seen.volume is None or seen.prepared is None or maps is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, Array] = {"gm_probability": maps.gm_probability, "task_variance": maps.task_variance}
    named |= {f"{name}_variance": maps.artefact_variance[i] for i, name in enumerate(ARTEFACTS)}
    for name, cells in named.items():
        _write_nifti(folder / f"{name}.nii.gz", to_source_grid(cells, seen.prepared, seen.volume, 0.0), seen.volume)


def _write_nifti(path: Path, values: Array, volume: Volume) -> None:
    import nibabel

    nib: Any = nibabel

    image = nib.Nifti1Image(values.astype(np.float32), volume.affine)
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    nib.save(image, path)
