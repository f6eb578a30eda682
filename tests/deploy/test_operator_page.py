"""The operator page, followed word by word to a first verdict. Only folders and ports are this test's, and dependencies are shared."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.config import SHIPPED_MODEL
from tests.conftest import ROOT
from tests.deploy.watching import Prometheus
from tests.serving import Lines, fields, patience

PAGE = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
DOORS = ("11112", "8080", "5556", "5557")
NOT_HERE = ("useradd", "chown", "systemctl", "apt-get", "cp deploy/systemd")
"""What needs a service manager, another user or a package manager; the unit has tests of its own."""


def blocks() -> list[str]:
    """The commands of the page, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


class Followed:
    """A root of its own for /opt, /etc and /var, and what was said there."""

    def __init__(self, root: Path, ports: dict[str, str]) -> None:
        self.root, self.ports = root, ports
        for folder in ("opt", "etc/prometheus", "var/lib"):
            (root / folder).mkdir(parents=True)

    def here(self, text: str) -> str:
        for folder in ("/opt/rescan", "/etc/rescan", "/etc/prometheus", "/var/lib/rescan"):
            text = re.sub(rf"(?<![\w/]){folder}\b", f"{self.root}{folder}", text)
        for door, port in self.ports.items():
            text = re.sub(rf"\b{door}\b", port, text)
        return text

    def run(self, block: str) -> subprocess.CompletedProcess[str]:
        lines = [line for line in block.splitlines() if not line.startswith(NOT_HERE)]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here("\n".join(lines))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=patience(240),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"},
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
        return done


def install(followed: Followed, block: str) -> None:
    """The first step without the package index: an empty environment, the program itself, and the dependencies of this one."""
    assert "--require-hashes -r locks/build.txt -r locks/cpu.txt" in block
    lines = [line for line in block.splitlines() if "--require-hashes" not in line]
    lines[0] += (
        f"\necho {sysconfig.get_path('purelib')} > $(echo /opt/rescan/lib/python*/site-packages)/dependencies.pth"
    )
    lines = [line.replace("--no-deps", "--no-deps --ignore-installed") for line in lines]
    followed.run("\n".join(lines))


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Followed, Lines]]:
    """Steps 1 to 3, and the daemon of step 4 until it is ready."""
    if not SHIPPED_MODEL.is_file():
        pytest.skip("no student ships with this checkout")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in DOORS]
    ports = {door: str(each.getsockname()[1]) for door, each in zip(DOORS, sockets, strict=True)}
    for each in sockets:
        each.close()
    made = Followed(tmp_path_factory.mktemp("site"), ports)
    steps = blocks()
    install(made, steps[0])
    made.run(steps[1])
    file = made.root / "etc/rescan/rescan.toml"
    file.write_text(made.here(file.read_text(encoding="utf-8")), encoding="utf-8")
    made.run(steps[2])
    command = made.here(steps[3]).split()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = Lines()
    reading = threading.Thread(target=log.read, args=(process.stderr,), daemon=True)
    reading.start()
    try:
        log.wait(lambda f: f.get("event") == "ready", limit_s=120)
        yield made, log
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(patience(40)) == 0
        reading.join(5)
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
def test_the_page_leads_to_a_first_verdict(followed: tuple[Followed, Lines]) -> None:
    """Ready, a head is pushed, the subscriber shows it, the audit says what was in force."""
    made, log = followed
    done = made.run(blocks()[4])
    assert '"ready":true' in done.stdout
    assert "simulator" in done.stdout
    assert "the chain holds" in done.stderr
    line = log.wait(lambda f: f.get("event") == "series")
    assert line["scanner"] == "simulator"
    assert line["verdict"] in {"PASS", "REVIEW", "RESCAN", "CANNOT_JUDGE"}
    assert [f for f in map(fields, log.all) if f.get("level") == "error"] == []


@pytest.mark.slow
def test_prometheus_scrapes_it_with_the_rules_loaded(followed: tuple[Followed, Lines], tmp_path: Path) -> None:
    """Step 6: the copied configuration is accepted, the target is up, every rule is there."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    made, _ = followed
    assert "SUCCESS" in made.run(blocks()[6]).stdout
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Prometheus(tmp_path / "prometheus", port, int(made.ports["8080"])) as prometheus:
        prometheus.until(lambda: prometheus.values('up{job="rescan"}') == [1.0])
        prometheus.until(lambda: prometheus.values("rescan_ready") == [1.0])
        loaded = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    assert {"RescanDown", "RescanClockSkew"} <= loaded


def test_the_steps_are_those_that_this_test_follows() -> None:
    """A step more on the page is a step more here."""
    assert len(blocks()) == 7
    assert sys.version_info >= (3, 11)
