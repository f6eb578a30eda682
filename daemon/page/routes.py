"""The page's addresses: two views, their files, the live stream, the history and the acknowledgement."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Receive, Scope, Send

from daemon import NOTICE
from daemon.alert import AckReason
from daemon.page.documents import VIEWS, build, document, static, view_document
from daemon.page.guard import SESSION_S, Access, Guard, Tries, session_of
from daemon.page.store import HistoryQuery, PageError, PageStore, Table
from daemon.page.trend import METRICS, trends
from daemon.words import ARTEFACTS, Verdict

log = logging.getLogger("rescan.page")

BEAT_S = 1.0
"""Seconds between signs of life on the live stream."""

LOOK_S = 0.2
"""Seconds between looks at the store: how late a change may be shown."""

MAX_VIEWERS = 64
MAX_BODY_BYTES = 4096
CHUNK_LINES = 200
MAX_NAME_LENGTH = 32

_OPAQUE = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_PICTURE_NAME = re.compile(r"[a-z]{1,16}(-[a-z_]{1,16})?\.png")


class Viewers:
    """Counts the open live streams."""

    def __init__(self) -> None:
        """Start with none."""
        self.count = 0

    def full(self) -> bool:
        """Whether one more would be too many."""
        return self.count >= MAX_VIEWERS


class LiveResponse(StreamingResponse):
    """A live stream, counted from the moment it is answered to its end, however it ends."""

    def __init__(self, content: AsyncIterator[str], viewers: Viewers) -> None:
        """Send `content` as server-sent events."""
        super().__init__(content, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._viewers = viewers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the content or the connection ends."""
        self._viewers.count += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._viewers.count -= 1


def routes(
    store: PageStore, access: Access | None = None, stopping: Callable[[], bool] = lambda: False
) -> list[BaseRoute]:
    """Everything below `/`; put it last, because it answers every path.

    Args:
        store: what to show.
        access: who may see it; None for anyone on this machine, and nobody else.
        stopping: whether the server is about to end; live streams then end by themselves.
    """
    page = Page(store, access or Access(token="", encrypted=False), stopping)
    inner = [
        Route("/", page.view("/")),
        Route("/physicist", page.view("/physicist")),
        Route("/static/{name}", static),
        Route("/login", page.login_form),
        Route("/login", page.log_in, methods=["POST"]),
        Route("/logout", page.log_out, methods=["POST"]),
        Route("/api/state", page.state),
        Route("/api/live", page.live),
        Route("/api/history", page.history),
        Route("/api/trends", page.trends),
        Route("/export/{table}.csv", page.export),
        Route("/api/results/{result_id}", page.result),
        Route("/api/alerts/{alert_id}/acknowledge", page.acknowledge, methods=["POST"]),
        Route("/api/alerts/{alert_id}/displayed", page.displayed, methods=["POST"]),
        Route("/api/scanners/{scanner}/score-now", page.score_now, methods=["POST"]),
        Route("/pictures/{result_id}/{name}", page.picture),
    ]
    # An application of its own, so that its "not found" passes the guard too.
    return [Mount("/", app=Starlette(routes=inner, middleware=[Middleware(Guard, access=page.access)]))]


class Page:
    """The handlers: each reads the store in a worker thread and answers."""

    def __init__(self, store: PageStore, access: Access, stopping: Callable[[], bool]) -> None:
        """Show `store` to those whom `access` lets in."""
        self.store = store
        self.access = access
        self._stopping = stopping
        self._tries = Tries()
        self._viewers = Viewers()
        self._shown: tuple[str, str] = ("", "")

    # --- documents ---------------------------------------------------------------------------------------------------

    def view(self, path: str) -> Any:
        """A handler that sends one view."""

        async def send(_: Request) -> Response:
            return view_document(path)

        return send

    async def login_form(self, request: Request) -> Response:
        """Ask for the token; straight on where none is needed."""
        if not self.access.token:
            return RedirectResponse("/", status_code=303)
        return document("login.html", target=_target(request.query_params.get("next", "/")))

    async def log_in(self, request: Request) -> Response:
        """Turn a token into a session cookie."""
        form = parse_qs((await _body(request)).decode(errors="replace"))
        target = _target(form.get("next", ["/"])[0])
        now = time.monotonic()
        if self._tries.blocked(now):
            return document("login.html", "Too many wrong tokens. Wait a minute.", target, status=429)
        if not self.access.opens(form.get("token", [""])[0].strip()):
            self._tries.wrong(now)
            log.warning("page login refused")
            return document("login.html", "That is not the token.", target, status=403)
        answer = RedirectResponse(target, status_code=303)
        answer.set_cookie(
            self.access.cookie_name,
            self.access.new_session(time.time()),
            max_age=SESSION_S,
            httponly=True,
            secure=self.access.encrypted,
            samesite="strict",
        )
        return answer

    async def log_out(self, _: Request) -> Response:
        """Forget the session in this browser."""
        answer = JSONResponse({"ok": True})
        answer.delete_cookie(self.access.cookie_name, httponly=True, secure=self.access.encrypted, samesite="strict")
        return answer

    # --- what is shown -----------------------------------------------------------------------------------------------

    async def state(self, request: Request) -> Response:
        """Everything that the technologist's view shows now."""
        version = await to_thread.run_sync(self.store.version)
        text = await to_thread.run_sync(self._state_json, version)
        return Response(self._personal(text, request), media_type="application/json")

    async def live(self, request: Request) -> Response:
        """The state whenever it changes, and a sign of life every second, as server-sent events."""
        if self._viewers.full():
            return JSONResponse({"error": f"{MAX_VIEWERS} pages are open already; close one."}, status_code=503)
        return LiveResponse(self._stream(request), self._viewers)

    async def _stream(self, request: Request) -> AsyncIterator[str]:
        sent, next_beat = "", 0.0
        while not self._stopping():
            version = await to_thread.run_sync(self.store.version)
            if version != sent:
                text = await to_thread.run_sync(self._state_json, version)
                yield f"event: state\ndata: {self._personal(text, request)}\n\n"
                sent = version
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                yield f"event: beat\ndata: {_json(await to_thread.run_sync(self._beat))}\n\n"
            await anyio.sleep(LOOK_S)

    def _beat(self) -> dict[str, Any]:
        return {
            "now": time.time(),
            "age_s": self.store.heartbeat_age_s(),
            "not_ready": list(self.store.not_ready()),
        }

    def _state_json(self, version: str) -> str:
        """The state without its personal end, kept until the version changes."""
        shown = self._shown
        if shown[0] != version:
            state = {
                **self._beat(),
                "build": build(),
                "notice": NOTICE,
                "scanners": [asdict(scanner) for scanner in self.store.scanners()],
            }
            shown = self._shown = (version, _json(state))
        return shown[1]

    def _personal(self, state: str, request: Request) -> str:
        """Add the anti-forgery word of this session."""
        word = self.access.csrf(session_of(request.scope, self.access))
        return f'{state[:-1]},"csrf":"{word}"}}'

    async def history(self, request: Request) -> Response:
        """Results by filter, and what there is to filter by."""
        query = _query(request)
        entries = await to_thread.run_sync(self.store.history, query)
        facets = await to_thread.run_sync(self.store.facets)
        return _answer(
            {
                "entries": [asdict(entry) for entry in entries],
                "scanners": facets.scanners,
                "protocols": facets.protocols,
                "verdicts": list(Verdict),
                "metrics": METRICS,
                "artefacts": ARTEFACTS,
            }
        )

    async def trends(self, request: Request) -> Response:
        """One chart per scanner and protocol."""
        query = _query(request)
        entries = await to_thread.run_sync(self.store.history, query)
        try:
            found = trends(entries, request.query_params.get("metric", "predicted_dice"))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return _answer({"trends": [asdict(trend) for trend in found]})

    async def export(self, request: Request) -> Response:
        """Verdicts, alerts or feedback by the same filters, as `rescan history` writes them."""
        try:
            table = Table(request.path_params["table"])
        except ValueError:
            return JSONResponse({"error": f"No such table; there are {', '.join(Table)}."}, status_code=404)
        lines = self.store.export(table, _query(request))
        headers = {"content-disposition": f'attachment; filename="rescan-{table}.csv"'}
        return StreamingResponse(_in_chunks(lines), media_type="text/csv", headers=headers)

    async def result(self, request: Request) -> Response:
        """Every number of one result."""
        entry = await to_thread.run_sync(self.store.entry, _opaque(request, "result_id"))
        if entry is None:
            return JSONResponse({"error": "No such result."}, status_code=404)
        return _answer(asdict(entry))

    async def picture(self, request: Request) -> Response:
        """One PNG; never kept by the browser."""
        name = request.path_params["name"]
        if not _PICTURE_NAME.fullmatch(name):
            return JSONResponse({"error": "No such picture."}, status_code=404)
        data = await to_thread.run_sync(self.store.picture, _opaque(request, "result_id"), name)
        if data is None:
            return JSONResponse({"error": "No such picture."}, status_code=404)
        return Response(data, media_type="image/png")

    # --- what is said back -------------------------------------------------------------------------------------------

    async def acknowledge(self, request: Request) -> Response:
        """A person has decided."""
        try:
            said = json.loads(await _body(request))
            reason, by = AckReason(said["reason"]), _name(said.get("by", ""))
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = ", ".join(AckReason)
            return JSONResponse({"error": f"Expected a reason, one of {wanted}, and by whom."}, status_code=400)
        return await self._say(self.store.acknowledge, _opaque(request, "alert_id"), reason, by)

    async def displayed(self, request: Request) -> Response:
        """A page shows this alert now."""
        return await self._say(self.store.displayed, _opaque(request, "alert_id"))

    async def score_now(self, request: Request) -> Response:
        """A person waits for the verdict of what this scanner is sending."""
        return await self._say(self.store.score_now, _opaque(request, "scanner"))

    async def _say(self, method: Any, *values: object) -> Response:
        try:
            await to_thread.run_sync(method, *values)
        except PageError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)
        return JSONResponse({"ok": True})


def _json(value: object) -> str:
    """Compact JSON without NaN: a number that is not one is an error here, not in the browser."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _answer(value: object) -> Response:
    return Response(_json(value), media_type="application/json")


def _in_chunks(lines: Iterator[str]) -> Iterator[str]:
    """The same text in pieces that are worth sending."""
    while piece := "".join(itertools.islice(lines, CHUNK_LINES)):
        yield piece


async def _body(request: Request) -> bytes:
    """The body, up to a small limit; the rest of a longer one is not read."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return b""
    return body


def _opaque(request: Request, name: str) -> str:
    """An identifier from the address; one that could be a path becomes a name that nothing has."""
    value = str(request.path_params[name])
    return value if _OPAQUE.fullmatch(value) and not value.startswith(".") else ""


def _name(value: object) -> str:
    """Who presses: printable, short; "page" where nobody said."""
    text = "".join(c for c in str(value) if c.isprintable()).strip()[:MAX_NAME_LENGTH]
    return text or "page"


def _target(value: str) -> str:
    """Where to go after the login: only to a view of this page."""
    return value if value in VIEWS else "/"


def _query(request: Request) -> HistoryQuery:
    """The filters of an address; what cannot be read filters nothing."""
    q = request.query_params
    limit = _number(q.get("limit", ""))
    return HistoryQuery(
        scanner=q.get("scanner", ""),
        protocol=q.get("protocol", ""),
        verdict=q.get("verdict", ""),
        since=_number(q.get("since", "")),
        until=_number(q.get("until", "")),
        limit=int(min(max(limit, 1), 5000)) if limit is not None else 500,
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
