"""A real Prometheus with the rules of this repository, scraping a daemon under test."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.serving import patience

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
LOOK_S = 0.3


class Prometheus:
    """One Prometheus that scrapes one target every second."""

    def __init__(self, folder: Path, port: int, target: int) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("prometheus is not installed (Debian package prometheus)")
        folder.mkdir(parents=True)
        rules = re.sub(r"^( +interval:) .*$", r"\1 1s", RULES.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (folder / "rules.yml").write_text(rules, encoding="utf-8")
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "rescan", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        self.url = f"http://127.0.0.1:{port}"
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> Prometheus:
        self.until(lambda: self._answers("/-/ready"))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an API path; a refused query fails with Prometheus' own words."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=patience(10)) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, query: str) -> list[float]:
        """The values of an instant query."""
        return [float(each["value"][1]) for each in self.get("query", query=query)["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that are pending or firing."""
        return {each["labels"]["alertname"] for each in self.get("alerts")["alerts"]}

    def until(self, holds: Callable[[], bool], limit_s: float = 90.0, what: str = "") -> None:
        """Wait until something holds, looking a few times a second."""
        assert self._process.poll() is None, "prometheus ended"
        until(holds, lambda: what, limit_s)


def until(holds: Callable[[], bool], what: Callable[[], str], limit_s: float = 30.0) -> None:
    """Wait until something holds, looking a few times a second; `what` tells the rest where it never does."""
    deadline, pause = time.monotonic() + patience(limit_s), threading.Event()
    while not holds():
        assert time.monotonic() < deadline, f"it never held: {what()}"
        pause.wait(LOOK_S)
