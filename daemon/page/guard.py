"""Who may see the page, and what a browser may do with it.

On loopback the machine's own users may look. Off loopback a token is asked for once, over TLS, and a signed cookie stands for
it afterwards. Every answer carries the same security headers; every change needs a proof that it comes from this page.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon.config import TOKEN_VARIABLE, ConfigError, HttpSettings, is_loopback
from daemon.page.documents import VIEWS

MIN_TOKEN_LENGTH = 16
SESSION_S = 30 * 86400
"""A kiosk stays logged in for this long. A changed token ends every session at once."""

TRIES, TRIES_WINDOW_S = 10, 60.0
"""Wrong tokens per minute, from everywhere together, after which the login says: wait."""

CSRF_HEADER = "x-rescan-csrf"

SECURITY_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}

_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_OPEN_PATHS = ("/login", "/static/")


@dataclass(frozen=True)
class Access:
    """How the page is protected.

    Attributes:
        token: what a person must know; "" where none is asked for (loopback only).
        encrypted: the browser's connection is TLS, ours or a proxy's; cookies are then `Secure`.
        secret: key of the anti-forgery words, new in every process.
    """

    token: str
    encrypted: bool
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    @staticmethod
    def from_settings(http: HttpSettings) -> Access:
        """Read the token and refuse a door that would send it in the clear.

        Raises:
            ConfigError: off loopback without a token or TLS, or a token that cannot be used; the message is one line.
        """
        encrypted = http.tls_at_proxy or http.tls_certificate is not None
        if not is_loopback(http.host):
            if http.token_file is None and not os.environ.get(TOKEN_VARIABLE):
                raise ConfigError(f"http.host: {http.host} is reachable from the network; set http.token_file")
            if not encrypted:
                raise ConfigError(
                    f"http.host: {http.host} is reachable from the network and the token would be sent in the clear; "
                    "set http.tls_certificate and http.tls_key, or http.tls_at_proxy = true behind a proxy that ends TLS"
                )
        return Access(token=_read_token(http), encrypted=encrypted)

    @property
    def cookie_name(self) -> str:
        """The `__Host-` prefix binds the cookie to this host and to TLS."""
        return "__Host-rescan" if self.encrypted else "rescan"

    def opens(self, offered: str) -> bool:
        """Whether this is the token; compared in constant time."""
        return bool(self.token) and hmac.compare_digest(_digest(offered), _digest(self.token))

    def new_session(self, now: float) -> str:
        """A cookie value that stands for the token until it expires; it survives a restart of the daemon."""
        expires = str(int(now + SESSION_S))
        return f"{expires}.{self._sign(expires)}"

    def session_is_good(self, value: str, now: float) -> bool:
        """Whether a cookie value was made here, for this token, and has not expired."""
        expires, _, signature = value.partition(".")
        if not expires.isascii() or not expires.isdecimal() or len(expires) > 12:
            return False
        return hmac.compare_digest(signature.encode(), self._sign(expires).encode()) and now < int(expires)

    def csrf(self, session: str) -> str:
        """The word that a change must carry: bound to this process and this session."""
        return hmac.new(self.secret, b"csrf:" + session.encode(), hashlib.sha256).hexdigest()

    def _sign(self, text: str) -> str:
        key = hashlib.sha256(b"rescan page session\0" + self.token.encode()).digest()
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read_token(http: HttpSettings) -> str:
    """The token: from the file, else from the environment, else none ("").

    Raises:
        ConfigError: it cannot be read or is too short; the message never shows it.
    """
    name = "http.token_file"
    if http.token_file is None:
        token, name = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token:
            return ""
    else:
        try:
            token = http.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot read {http.token_file} ({error}); write the token there") from None
    if len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(
            f"{name}: the token has {len(token)} characters; use at least {MIN_TOKEN_LENGTH}, "
            "such as from `openssl rand -hex 24`"
        )
    return token


class Tries:
    """Counts wrong tokens within a window; the clock is passed in."""

    def __init__(self) -> None:
        """Start with none."""
        self._wrong: deque[float] = deque(maxlen=TRIES)

    def blocked(self, now: float) -> bool:
        """Whether so many wrong ones came of late that the next must wait."""
        return len(self._wrong) == TRIES and now - self._wrong[0] < TRIES_WINDOW_S

    def wrong(self, now: float) -> None:
        """Remember one."""
        self._wrong.append(now)


class Guard:
    """ASGI middleware: host, session and forgery checks before the page; security headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        """Stand in front of `app`."""
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or let through with headers added."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message))
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _add_headers(self, headers: MutableHeaders) -> None:
        for name, value in SECURITY_HEADERS.items():
            headers[name] = value
        headers.setdefault("cache-control", "no-store")
        if self.access.encrypted:
            headers["strict-transport-security"] = "max-age=31536000"

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass; None for one that may."""
        headers = Headers(scope=scope)
        if not self.access.token and not _names_this_machine(headers.get("host", "")):
            return _no(421, "This page answers to localhost only; open it as http://localhost.")
        path = _path(scope)
        if scope["method"] not in _SAFE_METHODS and not _comes_from_here(headers):
            return _no(403, "This request does not come from Rescan's page.")
        if any(path == p or (p.endswith("/") and path.startswith(p)) for p in _OPEN_PATHS):
            return None
        session = session_of(scope, self.access)
        if self.access.token and not self._is_known(headers, session):
            return _ask_to_log_in(path)
        return self._forgery(scope, headers, session)

    def _is_known(self, headers: Headers, session: str) -> bool:
        return self.access.session_is_good(session, time.time()) or self.access.opens(_bearer(headers))

    def _forgery(self, scope: Scope, headers: Headers, session: str) -> Response | None:
        if scope["method"] in _SAFE_METHODS or self.access.opens(_bearer(headers)):
            return None
        if hmac.compare_digest(headers.get(CSRF_HEADER, "").encode(), self.access.csrf(session).encode()):
            return None
        return _no(403, "The page is older than the daemon; it reloads by itself. Press again.")


def session_of(scope: Scope, access: Access) -> str:
    """The session cookie of a request; "" without one."""
    return HTTPConnection(scope).cookies.get(access.cookie_name, "")


def _path(scope: Scope) -> str:
    """The path inside the mount."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def _bearer(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _names_this_machine(host: str) -> bool:
    """Whether a Host header names loopback: a foreign name that resolves here is a rebinding attack."""
    try:
        name = urlsplit(f"//{host}").hostname
        return name == "localhost" or ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False


def _comes_from_here(headers: Headers) -> bool:
    """Whether the browser says that a change was started by this very page; programs without a browser say nothing."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host", "")
    except ValueError:
        return False


def _no(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status_code=status)


def _ask_to_log_in(path: str) -> Response:
    if path.startswith(("/api/", "/pictures/", "/export/")):
        return _no(401, "Log in first.")
    target = path if path in VIEWS else "/"
    return RedirectResponse(f"/login?next={quote(target)}", status_code=303)
