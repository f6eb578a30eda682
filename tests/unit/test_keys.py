"""`rescan keys`: pairs, who is let in, and files that only their owner reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq.auth

from daemon.__main__ import main
from daemon.keys import Client, KeyFault, KeyStore, Role, new_pair, read_pair, read_public


def test_from_new_keys_to_a_client_that_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three commands as a site uses them."""
    state = ["--state", str(tmp_path / "state")]
    assert main(["keys", "new", *state]) == 0
    server = capsys.readouterr().out.strip()
    assert main(["keys", "new", "screen", "--to", str(tmp_path)]) == 0
    screen = capsys.readouterr().out.strip()
    assert main(["keys", "authorize", str(tmp_path / "screen.key"), "--role", "ack", *state]) == 0
    assert main(["keys", "list", *state]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == ["server", "-", server, "screen", "ack", screen]
    store = KeyStore(tmp_path / "state" / "keys")
    assert store.role_of(screen) is Role.ACK
    assert store.role_of(server) is None
    assert store.callback("rescan", screen.encode())
    assert not store.callback("rescan", server.encode())


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask; nothing half-written is left."""
    new_pair(tmp_path / "keys", "server")
    assert (tmp_path / "keys" / "server.key_secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert sorted(file.name for file in (tmp_path / "keys").iterdir()) == ["server.key", "server.key_secret"]
    assert "secret" not in (tmp_path / "keys" / "server.key").read_text()


def test_the_files_are_zeromq_certificates(tmp_path: Path) -> None:
    """Other programs with ZeroMQ read them."""
    pair = new_pair(tmp_path, "mine")
    assert zmq.auth.load_certificate(tmp_path / "mine.key_secret") == (pair.public, pair.secret)
    assert zmq.auth.load_certificate(tmp_path / "mine.key") == (pair.public, None)
    assert read_pair(tmp_path / "mine.key_secret") == pair
    assert read_public(str(tmp_path / "mine.key")) == read_public(pair.public.decode()) == pair.public.decode()


def test_a_pair_is_never_overwritten(tmp_path: Path) -> None:
    """Every client would lose its connection."""
    pair = new_pair(tmp_path, "server")
    with pytest.raises(KeyFault, match="exists already"):
        new_pair(tmp_path, "server")
    assert read_pair(tmp_path / "server.key_secret") == pair


def test_a_change_is_noticed_without_a_restart(tmp_path: Path) -> None:
    """Let in, given another role, shut out."""
    store, public = KeyStore(tmp_path), new_pair(tmp_path / "c", "c").public.decode()
    assert store.role_of(public) is None
    file = store.authorize("c", public, Role.READ)
    assert store.role_of(public) is Role.READ
    store.authorize("c", public, Role.ACK)
    assert store.role_of(public) is Role.ACK
    assert store.clients() == [Client("c", public, Role.ACK)]
    file.unlink()
    assert store.role_of(public) is None


def test_a_damaged_file_lets_nobody_in(tmp_path: Path) -> None:
    """And shuts nobody else out; `list` names it."""
    store, public = KeyStore(tmp_path), new_pair(tmp_path / "c", "c").public.decode()
    store.authorize("good", public, Role.READ)
    (store.authorized / "bad.key").write_text(
        'metadata\n    role = "king"\ncurve\n    public-key = "' + "x" * 40 + '"\n'
    )
    assert store.role_of(public) is Role.READ
    assert store.role_of("x" * 40) is None
    with pytest.raises(KeyFault, match=r"bad\.key"):
        store.clients()


@pytest.mark.parametrize("name", ["", "../server", "a/b", ".hidden", "x" * 65, "a b"])
def test_names_that_could_be_paths_are_refused(tmp_path: Path, name: str) -> None:
    """For pairs and for clients."""
    public = new_pair(tmp_path, "ok").public.decode()
    with pytest.raises(KeyFault, match="name"):
        new_pair(tmp_path, name)
    with pytest.raises(KeyFault, match="name"):
        KeyStore(tmp_path).authorize(name, public, Role.READ)


@pytest.mark.parametrize("given", ["", "short", "y" * 39 + "~", "no-such-file.key"])
def test_what_is_no_key_is_one_line(given: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Status 2, the remedy, no traceback."""
    assert main(["keys", "authorize", given, "--name", "x", "--state", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "rescan keys new" in said
    assert said.count("\n") == 1
