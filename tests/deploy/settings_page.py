"""The page of all settings, made from the settings themselves: `python -m tests.deploy.settings_page > docs/settings.md`."""

from __future__ import annotations

import dataclasses
import json

from daemon.config import Described, describe
from daemon.config_command import plain
from daemon.rules import Rule

HEAD = """\
# Every setting

Made from the settings themselves; a test keeps page and program equal. [deploy/rescan.example.toml](../deploy/rescan.example.toml)
is a file to begin with, [deploy/rescan.schema.json](../deploy/rescan.schema.json) its JSON Schema for editors. A setting may stand in
the file or be given as a flag of `rescan serve`, which wins; `rescan config --config FILE` shows what is in force and where it
comes from. The end of a name is its unit: `_s` seconds, `_bytes` bytes.

*live*: taken by SIGHUP (`systemctl reload rescan`), all of them or none; a change of any other setting needs a restart.

The page's token is the one secret: in the file that `http.token_file` names, or in the environment as `RESCAN_PAGE_TOKEN`. Neither
`rescan config`, `rescan doctor`, the log nor the audit shows it.

| setting | default | range | live | what it is |
|---|---|---|---|---|
"""

RULES = """
## The keys of a rule

Rules stand in the order of the file, the first that admits a series wins ([how far to trust it](physicist.md)).

| key | default | what it is |
|---|---|---|
"""


def row(d: Described) -> str:
    bounds = " | ".join(d.choices).replace("|", "\\|") or _range(d)
    default = "" if d.default is None or d.path == "state" else f"`{json.dumps(plain(d.default))}`"
    return f"| `{d.path}` | {default} | {bounds} | {'live' if d.live else ''} | {d.help} |"


def _range(d: Described) -> str:
    if d.low is None and d.high is None:
        return ""
    low, high = (None if bound is None else f"{bound:.10g}" for bound in (d.low, d.high))
    return f"from {low}" if high is None else f"up to {high}" if low is None else f"{low} to {high}"


def rule_row(f: dataclasses.Field[object]) -> str:
    default = f.default_factory() if callable(f.default_factory) else f.default
    shown = "" if default is None else f"`{json.dumps(plain(default))}`"
    return f"| `{f.name}` | {shown} | {str(f.metadata['help']).replace('|', chr(92) + '|')} |"


def page() -> str:
    settings = "\n".join(map(row, describe()))
    rules = "\n".join(map(rule_row, dataclasses.fields(Rule)))
    return f"{HEAD}{settings}\n{RULES}{rules}\n\nResearch and quality-assurance software. Not a medical device.\n"


if __name__ == "__main__":
    print(page(), end="")
