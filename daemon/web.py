"""The HTTP door: probes, metrics, and the page, on one port in a thread of the main process."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from daemon.config import ConfigError, HttpSettings

ALIVE_WITHIN_S = 5.0
"""A main loop that has not turned for so long is not alive."""

MAX_CONNECTIONS = 256
"""Open connections, from everywhere together; one more is closed at once."""

FIRST_REQUEST_S = 10.0
"""A connection that has not sent a whole request for so long is closed."""

MAX_FILES = 65_536
"""Files and connections that this process may hold open, where the system lets it."""

_STOP_LIMIT_S = 3.0


@dataclass(frozen=True)
class Probes:
    """What the probes answer from; each is called from the HTTP thread.

    Attributes:
        age_s: seconds since the main loop last turned.
        not_ready: why no verdict would come now; empty when ready.
        scrape: the metrics as text.
    """

    age_s: Callable[[], float]
    not_ready: Callable[[], Sequence[str]]
    scrape: Callable[[], bytes]


def make_app(probes: Probes, page: Sequence[BaseRoute] = ()) -> Starlette:
    """The whole site."""

    def livez(_: Request) -> Response:
        age = probes.age_s()
        if age > ALIVE_WITHIN_S:
            return PlainTextResponse(f"the main loop has not turned for {age:.0f} s\n", 503)
        return PlainTextResponse("ok\n")

    def readyz(_: Request) -> Response:
        reasons = list(probes.not_ready())
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    def metrics(_: Request) -> Response:
        return Response(probes.scrape(), media_type=CONTENT_TYPE_LATEST)

    probe_routes = [Route(f"/{f.__name__}", f) for f in (livez, readyz, metrics)]
    return Starlette(routes=[*probe_routes, *page])


class Door(H11Protocol):
    """One connection: refused where too many are open, closed where it holds the door and says nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, or close it."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
        else:
            self.loop.call_later(FIRST_REQUEST_S, self._close_silent)

    def _close_silent(self) -> None:
        if getattr(self, "cycle", None) is None:  # declared as if it were always there
            self.transport.close()


class Web:
    """The running site."""

    def __init__(self, settings: HttpSettings, app: Starlette) -> None:
        """Take the port; nothing is answered before `start`.

        Raises:
            OSError: the port cannot be had; the message names it.
            ConfigError: the certificate or its key cannot be used.
        """
        tls = tls_context(settings)
        _allow_many_files()
        self._socket = listen(settings.host, settings.port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=Door,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )

    def start(self) -> None:
        """Answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(_STOP_LIMIT_S)
        self._socket.close()


def tls_context(settings: HttpSettings) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with this certificate; None where none is set.

    Raises:
        ConfigError: the certificate or its key cannot be used; the message is one line.
    """
    if settings.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"http.tls_certificate: {settings.tls_certificate} and its key cannot be used ({error.strerror or error}); "
            "give a certificate and the unencrypted key that belongs to it, both in PEM form"
        ) from None
    return context


def _allow_many_files() -> None:
    """Whoever opens many connections must not keep the main loop from opening its files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        OSError: the address is taken or not this machine's; the message names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port} ({error.strerror}); choose another or 0") from None
    return made
