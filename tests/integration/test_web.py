"""The HTTP door, over real sockets."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from daemon.config import HttpSettings
from daemon.metrics import Metrics
from daemon.web import Probes, Web, listen, make_app


@dataclass
class Site:
    age_s: float = 0.0
    reasons: list[str] = field(default_factory=list)
    url: str = ""

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def site() -> Iterator[Site]:
    site, metrics = Site(), Metrics()
    probes = Probes(lambda: site.age_s, lambda: site.reasons, metrics.scrape)
    web = Web(HttpSettings(port=0), make_app(probes))
    site.url = f"http://127.0.0.1:{web.port}"
    web.start()
    yield site
    web.stop()


def test_livez_follows_the_main_loop(site: Site) -> None:
    """A main loop that hangs is not alive."""
    assert site.get("/livez") == (200, "ok\n")
    site.age_s = 6.0
    assert site.get("/livez")[0] == 503


def test_readyz_gives_the_reasons(site: Site) -> None:
    """503 with every reason, 200 without one."""
    site.reasons = ["the model is being loaded and checked"]
    status, body = site.get("/readyz")
    assert (status, json.loads(body)) == (503, {"ready": False, "reasons": site.reasons})
    site.reasons = []
    assert site.get("/readyz")[0] == 200


def test_metrics_are_prometheus_text(site: Site) -> None:
    """Every name carries the prefix."""
    status, body = site.get("/metrics")
    assert status == 200
    assert all(line.startswith(("#", "rescan_")) for line in body.splitlines())


def test_a_taken_port_is_named() -> None:
    """The error says which address, and what to do."""
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with taken, pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*choose another or 0"):
        listen("127.0.0.1", port)
