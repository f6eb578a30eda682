"""`rescan keys`: the CURVE keys that protect events off loopback.

The server's pair lies in STATE/keys/server.key (public) and server.key_secret (0600). Each authorised client is one file
STATE/keys/authorized/NAME.key with its public key and its role: `read` may subscribe and replay, `ack` may acknowledge too.
Files are read anew when the folder changes, so a key is authorised or withdrawn without a restart.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import zmq
from zmq.utils import z85

from daemon.config import ConfigError, default_state_folder

SERVER = "server"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LINE = re.compile(r"^\s*(?P<key>public-key|secret-key|role)\s*=\s*\"(?P<value>[^\"]*)\"\s*$", re.MULTILINE)


class KeyFault(ConfigError):
    """A key that cannot be used; the message is one line with the remedy."""


class Role(StrEnum):
    """What a client may do."""

    READ = "read"
    ACK = "ack"


@dataclass(frozen=True)
class Pair:
    """A CURVE pair in Z85 form, 40 bytes each."""

    public: bytes
    secret: bytes


@dataclass(frozen=True)
class Client:
    """One authorised client."""

    name: str
    public: str
    role: Role


class KeyStore:
    """The keys of one state folder; also what ZeroMQ's authenticator asks."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder; nothing is read yet."""
        self.folder = folder
        self._stamp: object = None
        self._roles: dict[str, Role] = {}

    @property
    def authorized(self) -> Path:
        """Folder with one file per authorised client."""
        return self.folder / "authorized"

    def server_pair(self) -> Pair:
        """The server's pair.

        Raises:
            KeyFault: it is missing or damaged.
        """
        return read_pair(self.folder / f"{SERVER}.key_secret")

    def clients(self) -> list[Client]:
        """Every authorised client, by name.

        Raises:
            KeyFault: a file that is not a public key with a role.
        """
        files = sorted(self.authorized.glob("*.key")) if self.authorized.is_dir() else []
        return [_read_client(file) for file in files]

    def role_of(self, public: str) -> Role | None:
        """Role of a public key in Z85 form; None where it is not authorised."""
        stamp = self._stamped()
        if stamp != self._stamp:
            roles = {}
            for file in sorted(self.authorized.glob("*.key")):
                with contextlib.suppress(KeyFault):  # a damaged file authorises nobody
                    client = _read_client(file)
                    roles[client.public] = client.role
            self._roles, self._stamp = roles, stamp
        return self._roles.get(public)

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 (the authenticator's signature)
        """Whether this key, in Z85 form, may connect."""
        return self.role_of(key.decode("ascii", "replace")) is not None

    def authorize(self, name: str, public: str, role: Role) -> Path:
        """Let a client in.

        Raises:
            KeyFault: the name or the key cannot be used.
        """
        if not _NAME.fullmatch(name):
            raise KeyFault(f"name: got {name!r}; use 1 to 64 letters, digits, dots, - and _")
        _check_key(public, name)
        path = self.authorized / f"{name}.key"
        self.authorized.mkdir(parents=True, exist_ok=True)
        _write(path, {"role": role, "public-key": public}, 0o644)
        return path

    def _stamped(self) -> object:
        """Changes whenever a file of the folder does."""
        try:
            files = sorted(self.authorized.iterdir())
            return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        except OSError:
            return ()


def new_pair(folder: Path, name: str) -> Pair:
    """Make a pair: NAME.key and NAME.key_secret, the latter for its owner alone.

    Raises:
        KeyFault: one is there already, or the name cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise KeyFault(f"name: got {name!r}; use 1 to 64 letters, digits, dots, - and _")
    secret_file = folder / f"{name}.key_secret"
    if secret_file.exists():
        raise KeyFault(f"{secret_file}: exists already; remove it first if every client may lose its connection")
    public, secret = zmq.curve_keypair()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(secret_file, {"public-key": public.decode(), "secret-key": secret.decode()}, 0o600)
    _write(folder / f"{name}.key", {"public-key": public.decode()}, 0o644)
    return Pair(public, secret)


def read_pair(file: Path) -> Pair:
    """Read a NAME.key_secret file.

    Raises:
        KeyFault: missing or damaged.
    """
    found = _read(file)
    for part in ("public-key", "secret-key"):
        _check_key(found.get(part, ""), str(file))
    return Pair(found["public-key"].encode(), found["secret-key"].encode())


def read_public(text: str) -> str:
    """A public key given as itself or as the path of a NAME.key file.

    Raises:
        KeyFault: neither.
    """
    public = text if _is_key(text) else _read(Path(text)).get("public-key", "")
    _check_key(public, text)
    return public


def _read_client(file: Path) -> Client:
    found = _read(file)
    _check_key(found.get("public-key", ""), str(file))
    if found.get("role") not in set(Role):
        raise KeyFault(f"{file}: role {found.get('role')!r}; authorise the key again with `rescan keys authorize`")
    return Client(file.stem, found["public-key"], Role(found["role"]))


def _read(file: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise KeyFault(f"{file}: cannot be read ({why}); make keys with `rescan keys new`") from None
    return {match["key"]: match["value"] for match in _LINE.finditer(text)}


def _write(path: Path, values: dict[str, str], mode: int) -> None:
    """A file in the form of ZeroMQ certificates, complete or not there."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    lines = "".join(f'    {name} = "{value}"\n' for name, value in values.items() if name != "role")
    role = f'    role = "{values["role"]}"\n' if "role" in values else ""
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"# Rescan, ZeroMQ CURVE\n\nmetadata\n{role}curve\n{lines}")
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)


def _is_key(text: str) -> bool:
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except (ValueError, KeyError):
        return False


def _check_key(text: str, where: str) -> None:
    if not _is_key(text):
        raise KeyFault(f"{where}: no CURVE key of 40 characters there; make one with `rescan keys new`")


# --- the command ------------------------------------------------------------------------------------------------------


_STATE_HELP = "state folder of the daemon, default %(default)s"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rescan keys new|authorize|list`."""
    parser = subparsers.add_parser("keys", help="make and authorise the keys that protect events")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make the server's keys, or with NAME a client's")
    new.add_argument("name", nargs="?", default=SERVER, metavar="NAME", help="of the client; without it, the server")
    new.add_argument("--state", type=Path, default=default_state_folder(), help=_STATE_HELP)
    new.add_argument("--to", type=Path, metavar="DIR", help="folder of a client's keys, default the current one")
    new.set_defaults(func=_new)
    allow = actions.add_parser("authorize", help="let a client in")
    allow.add_argument("key", metavar="KEY", help="its public key, or its NAME.key file")
    allow.add_argument("--name", help="what to call it; the file's name where absent")
    allow.add_argument("--role", type=Role, choices=list(Role), default=Role.READ, help="default %(default)s")
    allow.add_argument("--state", type=Path, default=default_state_folder(), help=_STATE_HELP)
    allow.set_defaults(func=_authorize)
    listing = actions.add_parser("list", help="show who is let in")
    listing.add_argument("--state", type=Path, default=default_state_folder(), help=_STATE_HELP)
    listing.set_defaults(func=_list)


def _new(args: argparse.Namespace) -> int:
    server = args.name == SERVER
    folder = args.state / "keys" if server else (args.to or Path())
    pair = new_pair(folder, args.name)
    print(pair.public.decode())
    if server:
        hint = f"clients need {folder / 'server.key'}; let each in with `rescan keys authorize`"
    else:
        hint = f"keep {folder / args.name}.key_secret secret; on the daemon: rescan keys authorize {args.name}.key"
    print(hint, file=sys.stderr)
    return 0


def _authorize(args: argparse.Namespace) -> int:
    name = args.name or ("" if _is_key(args.key) else Path(args.key).stem)
    path = KeyStore(args.state / "keys").authorize(name, read_public(args.key), args.role)
    print(f"{path}: may {args.role}", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    store = KeyStore(args.state / "keys")
    print(f"{'server':<20} {'-':<5} {store.server_pair().public.decode()}")
    for client in store.clients():
        print(f"{client.name:<20} {client.role:<5} {client.public}")
    return 0
