"""What a stranger may try against the page, over real sockets: the answer is a word, and the page lives on."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import pictures
from daemon.config import Settings
from daemon.ledger import Ledger
from daemon.page.routes import MAX_VIEWERS
from daemon.page_store import Board, Store, pictures_folder
from tests.browser.browsing import served
from tests.browser.memory_store import MemoryStore
from tests.browser.phantom import head_pictures
from tests.event_builders import result
from tests.serving import patience

LIVE = b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
SECRET = "what lies beside the pictures"


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def viewer(address: str) -> tuple[socket.socket, bytes]:
    """A connection that asked for the live stream, and the first words of the answer."""
    made = socket.create_connection(("127.0.0.1", port_of(address)), timeout=patience(30))
    made.sendall(LIVE)
    return made, made.recv(12)


def get(address: str, path: str) -> tuple[int, bytes]:
    """One request whose path goes over the wire as it is."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=patience(30))) as asking:
        asking.putrequest("GET", path, skip_host=True)
        asking.putheader("Host", "localhost")
        asking.endheaders()
        answer = asking.getresponse()
        return answer.status, answer.read()


def test_more_viewers_than_there_is_room_for_are_told_so() -> None:
    """All at once: as many as may are served, the others get 503, and when they leave there is room again."""
    with served(MemoryStore("mr1")) as address, contextlib.ExitStack() as opened:
        sockets = [
            opened.enter_context(socket.create_connection(("127.0.0.1", port_of(address)), timeout=patience(30)))
            for _ in range(MAX_VIEWERS + 100)
        ]
        for each in sockets:
            each.sendall(LIVE)
        first_words = [each.recv(12) for each in sockets]
        assert first_words.count(b"HTTP/1.1 200") == MAX_VIEWERS
        assert first_words.count(b"HTTP/1.1 503") == 100
        assert get(address, "/api/state")[0] == 200
        opened.close()
        for _ in range(1000):
            again, words = viewer(address)
            again.close()
            if words == b"HTTP/1.1 200":
                break
        assert words == b"HTTP/1.1 200"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The page over a real state folder with one result and its pictures; its address and the result's id."""
    settings = Settings(state=tmp_path)
    (tmp_path / "site.key").write_text(SECRET)
    (tmp_path / "pictures.json").write_text(SECRET)
    (tmp_path / "a.png").write_text(SECRET)
    with contextlib.closing(Ledger(tmp_path / "ledger.db")) as ledger:
        told = result("a") | {"pictures": "drawn"}
        ledger.record(told)
        pictures.write(head_pictures(), pictures_folder(settings), "drawn")
        store = Store(lambda: settings, ledger, Board(), lambda: 0.0, list, lambda: None)
        with served(store) as address:
            yield address, told["id"]


def test_no_path_leads_out_of_the_pictures(site: tuple[str, str]) -> None:
    """Plain, encoded, twice encoded, absolute, with a zero byte, over-long UTF-8: nothing but the picture itself."""
    address, drawn = site
    assert get(address, f"/pictures/{drawn}/axial.png")[1].startswith(b"\x89PNG")
    for path in (
        f"/pictures/{drawn}/pictures.json",
        f"/pictures/{drawn}/../../site.key",
        f"/pictures/{drawn}/..%2f..%2fsite.key",
        f"/pictures/{drawn}/%252e%252e%252fsite.key",
        f"/pictures/{drawn}/..%c0%af..%c0%afa.png",
        f"/pictures/{drawn}/..%5c..%5ca.png",
        f"/pictures/{drawn}/..%2f..%2fa.png",
        f"/pictures/{drawn}/axial.png%00.json",
        f"/pictures/{drawn}//etc/passwd",
        f"/pictures/{drawn}",
        "/pictures/drawn/axial.png",
        "/pictures/../site.key",
        "/pictures/..%2f/a.png",
        "/pictures/%2e%2e/a.png",
        "/pictures/././a.png",
        "/static/../../store.py",
        "/static/..%2f..%2fstore.py",
        "/static/%2e%2e%2f__init__.py",
        "/static/.",
        "/export/..%2f..%2fledger.db",
        "/export/verdicts.csv%2f..%2f..%2fsite.key",
        "//etc/passwd",
    ):
        status, body = get(address, path)
        assert status == 404, path
        assert SECRET.encode() not in body
        assert b"import" not in body


def test_strange_addresses_are_answered(site: tuple[str, str]) -> None:
    """Long, broken and hostile queries filter to nothing or are refused; none is an error of the server."""
    address, _ = site
    for path in (
        "/api/history?scanner=" + "x" * 8000,
        "/api/history?verdict=%27%20OR%201%3D1%20--&scanner=%00&protocol=%ff%fe",
        "/api/history?since=-1e308&until=1e308&limit=-5",
        "/api/history?limit=99999999999999999999999",
        "/api/history?" + "&".join(f"a{n}=1" for n in range(1500)),
        "/api/trends?metric=__class__",
        "/api/results/" + "x" * 5000,
        "/export/verdicts.csv?scanner=%27;DROP%20TABLE%20result;--",
        "/login?next=//evil.example",
    ):
        assert get(address, path)[0] in {200, 303, 400, 404}, path[:80]
    assert get(address, "/api/history")[0] == 200
