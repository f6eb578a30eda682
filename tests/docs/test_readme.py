"""What the documentation names exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from daemon import NOTICE
from daemon.__main__ import COMMANDS
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link inside the repository leads to a file that is there."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    """Every `rescan COMMAND` that a page shows is a command."""
    shown = re.findall(r"(?:^|`|/)rescan ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(shown) <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    """Every `make TARGET` that a page shows is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(shown) <= targets


def test_every_page_is_in_the_index() -> None:
    """No page is written that nobody finds."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [page for page in sorted(pages) if f"({page})" not in index] == []


def test_readme_begins_with_what_matters() -> None:
    """What it is for, the notice and the two commands come before anything else."""
    head = README[: README.index("## How it works")]
    assert "Not a medical device" in head
    assert all(part in re.sub(r"[>\s]+", " ", head) for part in re.split(r"(?<=[.:]) ", NOTICE)[3:])
    assert "make demo" in head
    assert "make test" in head


def test_every_command_is_in_the_changelog() -> None:
    """A new command is told to sites."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"`{command}`" not in text and f"`rescan {command}`" not in text] == []


def test_no_machine_paths() -> None:
    """No tracked text names a folder of one developer's machine or a package index."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    private = re.compile(
        r"/work/(?:main|shared)|/home/[a-z]+/|/root/|/tmp/[a-z]+/[a-z]|files\.pythonhosted|pypi\.org/simple"
    )
    texts = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".js", ".html", ".css", ".service", ".cfg", ""}
    found = []
    for line in listed.stdout.splitlines():
        path = ROOT / line
        if path.suffix in texts and path.is_file() and path != Path(__file__):
            hit = private.search(path.read_text(encoding="utf-8", errors="replace"))
            found += [f"{line}: {hit.group()}"] if hit else []
    assert found == []
