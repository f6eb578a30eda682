"""The HTTP door, over real sockets."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daemon.config import ConfigError, HttpSettings
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


def connect(site: Site) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(site.url.rsplit(":", 1)[1])), timeout=30)


def test_a_connection_that_says_nothing_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the door with half a request is shown out; others are answered meanwhile."""
    monkeypatch.setattr("daemon.web.FIRST_REQUEST_S", 0.2)
    with connect(site) as silent, connect(site) as slow:
        slow.sendall(b"GET /livez HT")
        assert site.get("/livez")[0] == 200
        assert silent.recv(1) == b""
        assert slow.recv(1) == b""


def test_too_many_connections_are_closed_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there is room again when one of them goes."""
    monkeypatch.setattr("daemon.web.MAX_CONNECTIONS", 3)
    held = [connect(site) for _ in range(3)]
    with connect(site) as one_more:
        assert one_more.recv(1) == b""
    for each in held:
        each.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert each.recv(12) == b"HTTP/1.1 200"
        each.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate for the TLS test")
    files = tmp_path / "page.crt", tmp_path / "page.key"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def test_the_site_is_served_over_tls(certificate: tuple[Path, Path]) -> None:
    """With the site's certificate, from version 1.2 on; a browser that speaks plainly gets nothing."""
    web = Web(
        HttpSettings(port=0, tls_certificate=certificate[0], tls_key=certificate[1]),
        make_app(Probes(lambda: 0.0, list, Metrics().scrape)),
    )
    web.start()
    try:
        trusting = ssl.create_default_context(cafile=certificate[0])
        with urllib.request.urlopen(f"https://127.0.0.1:{web.port}/livez", context=trusting, timeout=30) as answer:
            assert answer.status == 200
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert _handshake(web.port, trusting, version).startswith("TLSv1.")
        with socket.create_connection(("127.0.0.1", web.port), timeout=30) as plain:
            plain.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert not plain.recv(64).startswith(b"HTTP/")
    finally:
        web.stop()


def _handshake(port: int, context: ssl.SSLContext, version: ssl.TLSVersion) -> str:
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        cipher = wrapped.cipher()
        assert cipher is not None
        assert "GCM" in cipher[0] or "CHACHA20" in cipher[0]
        return wrapped.version() or ""


def test_a_certificate_that_cannot_be_used_is_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """At start, not in a thread that nobody hears."""
    strange = tmp_path / "strange.pem"
    strange.write_text("no certificate")
    for settings in (
        HttpSettings(port=0, tls_certificate=tmp_path / "none.crt", tls_key=certificate[1]),
        HttpSettings(port=0, tls_certificate=certificate[0], tls_key=strange),
    ):
        with pytest.raises(ConfigError, match=r"tls_certificate: .*PEM") as raised:
            Web(settings, make_app(Probes(lambda: 0.0, list, Metrics().scrape)))
        assert "\n" not in str(raised.value)
