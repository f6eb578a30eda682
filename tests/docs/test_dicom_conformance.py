"""The conformance statement says what the code does: every table of the page, row by row."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from pydicom.uid import UID

from daemon.completeness import TABLE, Effect, Event, State
from daemon.config import CompletenessSettings
from daemon.decode import MAX_INSTANCE_BYTES, MAX_SIDE, TRANSFER_SYNTAXES
from daemon.header import MAX_FRAMES, SUPPORTED
from daemon.prepare import MAX_VOXELS
from daemon.reasons import ADVICE, COMPLETENESS, REASONS, REFUSALS
from daemon.receive import STATUSES
from daemon.receive import TRANSFER_SYNTAXES as ACCEPTED
from daemon.rules import DEFAULT_RULE, Rule, load_rules
from daemon.series import LATE_LIMIT_S

PAGE = (Path(__file__).parents[2] / "docs" / "dicom-conformance.md").read_text(encoding="utf-8")


def rows(heading: str, number: int = 0) -> list[list[str]]:
    """The rows of a table (the nth) below a heading, without its head."""
    section = re.split(rf"^#+ {re.escape(heading)}$", PAGE, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].strip().split("\n")[2:]]


def test_the_sop_classes_that_are_judged() -> None:
    """Names and UIDs."""
    assert [(str(UID(uid).name), uid) for uid in SUPPORTED] == [
        tuple(row) for row in rows("SOP classes that are judged")
    ]


def test_the_transfer_syntaxes_that_are_accepted_are_those_that_are_read() -> None:
    """Nothing is accepted that cannot be decoded, nor the other way round."""
    assert {row[1]: row[0] for row in rows("Transfer syntaxes")} == TRANSFER_SYNTAXES
    assert set(ACCEPTED) == set(TRANSFER_SYNTAXES)


def test_the_status_codes() -> None:
    """Each with its meaning."""
    assert [(f"0x{s.code:04X}", s.meaning) for s in STATUSES.values()] == [tuple(r) for r in rows("C-STORE status")]


def test_the_evidence_of_completeness() -> None:
    """Codes, sentences and default times."""
    times = CompletenessSettings()
    waits = {
        "counted": times.counted_s,
        "released": times.released_s,
        "quiet": times.quiet_provisional_s,
        "quiet_final": times.quiet_final_s,
        "timeout": times.max_open_s,
    }
    told = {row[0].strip("`"): (row[1], row[2]) for row in rows("When a stack is complete")}
    assert {code: text for code, (text, _) in told.items()} == COMPLETENESS
    for code, wait in waits.items():
        assert told[code][1] == f"{wait:g} s"


def test_the_table_of_states_and_events() -> None:
    """Row by row as in `daemon/completeness.py`."""
    written = {row[0]: row[1:] for row in rows("When a stack is complete", 1)}
    assert list(written) == [event.value for event in Event]
    for event in Event:
        for state, cell in zip(State, written[event.value], strict=True):
            effect, then = TABLE[state, event]
            assert cell == (effect.value if effect is Effect.NOTHING else f"{effect.value} -> {then.value}")


def test_the_keys_of_a_rule() -> None:
    """With their help texts; the example on the page loads."""
    written = {row[0].strip("`"): row[1] for row in rows("Selection rules")}
    assert written == {f.name: f.metadata["help"] for f in dataclasses.fields(Rule)}
    example = re.search(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert example
    (rule,) = load_rules(tomllib.loads(example[1])["rules"])
    assert rule.name == "mprage_3t"
    assert f"`{DEFAULT_RULE.name}`" in PAGE


def test_the_refusals() -> None:
    """Every code with its sentence, and none beside them."""
    assert {row[0].strip("`"): row[1] for row in rows("Refusals")} == REFUSALS


def test_the_limits() -> None:
    """Numbers in the text are those of the code."""
    assert f"beyond {MAX_SIDE}," in PAGE
    assert f"{MAX_INSTANCE_BYTES >> 30} GiB of pixels" in PAGE
    assert f"{MAX_VOXELS // 1_000_000} million voxels" in PAGE
    assert f"more than {MAX_FRAMES} frames" in PAGE
    assert f"at most {LATE_LIMIT_S:g} s" in PAGE


@pytest.mark.parametrize(
    "module", ["volume", "decode", "header", "geometry", "rules", "series", "prepare", "flow", "judge"]
)
def test_every_code_that_is_told_stands_in_the_one_list(module: str) -> None:
    """No module invents a reason of its own."""
    source = (Path(__file__).parents[2] / "daemon" / f"{module}.py").read_text(encoding="utf-8")
    told = re.findall(r"""(?:Refusal|Reason|_reason)\(\s*["']([a-z_0-9]+)["']""", source)
    advice = {code for code in told if code.startswith("advice_")}
    assert set(told) - advice <= set(REASONS)


def test_the_advice_that_is_given_is_the_advice_of_the_one_list() -> None:
    """Word for word."""
    from daemon import judge

    given = [
        *judge.ADVICE.values(),
        judge.ADVICE_REPEAT,
        judge.ADVICE_LOOK,
        judge.ADVICE_SEND_ALL,
        judge.ADVICE_BY_HAND,
    ]
    assert {advice.code: advice.text for advice in given} == ADVICE
