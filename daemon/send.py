"""`rescan send FOLDER HOST:PORT`: push DICOM files as a scanner would, and say what the receiver answered."""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from daemon.config import split_address
from daemon.dicom_file import as_part10
from daemon.header import PARSE_FAILURES
from daemon.volume import find_files

MAX_CONTEXTS = 128
"""Presentation contexts that one association can propose (PS3.8 9.3.2.2)."""

SUCCESS = 0x0000
NOT_SENT = -1
TIMEOUT_S = 60.0


class SendError(Exception):
    """The receiver could not be reached or refused; one line with the remedy."""


@dataclass
class Sent:
    """What became of the images.

    Attributes:
        statuses: DIMSE status -> how many images it answered; `NOT_SENT` for those that could not be sent.
        seconds: from the first request to the last answer.
        last_success_at: seconds since 1970 of the last 0x0000.
    """

    statuses: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    last_success_at: float | None = None

    def note(self, status: int) -> None:
        """Count one answer."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == SUCCESS:
            self.last_success_at = time.time()

    @property
    def ok(self) -> bool:
        """Whether every image was answered with success."""
        return set(self.statuses) <= {SUCCESS}


@dataclass(frozen=True)
class Caller:
    """Who sends to whom.

    Attributes:
        host, port: of the receiver.
        called, calling: AE titles.
    """

    host: str
    port: int
    called: str = "RESCAN"
    calling: str = "SIMULATOR"

    def associate(self, datasets: Iterable[Dataset]) -> Association:
        """Open an association that can carry these datasets.

        Raises:
            SendError: nobody answers, or the association is refused.
        """
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
        ae = AE(ae_title=self.calling)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = TIMEOUT_S
        ae.connection_timeout = 10.0
        ae.requested_contexts = contexts_for(datasets)
        assoc = ae.associate(self.host, self.port, ae_title=self.called)
        if assoc.is_established:
            keep_answers(assoc)
            return assoc
        where = f"{self.host}:{self.port}"
        if assoc.is_rejected:
            raise SendError(
                f"{where} refused the association of {self.calling!r} to {self.called!r}; allow this caller there"
            )
        raise SendError(f"{where}: nobody answers there; check that the receiver runs and the port is right")


def keep_answers(assoc: Association) -> None:
    """See that answers reach whoever waits for them.

    pynetdicom (3.0.4) pauses its reactor thread while a request waits for its answer, but takes the thread for paused a
    moment before it is; on a busy machine the thread then takes the answer and drops it, and the request waits out its
    limit. A requestor is sent nothing but answers, so its reactor need not take any message.
    """
    take = assoc.dimse.get_msg

    def get_msg(block: bool = False) -> Any:
        return take(block) if block else (None, None)

    assoc.dimse.get_msg = get_msg  # type: ignore[method-assign]


def contexts_for(datasets: Iterable[Dataset]) -> list[Any]:
    """Presentation contexts for the SOP classes and encodings of some datasets, an uncompressed one beside each."""
    wanted: dict[tuple[str, str], None] = {}
    for ds in datasets:
        wanted[str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID)] = None
    for sop_class, _ in list(wanted):
        wanted[sop_class, str(ExplicitVRLittleEndian)] = None
        wanted[sop_class, str(ImplicitVRLittleEndian)] = None
    return [build_context(sop_class, syntax) for sop_class, syntax in list(wanted)[:MAX_CONTEXTS]]


def store(assoc: Association, ds: Dataset, sent: Sent) -> int:
    """Send one image and note the answer.

    Returns:
        The status, `NOT_SENT` where the receiver takes no such image or is gone.
    """
    try:
        answer = assoc.send_c_store(ds)
        status = int(answer.Status) if "Status" in answer else NOT_SENT
    except (ValueError, RuntimeError, AttributeError):
        status = NOT_SENT
    sent.note(status)
    return status


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan send`."""
    parser = subparsers.add_parser(
        "send",
        help="push a DICOM folder as a scanner would",
        description="Push every DICOM file in a folder by C-STORE, one association for each series.",
        epilog="examples:\n  rescan send dicom_folder 127.0.0.1:11112\n"
        "  rescan send dicom_folder 10.0.0.5:11112 --calling MRC12345 --association image",
    )
    parser.add_argument("folder", type=Path, help="DICOM folder or file")
    parser.add_argument("address", metavar="HOST:PORT", help="of the receiver")
    parser.add_argument("--called", default="RESCAN", help="AE title of the receiver (default: RESCAN)")
    parser.add_argument("--calling", default="SIMULATOR", help="AE title to call with (default: SIMULATOR)")
    parser.add_argument(
        "--association", choices=("image", "series", "study"), default="series", help="one for each (default: series)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Send, report."""
    host, port = split_address(args.address, "HOST:PORT")
    if not args.folder.exists():
        print(f"rescan send: {args.folder}: no such file or folder; name a DICOM folder", file=sys.stderr)
        return 1
    caller = Caller(host, port, args.called, args.calling)
    sent = Sent()
    try:
        for files in batches(args.folder, args.association):
            send_files(files, caller, sent)
    except SendError as error:
        print(f"rescan send: {error}", file=sys.stderr)
        return 1
    return report("send", args.folder, sent)


def report(command: str, what: object, sent: Sent) -> int:
    """Say what became of the images; 0 where all were answered with success."""
    total = sum(sent.statuses.values())
    if total == 0:
        print(f"rescan {command}: {what}: no DICOM image found; name a folder with DICOM files", file=sys.stderr)
        return 1
    rate = total / sent.seconds if sent.seconds > 0 else 0.0
    print(f"sent {total} images in {sent.seconds:.1f} s ({rate:.0f} per second)", file=sys.stderr)
    for status, count in sorted(sent.statuses.items()):
        words = "not taken by the receiver" if status == NOT_SENT else f"answered 0x{status:04X}"
        print(f"  {count} {words}", file=sys.stderr)
    return 0 if sent.ok else 1


def batches(folder: Path, association: str) -> list[list[Path]]:
    """The files of each association, in the order of their names."""
    grouped: dict[str, list[Path]] = {}
    for path in sorted(find_files(folder)):
        ds = read_file(path, headers_only=True)
        if ds is None:
            continue
        name = {
            "image": str(path),
            "series": str(ds.get("SeriesInstanceUID")),
            "study": str(ds.get("StudyInstanceUID")),
        }
        grouped.setdefault(name[association], []).append(path)
    return list(grouped.values())


def read_file(path: Path, *, headers_only: bool = False) -> Dataset | None:
    """A DICOM file, None where it is none or cannot be read."""
    try:
        data = as_part10(path.read_bytes())
        ds: Dataset = dcmread(io.BytesIO(data or b""), stop_before_pixels=headers_only)
    except (InvalidDicomError, OSError, *PARSE_FAILURES):
        return None
    return ds if "SOPClassUID" in ds and "SOPInstanceUID" in ds else None


def send_files(files: Sequence[Path], caller: Caller, sent: Sent) -> None:
    """Send files on one association.

    Raises:
        SendError: the receiver cannot be reached or refuses.
    """
    headers = [ds for ds in (read_file(path, headers_only=True) for path in files) if ds is not None]
    started = time.monotonic()
    assoc = caller.associate(headers)
    for path in files:
        ds = read_file(path)
        if ds is None:
            sent.note(NOT_SENT)
            continue
        store(assoc, ds, sent)
    assoc.release()
    sent.seconds += time.monotonic() - started
