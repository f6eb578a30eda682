"""DICOM files as they lie about: with a preamble, without one, or the bare data set that some archives and exports leave."""

from __future__ import annotations

import struct

from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from daemon.elements import PREAMBLE_BYTES
from daemon.header import Header, read_header
from daemon.words import Refusal

_PREFIX = b"DICM"
_FIRST_GROUPS = (0x0008,)
"""A data set of an image begins here: everything below 0008 is file meta information or a command."""


def as_part10(data: bytes) -> bytes | None:
    """A file's bytes as a DICOM file with preamble and file meta information.

    Args:
        data: of any file.

    Returns:
        The same bytes where they are a DICOM file; with what they lack put before them where they are one without its
        beginning and name an image (SOPClassUID, SOPInstanceUID); None for anything else.
    """
    if data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == _PREFIX:
        return data
    found = _with_beginning(data)
    return found if found is not None and _names_an_image(found) else None


def _with_beginning(data: bytes) -> bytes | None:
    if data[:4] == _PREFIX:
        return bytes(PREAMBLE_BYTES) + data
    if len(data) < 8:
        return None
    little, big = (struct.unpack_from(f"{order}H", data)[0] for order in "<>")
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    if little == 0x0002 and explicit:
        return bytes(PREAMBLE_BYTES) + _PREFIX + data
    if little in _FIRST_GROUPS:
        return _meta(str(ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian)) + data
    return _meta(str(ExplicitVRBigEndian)) + data if big in _FIRST_GROUPS and explicit else None


def _meta(transfer_syntax_uid: str) -> bytes:
    """Zero preamble, prefix, and file meta information that says the encoding and no more."""
    value = transfer_syntax_uid.encode("ascii")
    value += b"\0" * (len(value) % 2)
    body = struct.pack("<HH2sH", 2, 0x0010, b"UI", len(value)) + value
    return bytes(PREAMBLE_BYTES) + _PREFIX + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(body)) + body


def _names_an_image(data: bytes) -> bool:
    try:
        header = read_header(data)
    except Refusal:
        return False
    return isinstance(header, Header) and bool(header.sop_class_uid and header.sop_instance_uid)
