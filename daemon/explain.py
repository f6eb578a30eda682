"""`rescan explain PATH`: the stacks in a file or folder, the rule that admits each, and why the others do not.

It reads headers and geometry alone; pixels are decoded only where `--pixels` asks for it. No model is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daemon.completeness import Complete
from daemon.config import load
from daemon.geometry import Geometry
from daemon.reasons import REASONS
from daemon.rules import Rule, RuleError, default_rule, first_failure, load_rules, match_rule, what_it_is
from daemon.stack import Stack
from daemon.volume import build_volume, find_files, is_nifti, read_dicom, read_nifti, stacks_from_files
from daemon.words import Reason, Refusal, Volume


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan explain`."""
    parser = subparsers.add_parser(
        "explain",
        help="show the stacks found, the rule that matches, what would be refused and why",
        description="Show what the daemon would make of the images at PATH, without judging them.",
        epilog="examples:\n  rescan explain dicom_folder\n  rescan explain dicom_folder --config rescan.toml --json",
    )
    parser.add_argument("path", type=Path, help="DICOM folder or file, NIfTI or MGZ file")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file, for its rules")
    parser.add_argument("--pixels", action="store_true", help="decode the pixels too")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects, one per stack")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Explain, print."""
    if not args.path.exists():
        text = "there is no such file or folder; name a DICOM folder, a DICOM file or a NIfTI file"
        print(f"rescan explain: {args.path}: {text}", file=sys.stderr)
        return 1
    try:
        rules = load_rules(load(args.config).settings.rules)
    except RuleError as error:
        print(f"rescan explain: {error}", file=sys.stderr)
        return 2
    found = explain_path(args.path, rules, pixels=args.pixels)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    if not found:
        print(f"rescan explain: {args.path}: no image found", file=sys.stderr)
    for number, explained in enumerate(found, 1):
        print(as_text(number, explained))
    return 0


def explain_path(path: Path, rules: Sequence[Rule] = (), *, pixels: bool = False) -> list[dict[str, Any]]:
    """What would become of each stack at a path.

    Args:
        path: a DICOM file or folder, or a NIfTI or MGZ file.
        rules: as configured; empty means the default rule.
        pixels: decode them as well.

    Returns:
        One JSON object per stack: source, series (number, description), images, expected, geometry, rule (name or null),
        refused ({code, text} or null), and for each rule why it does not admit the stack (null: it does).
    """
    files = sorted(find_files(path))
    explained = [_explain_nifti(file, rules) for file in files if is_nifti(file)]
    for stack, paths in stacks_from_files([file for file in files if not is_nifti(file)]):
        about = _explain_stack(stack, rules)
        about["source"] = str(path)
        if pixels and about["refused"] is None:
            about["refused"] = _reason(_decode(stack, paths))
        explained.append(about)
    return explained


def _decode(stack: Stack, paths: dict[str, Path]) -> Reason | None:
    try:
        build_volume(stack, lambda stored: read_dicom(paths[stored.sha256]))
    except Refusal as refusal:
        return refusal.reason
    return None


def _explain_nifti(file: Path, rules: Sequence[Rule]) -> dict[str, Any]:
    volume = read_nifti(file)
    refused = None if isinstance(volume, Volume) else volume.reason
    return {
        "source": str(file),
        "series": {},
        "images": None,
        "expected": None,
        "geometry": {"shape": list(volume.voxels.shape)} if isinstance(volume, Volume) else None,
        "rule": default_rule(rules).name if refused is None else None,
        "refused": _reason(refused),
        "rules": {},
        "note": "no DICOM header: it passes the header's conditions of the first rule",
    }


def _explain_stack(stack: Stack, rules: Sequence[Rule]) -> dict[str, Any]:
    header = stack.representative
    matched = match_rule(stack, rules)
    told = {"number": header.series_number, "description": header.attributes.get("SeriesDescription")}
    evidence = stack.evidence(Complete.FILE)
    return {
        "series": {key: value for key, value in told.items() if value is not None},
        "image_type": list(header.frames[0].image_type),
        "images": evidence.instances,
        "instances": len(stack.instances),
        "volumes": stack.volumes,
        "expected": evidence.expected,
        "expected_from": evidence.rule,
        "geometry": _geometry(stack.geometry),
        "rule": matched.name if isinstance(matched, Rule) else None,
        "refused": _reason(matched if isinstance(matched, Reason) else None),
        "rules": _each_rule(stack, rules or load_rules(())),
    }


def _each_rule(stack: Stack, rules: Sequence[Rule]) -> dict[str, dict[str, str] | None]:
    """Rule -> why it does not admit the stack, None where it does."""
    whatever = what_it_is(stack)
    found = {}
    for rule in rules:
        failed = first_failure(stack, rule)
        found[rule.name] = _reason(whatever if whatever is not None else failed[1] if failed is not None else None)
    return found


def _geometry(geometry: Geometry | Reason) -> dict[str, Any]:
    if isinstance(geometry, Reason):
        return {"unusable": {"code": geometry.code, "text": geometry.text}}
    return {
        "plane": geometry.plane,
        "oblique_deg": round(geometry.oblique_deg, 2),
        "slices": geometry.slices,
        "spacing_mm": [round(s, 4) for s in geometry.spacing_mm],
        "extent_mm": round(geometry.extent_mm, 1),
    }


def _reason(reason: Reason | None) -> dict[str, str] | None:
    return None if reason is None else {"code": reason.code, "text": reason.text or REASONS.get(reason.code, "")}


def as_text(number: int, about: dict[str, Any]) -> str:
    """One stack for a person."""
    series = about["series"]
    name = " ".join(str(series[key]) for key in ("number", "description") if key in series)
    lines = [f"stack {number}: {name or about['source']}"]
    if about["images"] is not None:
        expected = f" of {about['expected']} ({about['expected_from']})" if about["expected"] is not None else ""
        volumes = f", first of {about['volumes']} volumes" if about["volumes"] > 1 else ""
        lines.append(f"  images    {about['images']}{expected} in {about['instances']} instances{volumes}")
        lines.append(f"  type      {' '.join(about['image_type']) or 'unknown'}")
    lines.append(f"  geometry  {_geometry_text(about['geometry'])}")
    refused = about["refused"]
    if refused is None:
        lines.append(f"  judged    by rule {about['rule']}")
    else:
        lines.append(f"  refused   {refused['code']}: {refused['text']}")
    lines += [f"  not {rule}: {why['text']}" for rule, why in about["rules"].items() if why and why != refused]
    return "\n".join(lines)


def _geometry_text(geometry: dict[str, Any] | None) -> str:
    if geometry is None:
        return "unknown"
    if "unusable" in geometry:
        return str(geometry["unusable"]["text"])
    if "plane" not in geometry:
        return " x ".join(map(str, geometry["shape"]))
    rows, columns, between = geometry["spacing_mm"]
    tilt = f", {geometry['oblique_deg']:g} degrees oblique" if geometry["oblique_deg"] >= 0.5 else ""
    return (
        f"{geometry['slices']} {geometry['plane']} slices {between:g} mm apart, pixels {columns:g} x {rows:g} mm, "
        f"{geometry['extent_mm']:g} mm in all{tilt}"
    )
