"""Reception: C-ECHO and C-STORE in, durable in the spool, status out. Never waits for what happens to the images.

Every storage SOP class is accepted, because a refused context can show up as a failed job at the console; what is not an
MR image is kept and not scored. Bytes are kept exactly as received. Nothing that the network says reaches a log line, a
metric or a file name, except through the site's own list of scanners.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from pydicom.uid import UID
from pynetdicom import AllStoragePresentationContexts, build_context
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from daemon.association import Answer, Association, Ended, Limits, Rejection, StoreRequest
from daemon.config import UNKNOWN_SCANNER, DicomSettings, ScannerSettings, Settings
from daemon.log import Log
from daemon.reader import spool_folder
from daemon.spool import Kept, SpoolError, SpoolFull, SpoolWriter

TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
)
"""Accepted, best first. Deflated Explicit VR is left out on purpose: it inflates without bound. So are the video ones."""

MEMORY_BYTES = 1 << 30
"""What data sets on their way in may hold together; more where one instance may be larger than this."""

GRACE_S = 5.0
"""What associations get to finish when the receiver stops; new ones are rejected as transient meanwhile."""

REPORT_S = 0.05
"""Longest wait of a report to the main process."""

_UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(\.[0-9]+)*")  # leading zeros are forgiven, as many senders write them
_SPARE_CONNECTIONS = 16
_SEAL_EVERY_S = 60.0
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_IMPLICIT = "1.2.840.10008.1.2"
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SOP_CLASS_UID, _SOP_INSTANCE_UID = 0x00080016, 0x00080018
_HEADER_SCAN_ELEMENTS = 64


# --- What is answered -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """One DIMSE status that a C-STORE can end with.

    Attributes:
        code: as sent.
        label: value of the label `status` of `rescan_instances_received_total`.
        meaning: when it is sent, for the conformance statement.
    """

    code: int
    label: str
    meaning: str


STATUSES = {
    "stored": Status(0x0000, "stored", "The instance is on stable storage, whether it will be scored or not."),
    "duplicate": Status(0x0000, "duplicate", "The same bytes are on stable storage already."),
    "conflict": Status(
        0x0000, "conflict", "Stored beside an instance with the same SOP Instance UID and other content."
    ),
    "full": Status(
        0xA700, "a700", "Out of resources: quota or free-space reserve reached, memory short, or the disk failed."
    ),
    "too_large": Status(0xA701, "a701", "Out of resources: the instance is longer than max_instance_bytes."),
    "mismatch": Status(
        0xA900, "a900", "The data set is missing, or its SOP Class or Instance UID is missing or not the command's."
    ),
    "unreadable": Status(0xC000, "c000", "The data set cannot be read as far as its SOP Instance UID."),
    "bad_uid": Status(
        0x0117, "0117", "Invalid SOP instance: a UID that is not numbers with dots between, up to 64 characters."
    ),
    "wrong_class": Status(
        0x0122, "0122", "SOP class not supported: the command's class is not the presentation context's."
    ),
    "failed": Status(0x0110, "0110", "Processing failure: an unexpected error inside the receiver."),
}
"""Every outcome of a C-STORE, once; the conformance statement is tested against this."""


class Refused(Exception):
    """An instance that is not taken: a key of `STATUSES`, with what goes into the response."""

    def __init__(self, outcome: str, comment: str, offending: tuple[int, ...] = ()) -> None:
        super().__init__(f"{outcome}: {comment}")
        self.outcome, self.comment, self.offending = outcome, comment, offending


def check_request(request: StoreRequest) -> None:
    """Refuse what cannot be kept under its own name.

    Raises:
        Refused: with the status to answer.
    """
    for tag, value in ((0x00000002, request.sop_class_uid), (0x00001000, request.sop_instance_uid)):
        if not _UID.fullmatch(value):
            raise Refused("bad_uid", "a UID is up to 64 characters: numbers with dots between", (tag,))
    if request.sop_class_uid != request.abstract_syntax_uid:
        raise Refused("wrong_class", "the SOP class is not the one of the presentation context", (0x00000002,))
    if request.size_bytes == 0:
        raise Refused("mismatch", "the command came without a data set")
    try:
        uids = dataset_uids(request.dataset, request.transfer_syntax_uid)
    except ValueError:
        raise Refused("unreadable", "the data set cannot be read up to (0008,0018)") from None
    expected = {_SOP_CLASS_UID: request.sop_class_uid, _SOP_INSTANCE_UID: request.sop_instance_uid}
    differing = tuple(tag for tag, uid in expected.items() if uids.get(tag) != uid)
    if differing:
        raise Refused("mismatch", "SOP UIDs of data set and command differ", differing)


def dataset_uids(dataset: bytes | bytearray | memoryview, transfer_syntax_uid: str) -> dict[int, str]:
    """SOPClassUID and SOPInstanceUID of a data set: tag -> value; absent where the element is.

    Reads no further than (0008,0018), and none of the values before it.

    Raises:
        ValueError: not a data set in this transfer syntax.
    """
    order = ">" if transfer_syntax_uid == _BIG_ENDIAN else "<"
    explicit = transfer_syntax_uid != _IMPLICIT
    found: dict[int, str] = {}
    offset = 0
    for _ in range(_HEADER_SCAN_ELEMENTS):
        if offset == len(dataset):
            return found
        tag, start, length = _element(dataset, offset, order, explicit)
        if tag > _SOP_INSTANCE_UID:
            return found
        end = _after_undefined(dataset, start, order) if length == _UNDEFINED else start + length
        if end > len(dataset):
            raise ValueError(f"data set: element {tag:08x} ends beyond it")
        if tag in (_SOP_CLASS_UID, _SOP_INSTANCE_UID):
            found[tag] = bytes(dataset[start:end]).decode("ascii", "replace").rstrip("\0 ")
        offset = end
    raise ValueError(f"data set: more than {_HEADER_SCAN_ELEMENTS} elements before (0008,0018)")


_UNDEFINED = 0xFFFFFFFF


def _element(data: bytes | bytearray | memoryview, offset: int, order: str, explicit: bool) -> tuple[int, int, int]:
    """Tag, start of the value and its length."""
    try:
        group, element = struct.unpack_from(f"{order}HH", data, offset)
        vr = bytes(data[offset + 4 : offset + 6])
        if not explicit or group == 0xFFFE:
            (length,), start = struct.unpack_from(f"{order}I", data, offset + 4), offset + 8
        elif vr in _LONG_VRS:
            (length,), start = struct.unpack_from(f"{order}I", data, offset + 8), offset + 12
        elif vr.isalpha() and vr.isupper():
            (length,), start = struct.unpack_from(f"{order}H", data, offset + 6), offset + 8
        else:
            raise ValueError("data set: no value representation where one must stand")
    except struct.error:
        raise ValueError("data set: ends inside an element") from None
    return group << 16 | element, start, length


def _after_undefined(data: bytes | bytearray | memoryview, start: int, order: str) -> int:
    """Where a sequence of undefined length ends: after the sequence delimiter that closes it.

    Only language codes (0008,0006) can stand this early, in a flat sequence; anything deeper is refused as unreadable.
    """
    delimiter = struct.pack(f"{order}HHI", 0xFFFE, 0xE0DD, 0)
    at = bytes(data[start : start + 65536]).find(delimiter)
    if at < 0:
        raise ValueError("data set: a sequence before (0008,0018) does not end")
    return start + at + len(delimiter)


# --- Who may send -----------------------------------------------------------------------------------------------------


def scanner_of(scanners: Sequence[ScannerSettings], calling_ae_title: str, address: str) -> str | None:
    """The slug of the caller: "unknown" where no list is kept, None for a caller that a list does not name.

    Both the AE title and the address must fit: a title alone is no proof of who calls.
    """
    if not scanners:
        return UNKNOWN_SCANNER
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    for scanner in scanners:
        network = ipaddress.ip_network(scanner.address, strict=False)
        if scanner.ae_title.strip() == calling_ae_title.strip() and ip in network:
            return scanner.slug
    return None


def supported_contexts(private_sop_classes: Sequence[str] = ()) -> list[PresentationContext]:
    """Verification and all storage SOP classes, standard and private, with the transfer syntaxes accepted for each."""
    storage = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    classes = [str(Verification), *dict.fromkeys([*storage, *private_sop_classes])]
    return [build_context(UID(uid), list(TRANSFER_SYNTAXES)) for uid in classes]


def quiet_pynetdicom() -> None:
    """Keep pynetdicom's log silent: it quotes what peers send."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)


# --- Telling the main process -----------------------------------------------------------------------------------------


class Reports:
    """What happened, gathered and sent to the main process a few times a second, so that no handler waits for it."""

    def __init__(self, send: Callable[[dict[str, object]], None]) -> None:
        """Start the sender.

        Args:
            send: gives one message to the main process; may block. After an OSError nothing more is sent.
        """
        self._send, self._lock, self._news, self._ended = send, threading.Lock(), threading.Event(), threading.Event()
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self._values: list[tuple[str, tuple[tuple[str, str], ...], float]] = []
        self._position = 0
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter."""
        with self._lock:
            self._counts[metric, tuple(labels.items())] += amount  # type: ignore[assignment]
        self._wake()

    def value(self, metric: str, value: float, **labels: str) -> None:
        """Set a gauge, or add an observation to a histogram."""
        with self._lock:
            self._values.append((metric, tuple(labels.items()), value))
        self._wake()

    def stored(self, position: int) -> None:
        """Something up to this position can be followed in the spool."""
        with self._lock:
            self._position = max(self._position, position)
        self._wake()

    def _wake(self) -> None:
        if not self._news.is_set():  # setting is costly, and most calls come while it is set
            self._news.set()

    def close(self) -> None:
        """Send what is left."""
        self._ended.set()
        self._news.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        with suppress(OSError):
            while not self._ended.is_set():
                self._news.wait()
                self._ended.wait(REPORT_S)
                self._news.clear()
                self._flush()
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
            values, self._values = self._values, []
            position, self._position = self._position, 0
        if position:
            self._send({"kind": "stored", "position": position})
        for metric, labels, value in [*((m, tags, v) for (m, tags), v in counts.items()), *values]:
            self._send({"kind": "count", "metric": metric, "labels": dict(labels), "value": value})


class _Budget:
    """Memory that all data sets on their way in share."""

    def __init__(self, size_bytes: int) -> None:
        self._left, self._lock = size_bytes, threading.Lock()

    def take(self, size_bytes: int) -> bool:
        with self._lock:
            if size_bytes > self._left:
                return False
            self._left -= size_bytes
            return True

    def give(self, size_bytes: int) -> None:
        with self._lock:
            self._left += size_bytes


# --- The receiver -----------------------------------------------------------------------------------------------------


class _Visit:
    """One association as the receiver sees it: whose it is, and what it brought."""

    def __init__(self, receiver: Receiver, address: str) -> None:
        self._receiver, self._address = receiver, address
        self.scanner = UNKNOWN_SCANNER
        self.number = 0
        self.admitted = self.stored = False

    def admit(self, calling_ae_title: str, called_ae_title: str) -> Rejection | None:
        """Decide, and count it in."""
        receiver = self._receiver
        scanner = scanner_of(receiver.scanners, calling_ae_title, self._address)
        if scanner is None:
            return Rejection.CALLING_AE_TITLE
        self.scanner = scanner
        settings = receiver.settings
        if settings.require_called_ae_title and called_ae_title.strip() != settings.ae_title.strip():
            return Rejection.CALLED_AE_TITLE
        if not receiver.enter(self):
            return Rejection.LOCAL_LIMIT
        self.number = receiver.spool.next_association()
        self.admitted = True
        return None

    def store(self, request: StoreRequest) -> Answer:
        """Keep an instance and say what became of it."""
        began = time.monotonic()
        reports = self._receiver.reports
        comment, offending = "", ()  # type: str, tuple[int, ...]
        try:
            outcome = self._keep(request)
        except Refused as refused:
            outcome, comment, offending = refused.outcome, refused.comment, refused.offending
        except SpoolFull:
            outcome, comment = "full", "no room; what is held is kept"
        except SpoolError:
            outcome, comment = "full", "the disk failed; send again"
        except Exception as error:  # noqa: BLE001  (the border to the network: one bad instance ends nothing else)
            self._receiver.log.failure(error, process="receiver", step="store")
            outcome, comment = "failed", "unexpected error"
        status = STATUSES[outcome]
        reports.count("instances_received_total", scanner=self.scanner, status=status.label)
        reports.value("store_duration_seconds", time.monotonic() - began, scanner=self.scanner)
        return Answer(status.code, comment, offending)

    def _keep(self, request: StoreRequest) -> str:
        """Store an instance; returns the outcome."""
        receiver = self._receiver
        if request.size_bytes > receiver.settings.max_instance_bytes:
            raise Refused("too_large", "longer than max_instance_bytes")
        if not request.kept:
            raise Refused("full", "too much is coming in at the same time; send again")
        check_request(request)
        stored, kept = receiver.spool.append_instance(
            request.dataset,
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            scanner=self.scanner,
            association=self.number,
        )
        self.stored = True
        receiver.reports.stored(stored.position)
        if kept is not Kept.DUPLICATE:
            receiver.reports.count("receive_bytes_total", stored.size_bytes, scanner=self.scanner)
        receiver.reports.value("last_instance_timestamp_seconds", time.time(), scanner=self.scanner)
        return str(kept)

    def ended(self, how: Ended) -> None:
        """Count it out, and keep that it is over if it brought something."""
        receiver = self._receiver
        if self.stored:
            with suppress(SpoolError):  # evidence only; quiet time takes its place
                released = how is Ended.RELEASED
                record = receiver.spool.append_association_ended(self.number, self.scanner, released)
                receiver.reports.stored(record.position)
        receiver.reports.count("associations_total", scanner=self.scanner, result=str(how))
        if self.admitted:
            receiver.leave(self)


class Receiver:
    """Listens, and gives each connection a thread."""

    def __init__(
        self,
        settings: DicomSettings,
        scanners: Sequence[ScannerSettings],
        spool: SpoolWriter,
        reports: Reports,
        log: Log,
    ) -> None:
        """Get ready; `listen` opens the port, `serve` takes connections until `stop`."""
        self.settings, self.scanners, self.spool, self.reports, self.log = settings, scanners, spool, reports, log
        self._limits = Limits(
            max_pdu_bytes=settings.max_pdu_bytes,
            max_instance_bytes=settings.max_instance_bytes,
            association_timeout_s=settings.association_timeout_s,
            network_timeout_s=settings.network_timeout_s,
        )
        self._contexts = supported_contexts(settings.private_sop_classes)
        self._memory = _Budget(max(MEMORY_BYTES, settings.max_instance_bytes + (settings.max_instance_bytes >> 2)))
        self._state = threading.Condition()
        self._visits: set[_Visit] = set()
        self._connections: dict[socket.socket, str] = {}
        self._stopping = False
        self._listener: socket.socket | None = None

    def listen(self) -> tuple[str, int]:
        """Open the port.

        Returns:
            Host and port, the chosen one where the settings say 0.

        Raises:
            OSError: the address cannot be used.
        """
        family = socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET
        self._listener = socket.create_server((self.settings.host, self.settings.port), family=family, backlog=128)
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def serve(self) -> None:
        """Take connections until the port is closed."""
        listener = self._listener
        while listener is not None:
            try:
                connection, peer = listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if self._stopping or listener.fileno() < 0:
                    return
                self.log.failure(error, process="receiver", step="accept")
                time.sleep(0.1)  # out of file descriptors or memory: let associations end
                continue
            self._start(connection, str(peer[0]))

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Reject new associations, let running ones finish for a while, then cut them and close the port."""
        deadline = time.monotonic() + grace_s
        with self._state:
            self._stopping = True
            while self._visits and (left := deadline - time.monotonic()) > 0:
                self._state.wait(left)
        if self._listener:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._state:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._state.wait_for(lambda: not self._connections, timeout=grace_s)

    def enter(self, visit: _Visit) -> bool:
        """Whether one more association fits."""
        with self._state:
            if self._stopping or len(self._visits) >= self.settings.max_associations:
                return False
            self._visits.add(visit)
            self._report_active(visit.scanner)
            return True

    def leave(self, visit: _Visit) -> None:
        """An association is over."""
        with self._state:
            self._visits.discard(visit)
            self._report_active(visit.scanner)
            self._state.notify_all()

    def _report_active(self, scanner: str) -> None:
        active = sum(visit.scanner == scanner for visit in self._visits)
        self.reports.value("associations_active", active, scanner=scanner)

    def _start(self, connection: socket.socket, address: str) -> None:
        """A thread for a connection, unless there are too many; half of all places is the most for one address."""
        most = self.settings.max_associations
        with self._state:
            from_there = sum(known == address for known in self._connections.values())
            crowded = len(self._connections) >= most + _SPARE_CONNECTIONS
            if crowded or from_there >= max(_SPARE_CONNECTIONS, most // 2):
                connection.close()
                self.reports.count("associations_total", scanner=UNKNOWN_SCANNER, result=str(Ended.REFUSED))
                return
            self._connections[connection] = address
        threading.Thread(target=self._attend, args=(connection, address), name="association", daemon=True).start()

    def _attend(self, connection: socket.socket, address: str) -> None:
        """One connection from beginning to end."""
        visit = _Visit(self, address)
        ended = Ended.LOST
        try:
            association = Association(connection, self._limits, self._contexts, visit, self._memory)
            ended = association.run()
            visit.ended(ended)
            if ended is not Ended.LOST:
                association.linger()
        except Exception as error:  # noqa: BLE001  (the border to the network: one bad peer ends nothing else)
            self.log.failure(error, process="receiver", step="association")
            visit.ended(Ended.LOST)
        finally:
            connection.close()
            with self._state:
                self._connections.pop(connection, None)
                self._state.notify_all()


# --- The process ------------------------------------------------------------------------------------------------------


def open_spool(settings: Settings) -> SpoolWriter:
    """The spool of these settings, for its one writer."""
    spool = settings.spool
    return SpoolWriter(spool_folder(settings), spool.quota_bytes, spool.reserve_bytes, spool.segment_bytes)


def run_receiver(settings: Settings, control: Connection) -> None:
    """Be the receiver process until the main process says stop or goes away.

    Sends `{"kind": "listening", "host", "port"}`, `{"kind": "stored", "position"}` (a wake-up: follow the spool) and
    `{"kind": "count", "metric", "labels", "value"}`; where it cannot start, `{"kind": "failed", "text"}`.
    """
    quiet_pynetdicom()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = Log(settings.log.format)
    try:
        spool = open_spool(settings)
    except SpoolError as error:
        control.send({"kind": "failed", "text": str(error)})
        return
    reports = Reports(control.send)
    receiver = Receiver(settings.dicom, settings.scanners, spool, reports, log)
    try:
        host, port = receiver.listen()
    except OSError as error:
        where = f"{settings.dicom.host}:{settings.dicom.port}"
        control.send(
            {"kind": "failed", "text": f"dicom: cannot listen on {where} ({error.strerror}); choose another port"}
        )
        spool.close()
        return
    control.send({"kind": "listening", "host": host, "port": port})
    threading.Thread(target=receiver.serve, name="accept", daemon=True).start()
    _wait_for_stop(control, spool)
    receiver.stop()
    spool.close()
    reports.close()


def _wait_for_stop(control: Connection, spool: SpoolWriter) -> None:
    """Return when told to stop or when the main process is gone; seal old segments meanwhile."""
    with suppress(EOFError, OSError):
        while True:
            if control.poll(_SEAL_EVERY_S) and control.recv().get("kind") == "stop":
                return
            spool.seal_aged()
