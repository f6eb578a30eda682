"""A real Chromium for tests, and the page behind a real socket. What is missing is said as the reason of a skip."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette

from daemon.page.guard import Access
from daemon.page.routes import routes
from daemon.page.store import PageStore
from daemon.web import listen

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = HERE / "node_modules" / "axe-core" / "axe.min.js"

CONSOLE = {"width": 1024, "height": 768}
PHONE = {"width": 390, "height": 844}
WIDE = {"width": 1920, "height": 1080}


@contextmanager
def launched() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian package chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (extra dev)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield chromium
        finally:
            chromium.close()


class Sight:
    """One tab, and everything that it complained about."""

    def __init__(self, browser: Any, viewport: dict[str, int] | None = None, **options: Any) -> None:
        self.context = browser.new_context(viewport=viewport or CONSOLE, locale="en-GB", **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _on_console(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.errors.append(f"{message.type}: {message.text}")

    def open(self, address: str) -> Any:
        """Go there and wait until the page is live."""
        self.page.goto(address)
        self.page.wait_for_selector("#live[data-state=live]")
        return self.page

    def violations(self) -> list[str]:
        """What axe-core finds serious or critical, as `rule: element`."""
        self.page.evaluate(axe_source())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((r) => r.violations)")
        return [
            f"{v['id']} ({v['impact']}): {node['html'][:160]} {node.get('failureSummary', '')[:200]}"
            for v in found
            if v["impact"] in {"serious", "critical"}
            for node in v["nodes"]
        ]

    def close(self) -> None:
        """Close the tab."""
        self.context.close()


def axe_source() -> str:
    """The accessibility checker from npm; the test is skipped where it cannot be installed."""
    if not AXE.is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed: no axe-core for the accessibility check (Debian package npm)")
        done = subprocess.run([npm, "ci"], cwd=HERE, capture_output=True, text=True, timeout=120)
        if done.returncode != 0 or not AXE.is_file():
            pytest.skip("axe-core cannot be installed from npm: no accessibility check")
    return AXE.read_text(encoding="utf-8")


@contextmanager
def served(store: PageStore, access: Access | None = None) -> Iterator[str]:
    """The page behind a socket of this machine; yields its address."""
    socket = listen("127.0.0.1", 0)
    port = socket.getsockname()[1]
    stopping = threading.Event()
    app = Starlette(routes=routes(store, access, stopping.is_set))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stopping.set()
        server.should_exit = True
        thread.join(5)
        socket.close()
