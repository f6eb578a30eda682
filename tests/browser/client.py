"""A client that calls the page's routes in this process, without a socket."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
from starlette.applications import Starlette

from daemon.page.guard import Access
from daemon.page.routes import routes
from daemon.page.store import PageStore


class PageClient:
    """Keeps cookies from call to call; follows no redirection."""

    def __init__(self, store: PageStore, access: Access | None = None, base_url: str = "http://localhost") -> None:
        self._transport = httpx.ASGITransport(Starlette(routes=routes(store, access)))
        self._base_url = base_url
        self._cookies = httpx.Cookies()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=self._transport, base_url=self._base_url, cookies=self._cookies
            ) as client:
                answer = await client.request(method, path, **options)
                self._cookies = client.cookies
                return answer

        return anyio.run(call)
