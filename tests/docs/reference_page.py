"""The page of names, made from the code: `python -m tests.docs.reference_page > docs/reference.md`."""

from __future__ import annotations

from daemon.__main__ import COMMANDS
from daemon.audit import Kind
from daemon.log import FIELDS, Event
from daemon.metrics import METRICS
from daemon.reasons import ADVICE, COMPLETENESS, VERDICT_REASONS

HEAD = """\
# Every name

Commands, metrics, reasons and log events, made from the code; a test keeps page and program equal. The settings have
[a page of their own](settings.md), DICOM statuses stand in [DICOM conformance](dicom-conformance.md), events in [events](events.md).
"""

COMMAND_TEXT = """
## Commands

`rescan COMMAND --help` has examples. Exit status: 0 done, 1 failed, 2 misuse or settings that cannot be used.

| command | what it does |
|---|---|
"""

METRIC_TEXT = """
## Metrics

At `/metrics`, prefix `rescan_`. Labels hold what the configuration and the code list, never what the network says: a caller without an
entry is `unknown`. Twenty scanners make fewer than five thousand series. Counters that a rule watches begin at zero, because Prometheus sees
no increase in a counter whose first value is one.

| metric | kind | labels | what it is |
|---|---|---|---|
"""

REASON_TEXT = """
## Reasons

Why a series cannot be judged stands in [DICOM conformance](dicom-conformance.md).
"""


def table(rows: dict[str, str]) -> str:
    return "\n".join(f"| `{name}` | {text} |" for name, text in rows.items())


def page() -> str:
    metrics = "\n".join(
        f"| `rescan_{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |"
        for m in METRICS
    )
    return "".join(
        [
            HEAD,
            COMMAND_TEXT,
            table({f"rescan {name}": text for name, (_, text) in COMMANDS.items()}),
            "\n",
            METRIC_TEXT,
            metrics,
            "\n",
            REASON_TEXT,
            "\n### Why a verdict is what it is\n\n| code | sentence |\n|---|---|\n",
            table(VERDICT_REASONS),
            "\n\n### What to do\n\n| code | sentence |\n|---|---|\n",
            table(ADVICE),
            "\n\n### Why a series was called complete\n\n| code | meaning |\n|---|---|\n",
            table(COMPLETENESS),
            "\n\n## The log\n\nOne line for each thing that happened, `time=... event=...`, with fields from a fixed list; none holds patient data.\n\n",
            f"Events: {', '.join(f'`{event}`' for event in Event)}.\n\n",
            f"Fields: {', '.join(f'`{name}`' for name in sorted(FIELDS))}.\n\n",
            f"## The audit\n\nKinds of entries in `audit.jsonl`: {', '.join(f'`{kind}`' for kind in Kind)}.\n\n",
            "Research and quality-assurance software. Not a medical device.\n",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
