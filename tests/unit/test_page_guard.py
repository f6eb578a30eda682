"""Who may see the page: token, cookie, forgery, rebinding, headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.config import ConfigError, HttpSettings
from daemon.page.guard import SESSION_S, TRIES, Access
from tests.browser.client import PageClient
from tests.browser.memory_store import MemoryStore, make_result

TOKEN = "correct horse battery staple"


def open_page(token: str = "", base: str = "http://localhost", store: MemoryStore | None = None) -> PageClient:
    access = Access(token=token, encrypted=base.startswith("https"))
    return PageClient(store or MemoryStore("mr1"), access, base)


def log_in(client: PageClient, token: str = TOKEN) -> int:
    return client.post("/login", data={"token": token, "next": "/physicist"}).status_code


def test_loopback_needs_no_token() -> None:
    """On this machine the page opens at once."""
    assert open_page().get("/").status_code == 200


def test_a_foreign_name_for_this_machine_is_refused() -> None:
    """A host name that merely resolves here gets nothing: DNS rebinding."""
    assert open_page(base="http://evil.example").get("/api/state").status_code == 421
    assert open_page(base="http://127.0.0.1:8080").get("/api/state").status_code == 200
    assert open_page(base="http://[::1]:8080").get("/api/state").status_code == 200


@pytest.mark.parametrize("name", ["", "[", "[::1", "localhost.evil.example", "127.0.0.1.evil.example", "\xff"])
def test_a_strange_host_name_is_refused_with_a_word(name: str) -> None:
    """Whatever stands in the header, nothing breaks and nothing is told."""
    answer = open_page().get("/api/state", headers={"Host": name.encode("latin-1")})
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "path",
    ["/", "/physicist", "/api/state", "/api/live", "/api/history", "/export/alerts.csv", "/pictures/a/axial.png"],
)
def test_with_a_token_nothing_is_told_to_strangers(path: str) -> None:
    """Views lead to the login, data answers 401."""
    answer = open_page(TOKEN, "https://qa.example").get(path)
    assert answer.status_code in {303, 401}
    assert "mr1" not in answer.text.lower()


def test_the_token_opens_the_page_and_the_cookie_keeps_it_open() -> None:
    """After the login the cookie alone is enough, and it cannot be read by scripts or sent by other sites."""
    client = open_page(TOKEN, "https://qa.example")
    answer = client.post("/login", data={"token": TOKEN, "next": "/physicist"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/physicist")
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith("__host-rescan=")
    assert all(word in cookie for word in ("httponly", "secure", "samesite=strict", "path=/"))
    assert client.get("/api/state").status_code == 200


def test_a_wrong_token_opens_nothing_and_many_must_wait() -> None:
    """The eleventh wrong token within a minute is not even looked at, nor is the right one then."""
    client = open_page(TOKEN, "https://qa.example")
    assert [log_in(client, "wrong") for _ in range(TRIES)] == [403] * TRIES
    assert log_in(client) == 429
    assert client.get("/api/state").status_code == 401


def test_the_login_never_leads_to_another_site() -> None:
    """Only the two views are targets."""
    client = open_page(TOKEN, "https://qa.example")
    answer = client.post("/login", data={"token": TOKEN, "next": "https://evil.example/"})
    assert answer.headers["location"] == "/"


def test_a_session_expires_and_cannot_be_made_up() -> None:
    """A cookie is good until its time, for its own token alone, and not when a digit of it changes."""
    access = Access(TOKEN, True)
    cookie = access.new_session(1000.0)
    assert access.session_is_good(cookie, 1000.0 + SESSION_S - 1)
    assert not access.session_is_good(cookie, 1000.0 + SESSION_S)
    assert not access.session_is_good("9" + cookie, 1000.0)
    assert not Access(TOKEN + "!", True).session_is_good(cookie, 1000.0)
    for value in ("", ".", "x.y", "٣.x", "1e9.x"):
        assert not access.session_is_good(value, 0.0)


def test_a_session_survives_a_restart_of_the_daemon() -> None:
    """A second process with the same token accepts the first one's cookie."""
    assert Access(TOKEN, True).session_is_good(Access(TOKEN, True).new_session(1000.0), 1001.0)


def post_ack(client: PageClient, headers: dict[str, str]) -> int:
    return client.post(
        "/api/alerts/alert-1/acknowledge", json={"reason": "wrong", "by": "AB"}, headers=headers
    ).status_code


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-rescan-csrf": "0" * 64},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
def test_another_site_cannot_acknowledge(headers: dict[str, str]) -> None:
    """Without the page's own word, or from elsewhere even with it, nothing is recorded."""
    store = MemoryStore("mr1")
    store.add(make_result("RESCAN"), 1, alert="raised")
    client = open_page(store=store)
    csrf = client.get("/api/state").json()["csrf"]
    word = {} if not headers or "x-rescan-csrf" in headers else {"x-rescan-csrf": csrf}
    assert post_ack(client, {**word, **headers}) == 403
    assert store.acknowledged == []
    assert post_ack(client, {"x-rescan-csrf": csrf, "sec-fetch-site": "same-origin"}) == 200


@pytest.mark.parametrize("origin", ["http://[", "null", "http://evil.example", "\xff"])
def test_a_strange_origin_is_refused_with_a_word(origin: str) -> None:
    """A change whose origin cannot be read does not come from this page."""
    answer = open_page().post("/api/scanners/mr1/score-now", headers={"Origin": origin.encode("latin-1")})
    assert answer.status_code == 403


def test_programs_may_use_the_token_as_bearer() -> None:
    """A script with the token needs neither cookie nor word."""
    store = MemoryStore("mr1")
    store.add(make_result("RESCAN"), 1, alert="raised")
    client = open_page(TOKEN, "https://qa.example", store)
    assert post_ack(client, {"authorization": "Bearer wrong"}) == 401
    assert post_ack(client, {"authorization": f"Bearer {TOKEN}"}) == 200


@pytest.mark.parametrize("path", ["/", "/login", "/static/page.css", "/api/state", "/nothing", "/pictures/a/b"])
def test_every_answer_carries_the_security_headers(path: str) -> None:
    """Pages, files, data and errors alike: no inline script, no framing, no sniffing."""
    headers = open_page().get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_files_of_the_page_hold_no_inline_script_or_style_and_no_foreign_address() -> None:
    """What the policy forbids does not occur, so nothing breaks silently."""
    for path in sorted(Path("daemon/page/static").resolve().iterdir()):
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert "eval(" not in text
        if path.suffix == ".html":
            assert "<script>" not in text
            assert " style=" not in text
            assert " onclick=" not in text
        assert "https://" not in text
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"host": "10.0.0.1"}, "token_file"),
        ({"host": "10.0.0.1", "token_file": "token"}, "in the clear"),
        ({"token_file": "missing"}, "cannot read"),
        ({"token_file": "short"}, "at least 16"),
    ],
)
def test_an_open_door_is_refused_at_start(tmp_path: Path, settings: dict[str, str], word: str) -> None:
    """Off loopback without token or TLS, and with a token that anyone can guess, the daemon does not start."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "short").write_text("1234")
    values = {k: tmp_path / v if k == "token_file" else v for k, v in settings.items()}
    with pytest.raises(ConfigError, match=word):
        Access.from_settings(HttpSettings(**values))


def test_a_guarded_door_is_accepted(tmp_path: Path) -> None:
    """Off loopback with a token behind a proxy that ends TLS: cookies are Secure."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    access = Access.from_settings(HttpSettings(host="10.0.0.1", token_file=tmp_path / "token", tls_at_proxy=True))
    assert access.opens(TOKEN)
    assert access.encrypted
    assert not access.opens("")
    assert not Access("", False).opens("")
