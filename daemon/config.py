"""The settings: one frozen, typed tree from defaults, one TOML file and the command line, in rising order of authority.

Every default stands once, here, beside its unit, its range and its help text. An unknown key is an error that names the
nearest known one. Settings marked `live` can be changed by SIGHUP; all others need a restart.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

UNKNOWN_SCANNER = "unknown"
"""The name of a caller that no `[[scanners]]` entry claims; also the only label value that the network can cause."""

SHIPPED_MODEL = Path(__file__).parent / "models" / "student.onnx"
"""The student that comes with Rescan."""

TOKEN_VARIABLE = "RESCAN_PAGE_TOKEN"  # noqa: S105 (the name of a variable)
"""Environment variable that holds the page's token where `http.token_file` names no file. It is never printed."""

_SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_AE_TITLE = re.compile(r"[ -\[\]-~]{1,16}")
_ENDPOINT = re.compile(r"tcp://(?P<host>[^\s:*]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


class ConfigError(Exception):
    """Settings that cannot be used; the message is one line that names the value and the remedy."""


class Engine(StrEnum):
    """What runs the student; `auto` takes the best one that is installed and answers."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    CUDA = "cuda"
    OPENVINO = "openvino"
    CPU = "cpu"


class AlertMode(StrEnum):
    """Whether a RESCAN verdict of this scanner reaches people (`on`), or is only scored and recorded (`shadow`)."""

    ON = "on"
    SHADOW = "shadow"


class LogFormat(StrEnum):
    """How a log line is written."""

    TEXT = "text"
    JSON = "json"


def _setting(
    default: Any,
    help: str,  # noqa: A002  (the word that argparse and the docs use)
    *,
    low: float | None = None,
    high: float | None = None,
    live: bool = False,
) -> Any:
    """A dataclass field with its help text, its inclusive range and whether SIGHUP may change it."""
    metadata = {"help": help, "low": low, "high": high, "live": live}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _required(help: str) -> Any:  # noqa: A002
    """A dataclass field without a default."""
    return field(metadata={"help": help, "low": None, "high": None, "live": False})


@dataclass(frozen=True)
class ScannerSettings:
    """One scanner that may send: an entry of `[[scanners]]`."""

    slug: str = _required("name in metrics, events and pages: a-z, 0-9, - and _")
    ae_title: str = _required("calling AE title as the scanner sends it")
    address: str = _required("address or network it calls from, such as 10.1.2.3 or 10.1.2.0/28")
    alerts: AlertMode = _setting(AlertMode.ON, "on: alerts reach people; shadow: scored and recorded only", live=True)
    quiet_provisional_s: float | None = _setting(
        None, "provisional after this silence; completeness.quiet_provisional_s where absent", low=0.1, high=600
    )
    room: str = _setting("", "label on the page, such as 'MR 2'; the slug where empty", live=True)

    def __post_init__(self) -> None:
        """Check the three facts that decide who may send."""
        if not _SLUG.fullmatch(self.slug) or self.slug == UNKNOWN_SCANNER:
            raise ValueError(f"slug: got {self.slug!r}; use 1 to 32 of a-z 0-9 - _, and not '{UNKNOWN_SCANNER}'")
        if not _AE_TITLE.fullmatch(self.ae_title) or not self.ae_title.strip():
            raise ValueError(f"ae_title: got {self.ae_title!r}; use 1 to 16 characters without a backslash")
        try:
            ipaddress.ip_network(self.address, strict=False)
        except ValueError:
            raise ValueError(f"address: got {self.address!r}; write an address or network such as 10.1.2.3") from None


@dataclass(frozen=True)
class DicomSettings:
    """The C-STORE and C-ECHO door."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(11112, "port to listen on; 0 picks a free one", low=0, high=65535)
    ae_title: str = _setting("RESCAN", "AE title that scanners call")
    require_called_ae_title: bool = _setting(False, "refuse callers that ask for another AE title")
    max_associations: int = _setting(64, "associations at the same time", low=1, high=1000)
    max_pdu_bytes: int = _setting(131072, "largest PDU accepted", low=4096, high=16 << 20)
    max_instance_bytes: int = _setting(2 << 30, "largest instance accepted", low=1 << 20, high=8 << 30)
    association_timeout_s: float = _setting(30.0, "wait for an association request", low=1, high=600)
    network_timeout_s: float = _setting(60.0, "silence after which an association is given up", low=1, high=3600)
    private_sop_classes: tuple[str, ...] = _setting(
        (), "private storage SOP classes to accept besides the standard ones"
    )

    def __post_init__(self) -> None:
        """Check the AE title."""
        if not _AE_TITLE.fullmatch(self.ae_title) or not self.ae_title.strip():
            raise ValueError(f"ae_title: got {self.ae_title!r}; use 1 to 16 characters without a backslash")


@dataclass(frozen=True)
class SpoolSettings:
    """What is received and not yet judged, on disk."""

    quota_bytes: int = _setting(64 << 30, "most that the spool holds before C-STORE answers 0xA700", low=16 << 20)
    reserve_bytes: int = _setting(1 << 30, "free space on the disk below which C-STORE answers 0xA700", low=0)
    segment_bytes: int = _setting(256 << 20, "size of one preallocated segment", low=1 << 20, high=4 << 30)
    retention_s: float = _setting(86400.0, "keep the images of a judged series for this long", low=0, live=True)


@dataclass(frozen=True)
class CompletenessSettings:
    """When a stack counts as complete."""

    counted_s: float = _setting(0.5, "provisional after the expected count is met", low=0, high=60)
    released_s: float = _setting(2.0, "provisional after a clean release with regular geometry", low=2.0, high=60)
    quiet_provisional_s: float = _setting(5.0, "provisional after this silence", low=0.1, high=600)
    quiet_final_s: float = _setting(60.0, "final after this silence", low=0.2, high=3600)
    max_open_s: float = _setting(900.0, "final, complete or not, after this time", low=1, high=86400)

    def __post_init__(self) -> None:
        """A final verdict cannot come before the provisional one."""
        if self.quiet_final_s < self.quiet_provisional_s:
            raise ValueError(
                f"quiet_final_s: got {self.quiet_final_s:g}, below quiet_provisional_s = {self.quiet_provisional_s:g}; raise it"
            )


@dataclass(frozen=True)
class ModelSettings:
    """The student and what runs it."""

    file: Path | None = _setting(None, "the student; the one that ships where absent")
    engine: Engine = _setting(Engine.AUTO, "auto, tensorrt, cuda, openvino or cpu")
    precision: str = _setting("", "precision of the engine, such as fp32; the engine's admitted default where empty")
    threads: int = _setting(
        0, "threads for inference on the CPU; 0 takes the cores this process may use", low=0, high=256
    )
    engine_cache: Path | None = _setting(None, "folder of engines built ahead by `rescan-export tensorrt`")
    strikes: int = _setting(3, "crashes of the scorer after which a series is quarantined", low=1, high=10)
    time_limit_s: float = _setting(300.0, "seconds after which a scoring that hangs is ended", low=5, high=3600)

    @property
    def path(self) -> Path:
        """The model file to serve."""
        return self.file or SHIPPED_MODEL


@dataclass(frozen=True)
class EventsSettings:
    """Live events and replay over ZeroMQ."""

    publish: str = _setting("tcp://127.0.0.1:5556", "endpoint of the live events; port 0 picks a free one")
    replay: str = _setting("tcp://127.0.0.1:5557", "endpoint of replay and acknowledgement; port 0 picks a free one")
    heartbeat_s: float = _setting(2.0, "seconds between heartbeats", low=0.05, high=60)
    curve: bool = _setting(False, "encrypt and authenticate with CURVE (`rescan keys`); needed off loopback")
    insecure_i_know: bool = _setting(False, "allow plain events off loopback: anyone on that network can read them")
    retention_s: float = _setting(30 * 86400.0, "keep events for this long", low=3600)
    alert_retention_s: float = _setting(365 * 86400.0, "keep alert events for this long", low=3600)

    def __post_init__(self) -> None:
        """Check both endpoints."""
        for name in ("publish", "replay"):
            split_endpoint(getattr(self, name), name)


@dataclass(frozen=True)
class HttpSettings:
    """The page, the probes and the metrics."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "port to listen on; 0 picks a free one", low=0, high=65535)
    token_file: Path | None = _setting(
        None, f"file with the token that the page asks for; needed off loopback, or {TOKEN_VARIABLE} in the environment"
    )
    tls_certificate: Path | None = _setting(None, "certificate chain in PEM form")
    tls_key: Path | None = _setting(None, "private key of the certificate")
    tls_at_proxy: bool = _setting(False, "a proxy in front of this port ends TLS")


@dataclass(frozen=True)
class AlertSettings:
    """What becomes of a RESCAN verdict."""

    max_per_exam: int = _setting(3, "alerts per exam; more are counted, not raised", low=1, high=100, live=True)
    expire_s: float = _setting(1200.0, "an alert that nobody acknowledged ends after this time", low=10, live=True)
    clear_margin_dice: float = _setting(
        0.01,
        "an alert is cleared only by a predicted Dice this much above the required one",
        low=0,
        high=0.5,
        live=True,
    )


@dataclass(frozen=True)
class LogSettings:
    """The log on standard error."""

    format: LogFormat = _setting(LogFormat.TEXT, "text (key=value) or json")


def default_state_folder() -> Path:
    """The service manager's state folder, else the user's."""
    given = os.environ.get("STATE_DIRECTORY")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rescan"


@dataclass(frozen=True)
class Settings:
    """Everything that a site decides."""

    state: Path = _setting(default_state_folder, "folder for the spool, the ledger and the site's keys")
    scanners: tuple[ScannerSettings, ...] = _setting((), "who may send", live=False)
    dicom: DicomSettings = _setting(DicomSettings, "the C-STORE and C-ECHO door")
    spool: SpoolSettings = _setting(SpoolSettings, "what is received and not yet judged")
    completeness: CompletenessSettings = _setting(CompletenessSettings, "when a stack counts as complete")
    model: ModelSettings = _setting(ModelSettings, "the student and what runs it")
    events: EventsSettings = _setting(EventsSettings, "live events and replay")
    http: HttpSettings = _setting(HttpSettings, "the page, the probes and the metrics")
    alerts: AlertSettings = _setting(AlertSettings, "what becomes of a RESCAN verdict")
    log: LogSettings = _setting(LogSettings, "the log")
    rules: tuple[dict[str, Any], ...] = _setting(
        (), "which series are judged and how good they must be; the default rule where empty", live=True
    )

    def __post_init__(self) -> None:
        """Check what no single part can: names used twice, and doors that are open to a network without protection."""
        _refuse_repeats("scanners: slug", [s.slug for s in self.scanners])
        _refuse_repeats("scanners: caller", [f"{s.ae_title.strip()} at {s.address}" for s in self.scanners])
        if not is_loopback(self.dicom.host) and not self.scanners:
            raise ConfigError(
                f"dicom.host: {self.dicom.host} is reachable from the network, and no scanner is allowed to send; "
                'list each one: [[scanners]] slug = "mr1", ae_title = "MRC12345", address = "10.1.2.3"'
            )
        for endpoint in (self.events.publish, self.events.replay):
            host, _ = split_endpoint(endpoint, "events")
            if not (is_loopback(host) or self.events.curve or self.events.insecure_i_know):
                raise ConfigError(
                    f"events: {endpoint} is reachable from the network without protection; "
                    "set events.curve = true and make keys with `rescan keys new`"
                )
        if not is_loopback(self.http.host) and self.http.token_file is None and not os.environ.get(TOKEN_VARIABLE):
            raise ConfigError(
                f"http.host: {self.http.host} is reachable from the network; set http.token_file to a file with a long "
                f"random token, or give the token in the environment as {TOKEN_VARIABLE}"
            )

    def scanner(self, slug: str) -> ScannerSettings | None:
        """The scanner of this name, or None for a caller that no entry claims."""
        return next((s for s in self.scanners if s.slug == slug), None)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_endpoint(endpoint: str, name: str) -> tuple[str, int]:
    """Host and port of `tcp://HOST:PORT`.

    Raises:
        ValueError: anything else; the message shows it.
    """
    match = _ENDPOINT.fullmatch(endpoint)
    if not match or int(match["port"]) > 65535:
        raise ValueError(f"{name}: got {endpoint!r}; write it as tcp://HOST:PORT, such as tcp://127.0.0.1:5556")
    return match["host"].strip("[]"), int(match["port"])


def split_address(text: str, name: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`.

    Raises:
        ConfigError: anything else; the message shows it.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{name}: got {text!r}; write it as HOST:PORT, such as 127.0.0.1:11112")
    return host.strip("[]"), int(port)


def _refuse_repeats(name: str, values: list[str]) -> None:
    """Say which value stands twice."""
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{name}: {value!r} stands twice; each must be unique")


# --- From plain values to the tree ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effective:
    """The settings in force and where each came from.

    Attributes:
        settings: the tree.
        origins: dotted path -> "flag" or "file"; a path that is absent holds its default.
    """

    settings: Settings
    origins: Mapping[str, str]


def load(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Effective:
    """Defaults, then the file, then the flags.

    Args:
        file: a TOML file, or None for none.
        flags: dotted path -> value, such as {"dicom.port": 0}. Paths absent here leave the file's word.

    Raises:
        ConfigError: a value that cannot be used; one line.
    """
    data = _read_toml(file) if file else {}
    origins = dict.fromkeys(_paths(data), "file")
    for path, value in (flags or {}).items():
        _put(data, path, value)
        origins[path] = "flag"
    where = f"{file}: " if file else ""
    try:
        return Effective(_build(Settings, data, ""), origins)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot read the configuration ({error.strerror}); name an existing TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML ({error}); mend that place") from None


def _paths(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in data.items():
        found += _paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def _put(data: dict[str, Any], path: str, value: object) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        data = data.setdefault(folder, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{folder}: got {data!r}; it must be a table, written [{folder}]")
    data[name] = value


def _build(cls: type[T], data: Mapping[str, Any], prefix: str) -> T:
    """One dataclass of the tree from a TOML table."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: unknown key{_nearest(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{prefix}{key}", fields[key].metadata) for key, value in data.items()}
    missing = [n for n, f in fields.items() if n not in values and _has_no_default(f)]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing; {fields[missing[0]].metadata['help']}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _nearest(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"


def _convert(hint: Any, value: object, path: str, metadata: Mapping[str, Any]) -> Any:
    """One TOML value as the type that the tree declares."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _convert_list(typing.get_args(hint)[0], value, path, metadata)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: got {value!r}; it must be a table, written [{path}]")
        return _build(hint, value, f"{path}.")
    if origin is dict:
        return _expect(dict, value, path)
    return _convert_scalar(hint, value, path, metadata)


def _convert_list(item: Any, value: object, path: str, metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}: got {value!r}; it must be a list")
    return tuple(_convert(item, each, f"{path}[{n}]", metadata) for n, each in enumerate(value))


def _convert_scalar(hint: Any, value: object, path: str, metadata: Mapping[str, Any]) -> Any:
    if hint is Path:
        return Path(_expect(str, str(value) if isinstance(value, Path) else value, path)).expanduser()
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        try:
            return hint(str(value))
        except ValueError:
            raise ConfigError(f"{path}: got {value!r}; use one of {', '.join(hint)}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) and hint is not bool:
        raise ConfigError(f"{path}: got {value!r}; expected {hint.__name__}")
    converted = _expect(hint, value, path)
    _check_range(converted, path, metadata)
    return converted


def _expect(kind: type, value: object, path: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{path}: got {value!r}; expected {kind.__name__}")
    return value


def _check_range(value: object, path: str, metadata: Mapping[str, Any]) -> None:
    low, high = metadata.get("low"), metadata.get("high")
    if not isinstance(value, int | float):
        return
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        bounds = f"from {low:g}" if high is None else f"up to {high:g}" if low is None else f"from {low:g} to {high:g}"
        raise ConfigError(f"{path}: got {value:g}; it must be {bounds}")


# --- What the tree says of itself --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """One setting as documentation: dotted path, type word, default, range, help, whether SIGHUP may change it, choices."""

    path: str
    kind: str
    default: Any
    low: float | None
    high: float | None
    help: str
    live: bool
    choices: tuple[str, ...] = ()


def describe(cls: type = Settings, prefix: str = "") -> list[Described]:
    """Every setting, in the order of the file."""
    found: list[Described] = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += describe(hint, f"{prefix}{f.name}.")
            continue
        m = f.metadata
        default = None if _has_no_default(f) else f.default_factory() if callable(f.default_factory) else f.default
        found.append(
            Described(
                f"{prefix}{f.name}", _word(hint), default, m["low"], m["high"], m["help"], m["live"], _choices(hint)
            )
        )
        (item,) = typing.get_args(hint)[:1] or (None,)
        if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item) and isinstance(item, type):
            found += describe(item, f"{prefix}{f.name}[].")
    return found


def _word(hint: Any) -> str:
    """The JSON Schema word for a type of the tree."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return "array"
    words = {bool: "boolean", int: "integer", float: "number", dict: "object"}
    return words.get(typing.get_origin(hint) or hint, "string")


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(hint) if isinstance(hint, type) and issubclass(hint, StrEnum) else ()


def value_at(settings: Settings, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def needs_restart(old: Settings, new: Settings) -> list[str]:
    """Dotted paths that differ and cannot change while the daemon runs."""
    changed = [path for path, _, _ in changes(old, new)]
    live = {d.path for d in describe() if d.live}
    return [path for path in changed if re.sub(r"\[\d+\]", "[]", path) not in live]


def changes(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """What differs: dotted path, old value, new value. Scanners are compared one by one where their number is the same."""
    found = []
    for d in describe():
        if "[]" in d.path:
            continue
        before, after = value_at(old, d.path), value_at(new, d.path)
        if d.path == "scanners" and len(before) == len(after):
            found += [
                (f"scanners[{n}].{f.name}", getattr(was, f.name), getattr(now, f.name))
                for n, (was, now) in enumerate(zip(before, after, strict=True))
                for f in dataclasses.fields(ScannerSettings)
                if getattr(was, f.name) != getattr(now, f.name)
            ]
        elif before != after:
            found.append((d.path, before, after))
    return found
