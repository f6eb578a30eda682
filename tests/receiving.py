"""Builders for the tests of reception: tiny data sets, a receiver in this process or in its own, and raw associations."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import build_context

from daemon.config import DicomSettings, ScannerSettings, Settings, SpoolSettings
from daemon.log import Log
from daemon.receive import Receiver, Reports
from daemon.spool import SpoolReader, SpoolWriter, StoredInstance

MR = "1.2.840.10008.5.1.4.1.1.4"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UID_ROOT = "1.2.826.0.1.3680043.10.1"
SMALL_SPOOL = SpoolSettings(quota_bytes=64 << 20, reserve_bytes=0, segment_bytes=1 << 20)


def uid(number: int) -> str:
    return f"{UID_ROOT}.{number}"


def padded(value: str) -> bytes:
    return value.encode("ascii", "replace") + b"\0" * (len(value) % 2)


def explicit_element(tag: int, vr: bytes, value: bytes, order: str = "<") -> bytes:
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in (b"OB", b"OW", b"SQ", b"UN"):
        return head + struct.pack(f"{order}HI", 0, len(value)) + value
    return head + struct.pack(f"{order}H", len(value)) + value


def make_dataset(
    instance: str, sop_class: str = MR, *, size_bytes: int = 2000, fill: int = 7, before: bytes = b"", order: str = "<"
) -> bytes:
    """A minimal MR data set, explicit VR: SOP UIDs, a patient name and pixels."""
    return (
        before
        + explicit_element(0x00080016, b"UI", padded(sop_class), order)
        + explicit_element(0x00080018, b"UI", padded(instance), order)
        + explicit_element(0x00100010, b"PN", b"CANARY^PATIENT", order)
        + explicit_element(0x7FE00010, b"OW", bytes([fill % 256]) * (size_bytes + size_bytes % 2), order)
    )


def until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    """Return once it holds; fail when it does not within the limit."""
    deadline, pause = time.monotonic() + limit_s, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected a condition within {limit_s:g} s; it never held")
        pause.wait(0.005)


# --- receivers --------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A receiver in this process."""

    receiver: Receiver
    spool: SpoolWriter
    folder: Path
    port: int
    messages: list[dict[str, Any]] = field(default_factory=list)

    def records(self) -> list[Any]:
        reader = SpoolReader(self.folder)
        try:
            return reader.follow(0)
        finally:
            reader.close()

    def instances(self) -> list[StoredInstance]:
        return [record for record in self.records() if isinstance(record, StoredInstance)]

    def read(self, stored: StoredInstance) -> bytes:
        reader = SpoolReader(self.folder)
        try:
            return reader.read(stored)
        finally:
            reader.close()


@contextmanager
def receiving(
    folder: Path,
    *,
    dicom: DicomSettings | None = None,
    scanners: tuple[ScannerSettings, ...] = (),
    spool: SpoolSettings = SMALL_SPOOL,
    **writer: Any,
) -> Iterator[Running]:
    """A receiver on a port of its own; stopped and checked at the end."""
    store = SpoolWriter(folder, spool.quota_bytes, spool.reserve_bytes, spool.segment_bytes, **writer)
    messages: list[dict[str, Any]] = []
    reports = Reports(messages.append)
    receiver = Receiver(dicom or DicomSettings(port=0), scanners, store, reports, Log())
    _, port = receiver.listen()
    thread = threading.Thread(target=receiver.serve)
    thread.start()
    try:
        yield Running(receiver, store, folder, port, messages)
    finally:
        receiver.stop(grace_s=0.1)
        thread.join(5)
        reports.close()
        store.close()
        assert not thread.is_alive()


class ReceiverProcess:
    """A receiver in a process of its own, as the daemon runs it."""

    def __init__(self, settings: Settings, wrapper: tuple[str, ...] = ()) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "tests.receiving", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).resolve().parent.parent,
            )
        self.control = Connection(ours.detach())
        self.control.send(settings)
        if not self.control.poll(60):
            self.kill()
            raise TimeoutError("the receiver did not start within 60 s")
        self.listening: dict[str, Any] = self.control.recv()
        self._drain = threading.Thread(target=self._read_on, daemon=True)
        self.messages: list[dict[str, Any]] = []
        self._drain.start()

    @property
    def port(self) -> int:
        return int(self.listening["port"])

    def _read_on(self) -> None:
        try:
            while True:
                self.messages.append(self.control.recv())
        except (EOFError, OSError):
            return

    def stop(self) -> int:
        self.control.send({"kind": "stop"})
        return self._finish(self.process.wait(30))

    def leave(self) -> int:
        """Close the control socket as a main process that dies does."""
        with socket.socket(fileno=os.dup(self.control.fileno())) as control:
            control.shutdown(socket.SHUT_RDWR)
        return self._finish(self.process.wait(30))

    def kill(self) -> int:
        self.process.kill()
        return self._finish(self.process.wait(30))

    def _finish(self, status: int) -> int:
        if hasattr(self, "_drain"):
            self._drain.join(10)
        self.control.close()
        return status


# --- associations -----------------------------------------------------------------------------------------------------


def pack_request(
    calling: str = "SCANNER", called: str = "RESCAN", contexts: dict[str, list[str]] | None = None
) -> bytes:
    """An A-ASSOCIATE-RQ for these SOP classes and transfer syntaxes; context identifiers are 1, 3, 5, ..."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = calling, called
    proposed = [build_context(name, syntaxes) for name, syntaxes in (contexts or {MR: [EXPLICIT]}).items()]
    for number, context in enumerate(proposed):
        context.context_id = 2 * number + 1
    primitive.presentation_context_definition_list = proposed
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = 16384
    implementation.implementation_class_uid = uid(0)
    primitive.user_information = [length, implementation]
    return A_ASSOCIATE_RQ(primitive).encode()


def pack_command(elements: dict[int, bytes]) -> bytes:
    body = b"".join(struct.pack("<HHI", 0, n, len(v)) + v for n, v in sorted(elements.items()))
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def pack_values(context: int, control: int, data: bytes, pdu_bytes: int = 16384) -> bytes:
    """P-DATA-TFs with one value each; `control` is 1 for a command, 0 for a data set."""
    step = pdu_bytes - 6
    pieces = [data[at : at + step] for at in range(0, len(data), step)] or [b""]
    return b"".join(
        struct.pack(
            ">BxIIBB", 4, len(piece) + 6, len(piece) + 2, context, control | (2 if at == len(pieces) - 1 else 0)
        )
        + piece
        for at, piece in enumerate(pieces)
    )


def pack_store(
    instance: str, dataset: bytes, *, message: int = 1, sop_class: str = MR, context: int = 1, pdu_bytes: int = 16384
) -> bytes:
    """A whole C-STORE request."""
    command = {
        0x0002: padded(sop_class),
        0x0100: struct.pack("<H", 1),
        0x0110: struct.pack("<H", message),
        0x0700: struct.pack("<H", 0),
        0x0800: struct.pack("<H", 1 if dataset else 0x0101),
        0x1000: padded(instance),
    }
    data = pack_values(context, 0, dataset, pdu_bytes) if dataset else b""
    return pack_values(context, 1, pack_command(command)) + data


class Peer:
    """A sender that says exactly what a test wants it to say."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the receiver closed")
            data += more
        return data

    def pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxI", self.exactly(6))
        return kind, self.exactly(length)

    def associate(self, **request: Any) -> int:
        """Send a request; returns the type of the answer: 2 accepted, 3 rejected, 7 aborted."""
        self.send(pack_request(**request))
        kind, self.answer = self.pdu()
        return kind

    def response(self) -> dict[int, bytes]:
        kind, body = self.pdu()
        assert kind == 4, f"expected a response, got PDU type {kind}"
        elements, offset = {}, 6
        while offset < len(body):
            _, element, length = struct.unpack_from("<HHI", body, offset)
            elements[element] = body[offset + 8 : offset + 8 + length]
            offset += 8 + length
        return elements

    def store(self, instance: str, dataset: bytes, **request: Any) -> int:
        """Send one instance; returns the status."""
        self.send(pack_store(instance, dataset, **request))
        return int.from_bytes(self.response()[0x0900], "little")

    def release(self) -> int:
        self.send(struct.pack(">BxII", 5, 4, 0))
        kind, _ = self.pdu()
        self.close()
        return kind

    def abort(self) -> None:
        self.send(struct.pack(">BxII", 7, 4, 0))
        self.close()

    def closed(self) -> bool:
        """Whether the receiver closes, waiting for it."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def settings_for(state: Path, spool: SpoolSettings = SMALL_SPOOL, **dicom: Any) -> Settings:
    return Settings(state=state, dicom=DicomSettings(port=0, **dicom), spool=spool)


def main() -> None:
    """Be the receiver process."""
    from daemon.receive import run_receiver

    control = Connection(int(sys.argv[1]))
    run_receiver(control.recv(), control)


if __name__ == "__main__":
    main()
