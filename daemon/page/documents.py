"""The page's documents and files: read once from the package, with the few blanks that a document has."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daemon import NOTICE

_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}


@dataclass(frozen=True)
class Asset:
    """One file of the page, as sent."""

    body: bytes
    media_type: str
    tag: str


async def static(request: Request) -> Response:
    """One file of the page; the browser asks again each time and is told when nothing changed."""
    asset = _assets().get(request.path_params["name"])
    if asset is None or asset.media_type == "text/html":
        return JSONResponse({"error": "No such file."}, status_code=404)
    headers = {"etag": asset.tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.media_type, headers=headers)


@cache
def _assets() -> Mapping[str, Asset]:
    found = {}
    for file in resources.files("daemon.page").joinpath("static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            body = file.read_bytes()
            found[file.name] = Asset(body, _TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


@cache
def build() -> str:
    """A word that changes with any file of the page: an older page reloads itself."""
    tags = "".join(f"{name}{asset.tag}" for name, asset in sorted(_assets().items()))
    return hashlib.sha256(tags.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class View:
    """One of the page's views.

    Attributes:
        file: its document.
        name: in the navigation of the others.
        heading: in the top line; "" where the page itself writes it.
    """

    file: str
    name: str
    heading: str


VIEWS = {
    "/": View("index.html", "Scanners", ""),
    "/physicist": View("physicist.html", "Physicist", "History and trends"),
}


def view_document(path: str) -> Response:
    """One view with the top line that all views share."""
    view = VIEWS[path]
    links = "".join(f'<a href="{other}">{each.name}</a>' for other, each in VIEWS.items() if other != path)
    now = f'<h1 class="room">{view.heading}</h1>' if view.heading else ""
    top = _assets()["top.html"].body.decode().replace("{{now}}", now).replace("{{views}}", links)
    return _filled(_assets()[view.file].body.decode().replace("{{top}}", top), {}, 200)


def document(name: str, message: str = "", target: str = "/", status: int = 200) -> Response:
    """One HTML file that is no view, with its few blanks filled."""
    return _filled(_assets()[name].body.decode(), {"message": message, "target": target}, status)


def _filled(text: str, blanks: Mapping[str, str], status: int) -> Response:
    for blank, value in {"notice": NOTICE, "build": build(), **blanks}.items():
        text = text.replace(f"{{{{{blank}}}}}", html.escape(value, quote=True))
    return Response(text, status_code=status, media_type="text/html")
