"""The pages for operators name tests, alerts, settings, log events and errors that exist."""

from __future__ import annotations

import re

import yaml

from daemon.config import describe
from daemon.log import Event
from daemon.metrics import METRICS
from tests.conftest import ROOT
from tests.docs.reference_page import page

DOCS = ROOT / "docs"
HAZARDS = (DOCS / "hazards.md").read_text(encoding="utf-8")
PAGES = {
    name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("operator", "runbook", "hazards", "physicist")
}

ASKED_FOR = (
    "A bad scan is missed",
    "A good scan is called bad",
    "The page is stale",
    "The verdict belongs to another series",
    "The alert comes when the patient has left",
)


def rules() -> set[str]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def test_every_hazard_has_mitigations_and_says_what_remains() -> None:
    """The five that were asked for, each with a table and what is left."""
    parts = dict(part.split("\n", 1) for part in re.split(r"^## ", HAZARDS, flags=re.MULTILINE)[1:])
    assert set(ASKED_FOR) <= set(parts)
    for name, text in parts.items():
        assert text.count("\n|") >= 5, name
        assert "*Remains:*" in text, name


def test_every_mitigation_names_tests_that_exist() -> None:
    """A row without a test is a wish."""
    written = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", written, flags=re.MULTILINE))
    rows = [line for line in HAZARDS.splitlines() if line.startswith("|") and not re.match(r"\|(-+\||\s*way )", line)]
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[3])
        assert named, row
        assert set(named) <= defined, row


def test_alerts_that_pages_name_are_rules() -> None:
    """A renamed rule is renamed here too."""
    for name, text in PAGES.items():
        assert set(re.findall(r"\bRescan[A-Z]\w+", text)) <= rules(), name


def test_metrics_that_pages_name_exist() -> None:
    """Names with their prefix."""
    known = {f"rescan_{m.name}" for m in METRICS}
    for name, text in PAGES.items():
        found = set(re.findall(r"\brescan_[a-z_]+[a-z]", text))
        assert found <= known, name


def test_settings_that_pages_name_exist() -> None:
    """Dotted names of a table that is one of the settings'."""
    known = {d.path for d in describe()}
    tables = {path.split(".")[0] for path in known if "." in path}
    for name, text in PAGES.items():
        found = {word for word in re.findall(r"`([a-z]+\.[a-z_]+)`", text) if word.split(".")[0] in tables}
        assert found - {"model.onnx"} <= known, name


def test_log_events_that_pages_name_exist() -> None:
    """`event=...` as it stands in the log."""
    for name, text in PAGES.items():
        assert set(re.findall(r"event=([a-z_]+)", text)) <= {str(event) for event in Event}, name


def test_errors_that_the_runbook_quotes_are_said_by_the_program() -> None:
    """What an operator searches for stands in the code in the same words."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "daemon").rglob("*.py"))
    for quoted in (
        "cannot listen on",
        "is in use by another rescan serve",
        "another program holds it",
        "cannot be used",
        "the ledger cannot be used; see the disk",
        "the model is being loaded and checked",
        "the DICOM port is not open yet",
        "the spool is being read again",
        "needs a restart",
    ):
        assert quoted in PAGES["runbook"], quoted
        assert quoted in code, quoted


def test_the_page_of_names_is_the_current_one() -> None:
    """`python -m tests.docs.reference_page > docs/reference.md` after a change of commands, metrics, reasons or log events."""
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == page()
