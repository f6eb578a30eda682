"""The example configuration, its schema and the page of settings say what the settings themselves say."""

from __future__ import annotations

import json
import re
import tomllib

import jsonschema

from daemon.__main__ import main
from daemon.config import AlertMode, describe, load, value_at
from daemon.config_command import json_schema, plain
from tests.conftest import ROOT
from tests.deploy.settings_page import page

EXAMPLE = ROOT / "deploy" / "rescan.example.toml"
SCHEMA = ROOT / "deploy" / "rescan.schema.json"

DEPARTURES = {"state", "scanners", "dicom.host", "spool.reserve_bytes"}
"""What the example sets to something else than the default."""


def uncommented() -> str:
    """The example with every `# name = value` in force."""
    return re.sub(r"^# ([a-z_]+ = )", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_example_is_accepted() -> None:
    """`rescan check` finds no mistake in it, and the schema agrees."""
    assert main(["check", "--no-ports", str(EXAMPLE)]) == 0
    data = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(json_schema()).validate(data)


def test_a_new_scanner_begins_in_shadow_with_the_reason() -> None:
    """Nobody is alarmed by a scanner that the student has never seen."""
    (scanner,) = load(EXAMPLE).settings.scanners
    assert scanner.alerts is AlertMode.SHADOW
    assert "begins in shadow" in EXAMPLE.read_text(encoding="utf-8")


def test_every_setting_stands_in_the_example_with_its_default() -> None:
    """A setting that is new in the code is missing here until it is explained here."""
    data = tomllib.loads(uncommented())
    named = {
        f"{name}.{key}" if isinstance(table, dict) else name
        for name, table in data.items()
        for key in (table if isinstance(table, dict) else [""])
    }
    named |= {f"scanners[].{key}" for key in data["scanners"][0]}
    assert {d.path for d in describe()} - named - {"rules"} == set()
    assert "# [[rules]]" in EXAMPLE.read_text(encoding="utf-8")
    settings, default = load(EXAMPLE).settings, load().settings
    differing = {
        d.path for d in describe() if "[]" not in d.path and value_at(settings, d.path) != value_at(default, d.path)
    }
    assert differing == DEPARTURES


def test_what_the_example_calls_live_is_live() -> None:
    """`(live)` stands behind exactly the settings that SIGHUP may change."""
    table, live = "", set()
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if head := re.match(r"\[+([a-z]+)\]+", line):
            table = f"{head[1]}[]" if line.startswith("[[") else head[1]
        elif (key := re.match(r"(?:# )?([a-z_]+) = ", line)) and "(live)" in line:
            live.add(f"{table}.{key[1]}")
    assert live == {d.path for d in describe() if d.live} - {"rules"}


def test_the_schema_in_the_repository_is_the_current_one() -> None:
    """`rescan config --schema > deploy/rescan.schema.json` after a change of the settings."""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema()


def test_the_page_of_settings_is_the_current_one() -> None:
    """`python -m tests.deploy.settings_page > docs/settings.md` after a change of the settings."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page()


def test_the_schema_knows_every_default() -> None:
    """An editor offers what the daemon would take."""
    schema = json_schema()["properties"]
    for d in describe():
        if "[]" in d.path or d.default is None or d.path == "state":
            continue
        *tables, name = d.path.split(".")
        where = schema
        for table in tables:
            where = where[table]["properties"]
        assert where[name]["default"] == plain(d.default), d.path
