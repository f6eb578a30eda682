"""One DICOM association as its acceptor sees it: one blocking thread from request to release.

pynetdicom reads and writes the association PDUs and negotiates the contexts. Its own loops, two polling threads per
association, cost several milliseconds for each instance; here the thread blocks in `recv` instead and answers from
where it stands. The states of PS3.8 section 9.2 are the places in this code: waiting for the request (Sta2), deciding (Sta3),
data transfer (Sta6), waiting for the peer to close (Sta13).

Nothing here trusts the peer: lengths are checked before memory is taken, and every wait has an end.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Protocol

from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ, A_RELEASE_RP
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    A_P_ABORT,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from daemon.spool import IMPLEMENTATION_CLASS_UID

LARGEST_REQUEST_BYTES = 256 << 10
"""Longest A-ASSOCIATE-RQ read: 128 contexts with 40 transfer syntaxes each take about 150 KiB."""

LARGEST_COMMAND_BYTES = 16 << 10
"""Longest command set read; a C-STORE-RQ takes about 300 bytes."""

PDU_MARGIN_BYTES = 6
"""Taken beyond the agreed PDU length, from senders that do not count the PDU header."""

LEAST_BYTES_PER_S = 1000
"""A message that comes slower than this, after the first network timeout, is given up."""

LINGER_S = 2.0
"""Wait for the peer to close after the last word (Sta13)."""

_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_PDU_HEAD = struct.Struct(">BxI")
_PDV_HEAD = struct.Struct(">IBB")
_ELEMENT_HEAD = struct.Struct("<HHI")
_NO_DATASET = 0x0101
_C_STORE, _C_ECHO, _C_CANCEL = 0x0001, 0x0030, 0x0FFF
_RESPONSE = 0x8000
_LEAST_BUFFER_BYTES = 256 << 10


class Pdu(IntEnum):
    """Types of protocol data units (PS3.8 section 9.3)."""

    ASSOCIATE_RQ = 1
    DATA = 4
    RELEASE_RQ = 5
    ABORT = 7


class Ended(StrEnum):
    """How an association ended."""

    RELEASED = "released"
    ABORTED = "aborted"  # by the peer, or by us because the peer broke the protocol
    LOST = "lost"  # the connection closed, or nothing came for too long
    REJECTED = "rejected"  # not accepted, with an answer
    REFUSED = "refused"  # closed without an answer: too many connections, or never an association request


class Rejection(IntEnum):
    """Why an association is not accepted: result, source and reason of PS3.8 table 9-21, a byte each."""

    CALLING_AE_TITLE = 0x010103
    CALLED_AE_TITLE = 0x010107
    LOCAL_LIMIT = 0x020302


@dataclass(frozen=True)
class Answer:
    """What goes into a C-STORE response.

    Attributes:
        status: DIMSE status code.
        comment: at most 64 characters, free of anything the peer sent.
        offending: tags, such as 0x00080018.
    """

    status: int
    comment: str = ""
    offending: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoreRequest:
    """One C-STORE request, whole.

    Attributes:
        sop_class_uid: of the command.
        sop_instance_uid: of the command.
        abstract_syntax_uid: SOP class that the presentation context was accepted for.
        transfer_syntax_uid: of the presentation context.
        dataset: the bytes as received; empty where `size_bytes` is over the limit or memory was short.
        size_bytes: how long the data set was.
        kept: whether `dataset` holds all of it.
    """

    sop_class_uid: str
    sop_instance_uid: str
    abstract_syntax_uid: str
    transfer_syntax_uid: str
    dataset: bytearray
    size_bytes: int
    kept: bool


@dataclass(frozen=True)
class Limits:
    """What a peer may use up.

    Attributes:
        max_pdu_bytes: longest P-DATA-TF accepted.
        max_instance_bytes: longest data set kept.
        association_timeout_s: from the connection to the whole association request.
        network_timeout_s: longest silence, and longest time for one PDU.
    """

    max_pdu_bytes: int
    max_instance_bytes: int
    association_timeout_s: float
    network_timeout_s: float


class Memory(Protocol):
    """What all associations together may hold."""

    def take(self, size_bytes: int) -> bool:
        """Take so much more, or nothing."""

    def give(self, size_bytes: int) -> None:
        """Give back."""


class Owner(Protocol):
    """Who decides about an association and keeps what it brings."""

    def admit(self, calling_ae_title: str, called_ae_title: str) -> Rejection | None:
        """Accept the association (None), or say why not."""

    def store(self, request: StoreRequest) -> Answer:
        """Keep an instance; the answer goes out when this returns."""


class _Lost(Exception):
    """The connection is gone or silent."""


class _PeerAborted(Exception):
    """The peer sent A-ABORT."""


class _Broken(Exception):
    """The peer broke the protocol; carries the provider reason of PS3.8 table 9-26."""

    UNRECOGNISED, UNEXPECTED, INVALID_VALUE = 1, 2, 6

    def __init__(self, reason: int) -> None:
        super().__init__(f"A-ABORT reason {reason}")
        self.reason = reason


# --- Bytes ------------------------------------------------------------------------------------------------------------


class _Wire:
    """PDUs out of a socket, without trust in their lengths."""

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self._socket, self._limits = connection, limits
        self._buffer = bytearray(max(_LEAST_BUFFER_BYTES, _PDU_HEAD.size + limits.max_pdu_bytes + PDU_MARGIN_BYTES))
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        timeout = struct.pack("@ll", *_whole_and_micro(limits.network_timeout_s))
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self.wait_at_most(min(limits.association_timeout_s, limits.network_timeout_s))

    def wait_at_most(self, seconds: float) -> None:
        """Longest wait for any byte from here on."""
        timeout = struct.pack("@ll", *_whole_and_micro(seconds))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)

    def read(self, largest_bytes: int, limit_s: float) -> tuple[int, memoryview]:
        """The next PDU: its type and its body, which is valid until the next call.

        Args:
            largest_bytes: longest body accepted.
            limit_s: longest time from its first byte to its last.

        Raises:
            _Lost: the connection closed, or the peer was silent or too slow.
            _Broken: the body is too long.
        """
        if self._start == self._end:
            self._start = self._end = 0
            self._receive()
        deadline = time.monotonic() + limit_s
        self._gather(_PDU_HEAD.size, deadline)
        kind, length = _PDU_HEAD.unpack_from(self._buffer, self._start)
        if length > largest_bytes or _PDU_HEAD.size + length > len(self._buffer):
            raise _Broken(_Broken.INVALID_VALUE)
        self._gather(_PDU_HEAD.size + length, deadline)
        body = self._start + _PDU_HEAD.size
        self._start = body + length
        return kind, self._view[body : body + length]

    def send(self, data: bytes) -> None:
        """Send all of it."""
        try:
            self._socket.sendall(data)
        except OSError:
            raise _Lost from None

    def linger(self) -> None:
        """Wait until the peer closes, or a moment, so that our last word is not lost in a reset."""
        deadline = time.monotonic() + LINGER_S
        with suppress(OSError, _Lost):
            self.wait_at_most(LINGER_S)
            while time.monotonic() < deadline:
                self._start = self._end = 0
                self._receive()

    def _gather(self, size_bytes: int, deadline: float) -> None:
        """Have so many bytes from the start on."""
        if self._start + size_bytes > len(self._buffer):
            held = self._end - self._start
            self._view[:held] = self._view[self._start : self._end]
            self._start, self._end = 0, held
        while self._end - self._start < size_bytes:
            self._receive()
            if time.monotonic() > deadline:
                raise _Lost

    def _receive(self) -> None:
        """Whatever has come; acknowledged at once, else a sender with Nagle's algorithm waits 40 ms per message."""
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            count = self._socket.recv_into(self._view[self._end :])
        except OSError:
            raise _Lost from None
        if count == 0:
            raise _Lost
        self._end += count


def _whole_and_micro(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, max(0 if whole else 1, int((seconds - whole) * 1e6))


def read_command(data: bytes | bytearray) -> dict[int, bytes]:
    """The elements of a command set: element number of group 0000 -> value (PS3.7 section 6.3.1).

    Raises:
        ValueError: not a command set.
    """
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        if offset + _ELEMENT_HEAD.size > len(data):
            raise ValueError("command set: ends inside an element")
        group, element, length = _ELEMENT_HEAD.unpack_from(data, offset)
        offset += _ELEMENT_HEAD.size
        if group != 0 or offset + length > len(data):
            raise ValueError(f"command set: group {group:04x} or length {length} cannot be")
        elements[element] = bytes(data[offset : offset + length])
        offset += length
    return elements


def _number(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != 2:
        raise ValueError(f"command set: expected 2 bytes in (0000,{element:04x}), got {len(value)}")
    return int.from_bytes(value, "little")


def _uid(elements: dict[int, bytes], element: int) -> str:
    """A UID without its padding; bytes beyond ASCII stay visible as wrong characters."""
    return elements.get(element, b"").decode("ascii", "replace").rstrip("\0 ")


def pack_response(context: int, command: dict[int, bytes], answer: Answer) -> bytes:
    """The P-DATA-TF with the response to a command (PS3.7 sections 9.3.1.2 and 9.3.5.2)."""
    elements = {
        0x0002: command.get(0x0002, b""),
        0x0100: struct.pack("<H", _number(command, 0x0100) | _RESPONSE),
        0x0120: command.get(0x0110, b"\0\0"),
        0x0800: struct.pack("<H", _NO_DATASET),
        0x0900: struct.pack("<H", answer.status),
        0x0901: b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in answer.offending),
        0x0902: _even(answer.comment[:64].encode("ascii", "replace"), b" "),
        0x1000: command.get(0x1000, b""),
    }
    body = b"".join(_ELEMENT_HEAD.pack(0, n, len(value)) + value for n, value in elements.items() if value)
    body = _ELEMENT_HEAD.pack(0, 0, 4) + struct.pack("<I", len(body)) + body
    return _PDU_HEAD.pack(Pdu.DATA, len(body) + 6) + _PDV_HEAD.pack(len(body) + 2, context, 3) + body


def _even(data: bytes, padding: bytes) -> bytes:
    return data + padding * (len(data) % 2)


# --- The association --------------------------------------------------------------------------------------------------


@dataclass
class _Message:
    """A message while it comes in."""

    context: int
    began: float
    command: bytearray = field(default_factory=bytearray)
    elements: dict[int, bytes] | None = None
    dataset: bytearray = field(default_factory=bytearray)
    size_bytes: int = 0
    taken_bytes: int = 0
    kept: bool = True


class Association:
    """One connection, from its first byte to its last."""

    def __init__(
        self,
        connection: socket.socket,
        limits: Limits,
        contexts: Sequence[PresentationContext],
        owner: Owner,
        memory: Memory,
    ) -> None:
        """Get ready; `run` does the work.

        Args:
            connection: accepted and not yet read; whoever made it closes it.
            limits: what the peer may use up.
            contexts: SOP classes and transfer syntaxes supported, best transfer syntax first.
            owner: decides and keeps.
            memory: shared among all associations.
        """
        self._limits, self._supported, self._owner, self._memory = limits, contexts, owner, memory
        self._wire = _Wire(connection, limits)
        self._accepted: dict[int, tuple[str, str]] = {}
        self._message: _Message | None = None

    def run(self) -> Ended:
        """Serve the peer until one side ends it; the last word is sent when this returns."""
        try:
            ended = self._negotiate()
            return ended or self._transfer()
        except _Broken as broken:
            return self._abort(broken.reason)
        except _PeerAborted:
            return Ended.ABORTED
        except _Lost:
            return Ended.LOST if self._accepted else Ended.REFUSED
        finally:
            self._drop_message()

    def linger(self) -> None:
        """Wait a moment for the peer to close."""
        self._wire.linger()

    # Sta2 and Sta3

    def _negotiate(self) -> Ended | None:
        """Answer the association request; None when it is accepted."""
        kind, body = self._wire.read(LARGEST_REQUEST_BYTES - _PDU_HEAD.size, self._limits.association_timeout_s)
        if kind == Pdu.ABORT:
            raise _PeerAborted
        if kind != Pdu.ASSOCIATE_RQ:
            raise _Broken(_Broken.UNEXPECTED)
        request = _read_request(bytes(_PDU_HEAD.pack(kind, len(body))) + bytes(body))
        rejection = self._owner.admit(request.calling_ae_title, request.called_ae_title)
        if rejection is not None:
            self._wire.send(_pack_rejection(rejection))
            return Ended.REJECTED
        results, _ = negotiate_as_acceptor(request.presentation_context_definition_list, list(self._supported))
        self._wire.send(_pack_acceptance(request, results, self._limits.max_pdu_bytes))
        for context in results:
            if context.result == 0 and context.context_id is not None:
                self._accepted[context.context_id] = str(context.abstract_syntax), str(context.transfer_syntax[0])
        self._wire.wait_at_most(self._limits.network_timeout_s)
        return None

    # Sta6

    def _transfer(self) -> Ended:
        """Data transfer until the peer releases."""
        largest = self._limits.max_pdu_bytes + PDU_MARGIN_BYTES
        while True:
            kind, body = self._wire.read(largest, self._limits.network_timeout_s)
            if kind == Pdu.DATA:
                self._take_data(body)
            elif kind == Pdu.RELEASE_RQ:
                self._wire.send(A_RELEASE_RP().encode())
                return Ended.RELEASED
            elif kind == Pdu.ABORT:
                raise _PeerAborted
            else:
                raise _Broken(_Broken.UNEXPECTED if kind <= Pdu.ABORT else _Broken.UNRECOGNISED)

    def _take_data(self, body: memoryview) -> None:
        """Each presentation data value of a P-DATA-TF (PS3.8 section 9.3.5, annex E)."""
        offset = 0
        while offset < len(body):
            if offset + _PDV_HEAD.size > len(body):
                raise _Broken(_Broken.INVALID_VALUE)
            length, context, control = _PDV_HEAD.unpack_from(body, offset)
            end = offset + 4 + length
            if length < 2 or end > len(body) or context not in self._accepted:
                raise _Broken(_Broken.INVALID_VALUE)
            self._take_value(context, control, body[offset + _PDV_HEAD.size : end])
            offset = end

    def _take_value(self, context: int, control: int, value: memoryview) -> None:
        """One fragment: bit 0 of the control header tells command from data set, bit 1 the last fragment."""
        message = self._message
        if message is None:
            message = self._message = _Message(context, time.monotonic())
        is_command, is_last = bool(control & 1), bool(control & 2)
        if context != message.context or is_command != (message.elements is None):
            raise _Broken(_Broken.INVALID_VALUE)
        if is_command:
            message.command += value
            if len(message.command) > LARGEST_COMMAND_BYTES:
                raise _Broken(_Broken.INVALID_VALUE)
        else:
            self._take_dataset(message, value)
        if is_last:
            self._finish_part(message)

    def _take_dataset(self, message: _Message, value: memoryview) -> None:
        """A fragment of a data set; beyond what may be kept it is counted and dropped."""
        message.size_bytes += len(value)
        if message.kept and not self._may_keep(message):
            message.kept = False
            message.dataset = bytearray()
            self._memory.give(message.taken_bytes)
            message.taken_bytes = 0
        if message.kept:
            message.dataset += value
        elif message.size_bytes > 2 * self._limits.max_instance_bytes:
            raise _Broken(_Broken.INVALID_VALUE)
        waited_s = time.monotonic() - message.began
        if waited_s > self._limits.network_timeout_s and message.size_bytes < LEAST_BYTES_PER_S * waited_s:
            raise _Lost

    def _may_keep(self, message: _Message) -> bool:
        """Whether size and memory allow the data set to grow to its new size."""
        if message.size_bytes > self._limits.max_instance_bytes:
            return False
        if message.size_bytes <= message.taken_bytes:
            return True
        step = max(1 << 20, message.size_bytes // 4)
        if not self._memory.take(step):
            return False
        message.taken_bytes += step
        return True

    def _finish_part(self, message: _Message) -> None:
        """The command or the data set is whole: answer if that was all."""
        try:
            if message.elements is None:
                message.elements = read_command(message.command)
                if _number(message.elements, 0x0800) != _NO_DATASET:
                    return
            answer = self._answer(message, message.elements)
            response = pack_response(message.context, message.elements, answer) if answer else b""
        except ValueError:
            raise _Broken(_Broken.INVALID_VALUE) from None
        self._drop_message()
        self._wire.send(response)

    def _answer(self, message: _Message, command: dict[int, bytes]) -> Answer | None:
        """What to say to a whole message; None for what gets no answer."""
        operation = _number(command, 0x0100)
        if operation == _C_ECHO:
            return Answer(0x0000)
        if operation == _C_CANCEL or operation & _RESPONSE:
            return None
        if operation != _C_STORE:
            return Answer(0x0211, "only C-ECHO and C-STORE are offered here")
        abstract, transfer = self._accepted[message.context]
        request = StoreRequest(
            sop_class_uid=_uid(command, 0x0002),
            sop_instance_uid=_uid(command, 0x1000),
            abstract_syntax_uid=abstract,
            transfer_syntax_uid=transfer,
            dataset=message.dataset,
            size_bytes=message.size_bytes,
            kept=message.kept,
        )
        return self._owner.store(request)

    def _drop_message(self) -> None:
        if self._message:
            self._memory.give(self._message.taken_bytes)
            self._message = None

    def _abort(self, reason: int) -> Ended:
        """Tell the peer that it broke the protocol (AA-8)."""
        primitive = A_P_ABORT()
        primitive.provider_reason = reason
        with suppress(_Lost):
            self._wire.send(A_ABORT_RQ(primitive).encode())
        return Ended.ABORTED


def _read_request(data: bytes) -> A_ASSOCIATE:
    """The association request, parsed by pynetdicom.

    Raises:
        _Broken: pynetdicom cannot read it. Its parser raises whatever its helpers raise, so every error means that.
    """
    try:
        pdu = A_ASSOCIATE_RQ()
        pdu.decode(data)
        request = pdu.to_primitive()
    except Exception:  # noqa: BLE001  (the border to a parser fed by the network)
        raise _Broken(_Broken.INVALID_VALUE) from None
    if not request.presentation_context_definition_list:
        raise _Broken(_Broken.INVALID_VALUE)
    return request


def _pack_rejection(rejection: Rejection) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.result, primitive.result_source, primitive.diagnostic = rejection.to_bytes(3, "big")
    return A_ASSOCIATE_RJ(primitive).encode()


def _pack_acceptance(request: A_ASSOCIATE, results: list[PresentationContext], max_pdu_bytes: int) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.application_context_name = _APPLICATION_CONTEXT
    primitive.calling_ae_title = request.calling_ae_title
    primitive.called_ae_title = request.called_ae_title
    primitive.result, primitive.result_source = 0, 1
    primitive.presentation_context_definition_results_list = results
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = max_pdu_bytes
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    primitive.user_information = [length, implementation]
    return A_ASSOCIATE_AC(primitive).encode()
