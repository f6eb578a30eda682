"""The software bill of materials is that of the lock."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.serving import patience


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_the_bill_names_every_package_of_the_lock_with_version_and_hashes(tmp_path: Path, engine: str) -> None:
    """The command of `make sbom`: CycloneDX, valid, of exactly what a site installs."""
    if importlib.util.find_spec("cyclonedx_py") is None:
        pytest.skip("cyclonedx-bom is not installed (PyPI package cyclonedx-bom)")
    recipe = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text(encoding="utf-8"))
    found = re.search(r"^\t@\$\(BIN\)/cyclonedx-py (.+) -o (\S+) 2>/dev/null$", recipe, flags=re.MULTILINE)
    assert found
    out = tmp_path / "bill.json"
    words = found[1].replace("$(ENGINE)", engine).split()
    done = subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", *words, "-o", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads(out.read_text(encoding="utf-8"))
    lock = (ROOT / "locks" / f"{engine}.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", lock, flags=re.MULTILINE))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "rescan"
    assert {(c["name"], c["version"]) for c in bill["components"]} == pinned
    hashes = {h["content"] for c in bill["components"] for r in c["externalReferences"] for h in r.get("hashes", [])}
    assert hashes == set(re.findall(r"--hash=sha256:([0-9a-f]{64})", lock))
