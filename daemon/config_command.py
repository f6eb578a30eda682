"""`rescan check FILE` and `rescan config`: find mistakes before a restart, and see what is in force and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from daemon.config import ConfigError, Described, Settings, describe, load, split_endpoint, value_at
from daemon.flags import add_settings_flags, settings_from
from daemon.web import listen


def add_check_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan check FILE`."""
    parser = subparsers.add_parser(
        "check",
        help="check a configuration file",
        description="Check a configuration file: keys, ranges, doors open to the network, ports, the model, the rules.",
        epilog="examples:\n  rescan check /etc/rescan.toml && systemctl reload rescan",
    )
    parser.add_argument("file", type=Path, help="TOML file")
    parser.add_argument("--no-ports", action="store_true", help="do not try the ports; for a file that is in use")
    parser.set_defaults(func=run_check)


def add_config_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan config`."""
    parser = subparsers.add_parser(
        "config",
        help="print the effective settings and where each came from",
        description="Print every setting in force as a TOML file, with its origin: default, file or flag.",
        epilog="examples:\n  rescan config --config /etc/rescan.toml\n  rescan config --schema > rescan.schema.json",
    )
    add_settings_flags(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="as JSON: path -> value and origin")
    kind.add_argument("--schema", action="store_true", help="the JSON Schema of the file instead")
    parser.set_defaults(func=run_config)


def run_check(args: argparse.Namespace) -> int:
    """Print one line per mistake on standard error; 1 where there is one."""
    try:
        settings = load(args.file).settings
    except ConfigError as error:
        print(f"rescan check: {error}", file=sys.stderr)
        return 1
    faults = find_faults(settings, ports=not args.no_ports)
    for fault in faults:
        print(f"rescan check: {args.file}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{args.file}: no mistakes found", file=sys.stderr)
    return 1 if faults else 0


def find_faults(settings: Settings, *, ports: bool = True) -> list[str]:
    """What would keep settings that can be read from working on this machine; one line each, with the remedy."""
    faults = [*_model_faults(settings), *_rule_faults(settings), *_file_faults(settings)]
    return faults + (_port_faults(settings) if ports else [])


def _model_faults(settings: Settings) -> list[str]:
    from daemon.card import CardError, read_card

    try:
        read_card(settings.model.path)
    except CardError as error:
        return [f"model.file: {error}"]
    return []


def _rule_faults(settings: Settings) -> list[str]:
    from daemon.rules import RuleError, load_rules

    try:
        load_rules(settings.rules)
    except RuleError as error:
        return [f"rules: {error}"]
    return []


def _file_faults(settings: Settings) -> list[str]:
    files = {
        "http.token_file": settings.http.token_file,
        "http.tls_certificate": settings.http.tls_certificate,
        "http.tls_key": settings.http.tls_key,
    }
    return [
        f"{name}: {path} is not there; write it, or name another"
        for name, path in files.items()
        if path and not path.is_file()
    ]


def _port_faults(settings: Settings) -> list[str]:
    doors = {
        "dicom": (settings.dicom.host, settings.dicom.port),
        "http": (settings.http.host, settings.http.port),
        "events.publish": split_endpoint(settings.events.publish, "events.publish"),
        "events.replay": split_endpoint(settings.events.replay, "events.replay"),
    }
    faults: list[str] = []
    for name, (host, port) in doors.items():
        try:
            listen(host, port).close()
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    return faults


def run_config(args: argparse.Namespace) -> int:
    """Print settings, or their schema."""
    if args.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    effective = settings_from(args)
    rows = [(d.path, value_at(effective.settings, d.path)) for d in describe() if "[]" not in d.path]
    origins = {path: _origin(path, effective.origins) for path, _ in rows}
    if args.json:
        print(json.dumps({p: {"value": plain(v), "origin": origins[p]} for p, v in rows}, indent=2))
        return 0
    print("\n".join(settings_file(effective.settings, origins)))
    return 0


def _origin(path: str, origins: Any) -> str:
    return str(origins.get(path, "default"))


def settings_file(settings: Settings, origins: Mapping[str, str]) -> list[str]:
    """The lines of a TOML file that says what is in force; each ends with where it comes from. What is not set is a comment."""
    root: list[str] = []
    tables: dict[str, list[str]] = {}
    entries: list[str] = []
    for described in describe():
        path, (table, _, name) = described.path, described.path.rpartition(".")
        if "[]" in path:
            continue
        value = plain(value_at(settings, path))
        if described.kind == "array" and any(isinstance(each, dict) for each in value):
            for each in value:
                pairs = [f"{k} = {toml_value(v)}" for k, v in each.items() if v is not None]
                entries += ["", f"[[{path}]]  # {origins[path]}", *pairs]
            continue
        unset = value is None or (described.kind == "array" and not value)
        line = f"# {name} =  # not set" if unset else f"{name} = {toml_value(value)}  # {origins[path]}"
        (tables.setdefault(table, []) if table else root).append(line)
    return [*root, *(line for name, lines in tables.items() for line in ("", f"[{name}]", *lines)), *entries]


def toml_value(value: Any) -> str:
    """One value as TOML: text, number, truth, list or inline table."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(k)} = {toml_value(v)}' for k, v in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A setting as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path | StrEnum) else value


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the TOML file, made from the settings themselves."""
    root = _table("Settings of `rescan serve`.")
    root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for described in describe():
        *folders, name = described.path.split(".")
        table = root
        for folder in folders:
            table = _enter(table, folder)
        table["properties"][name] = _leaf(described)
        if (
            described.default is None
            and described.path.startswith("scanners[].")
            and name in ("slug", "ae_title", "address")
        ):
            table.setdefault("required", []).append(name)
    return root


def _table(text: str) -> dict[str, Any]:
    return {"type": "object", "description": text, "properties": {}, "additionalProperties": False}


def _enter(table: dict[str, Any], folder: str) -> dict[str, Any]:
    """The table below one, made on the way; `name[]` is a list of tables."""
    name = folder.removesuffix("[]")
    if folder.endswith("[]"):
        found = table["properties"][name]
        found.setdefault("items", _table(found["description"]))
        items: dict[str, Any] = found["items"]
        return items
    below: dict[str, Any] = table["properties"].setdefault(name, _table(name))
    return below


def _leaf(described: Described) -> dict[str, Any]:
    leaf: dict[str, Any] = {"type": described.kind, "description": described.help}
    if described.choices:
        leaf["enum"] = list(described.choices)
    if described.default is not None and described.path != "state":
        leaf["default"] = plain(described.default)
    leaf |= {
        key: bound for key, bound in (("minimum", described.low), ("maximum", described.high)) if bound is not None
    }
    return leaf
