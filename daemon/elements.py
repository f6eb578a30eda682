"""The elements of a data set that are asked for, picked out without parsing the rest.

A scanner's header holds hundreds of elements, most of them private; what is needed here is a few dozen. This walks the top
level by lengths alone and copies the wanted elements, byte for byte, into a small data set that pydicom then parses. What
it does not understand it leaves to pydicom as a whole.
"""

from __future__ import annotations

import struct
from collections.abc import Collection

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

PREAMBLE_BYTES = 128
UNDEFINED = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00010

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
"""Explicit value representations whose length takes four bytes (PS3.5 7.1.2)."""

_MAX_DEPTH = 32
_META_SYNTAX = b"\x02\x00\x10\x00UI"


class NotUnderstood(Exception):
    """The walk cannot go on; pydicom decides."""


def split_file(data: bytes) -> tuple[str, int]:
    """Transfer syntax of a DICOM file and where its data set begins.

    Raises:
        NotUnderstood: no such file.
    """
    start = PREAMBLE_BYTES + 4
    if data[PREAMBLE_BYTES:start] != b"DICM":
        raise NotUnderstood
    try:
        group, element, representation, size, length = struct.unpack_from("<HH2sHI", data, start)
    except struct.error:
        raise NotUnderstood from None
    if (group, element, representation, size) != (2, 0, b"UL", 4):
        raise NotUnderstood
    end = start + 12 + length
    at = data.find(_META_SYNTAX, start, end)
    if at < 0 or end > len(data):
        raise NotUnderstood
    value = at + len(_META_SYNTAX) + 2
    size = int.from_bytes(data[value - 2 : value], "little")
    return data[value : value + size].rstrip(b"\x00 ").decode("ascii", "replace"), end


def pick(
    data: bytes, start: int, transfer_syntax_uid: str, wanted: Collection[int], last: int
) -> tuple[bytes, int, int]:
    """Copy elements of a data set.

    Args:
        data: holds the data set from `start` to the end.
        start: where it begins.
        transfer_syntax_uid: how it is encoded.
        wanted: tags as numbers, 0xGGGGEEEE.
        last: nothing beyond this tag is looked at.

    Returns:
        The wanted elements in their order and encoding; where the value of PixelData begins and its length, if that is
        the element at which the walk ended, else 0 and 0.

    Raises:
        NotUnderstood: an encoding or a length that makes no sense.
    """
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        raise NotUnderstood
    walk = _Walk(data, transfer_syntax_uid == ImplicitVRLittleEndian, transfer_syntax_uid == ExplicitVRBigEndian)
    kept: list[bytes] = []
    at = start
    try:
        while at < len(data):
            tag, body, length = walk.head(at)
            if tag > last:
                return b"".join(kept), *((body, length) if tag == PIXEL_DATA else (0, 0))
            end = body + length if length != UNDEFINED else walk.after_sequence(body, 0)
            if end > len(data):
                raise NotUnderstood
            if tag in wanted:
                kept.append(data[at:end])
            at = end
    except struct.error:
        raise NotUnderstood from None
    return b"".join(kept), 0, 0


class _Walk:
    """Element headers of one encoding."""

    def __init__(self, data: bytes, implicit: bool, big: bool) -> None:
        order = ">" if big else "<"
        self.data = data
        self.implicit = implicit
        self.tag_length = struct.Struct(f"{order}HHI").unpack_from
        self.tag_representation = struct.Struct(f"{order}HH2sH").unpack_from
        self.length = struct.Struct(f"{order}I").unpack_from

    def head(self, at: int) -> tuple[int, int, int]:
        """Tag, where the value begins, its length."""
        if self.implicit:
            group, element, length = self.tag_length(self.data, at)
            return group << 16 | element, at + 8, length
        group, element, representation, length = self.tag_representation(self.data, at)
        tag = group << 16 | element
        if group == 0xFFFE:
            return tag, at + 8, self.length(self.data, at + 4)[0]
        if representation in _LONG:
            return tag, at + 12, self.length(self.data, at + 8)[0]
        if not (65 <= representation[0] <= 90 and 65 <= representation[1] <= 90):
            raise NotUnderstood
        return tag, at + 8, length

    def after_sequence(self, at: int, depth: int) -> int:
        """The end of a sequence of undefined length whose first item begins here."""
        if depth > _MAX_DEPTH:
            raise NotUnderstood
        while True:
            tag, body, length = self.head(at)
            if tag == _SEQUENCE_END:
                return body
            if tag != _ITEM:
                raise NotUnderstood
            at = body + length if length != UNDEFINED else self.after_item(body, depth + 1)

    def after_item(self, at: int, depth: int) -> int:
        """The end of an item of undefined length whose first element begins here."""
        while True:
            tag, body, length = self.head(at)
            if tag == _ITEM_END:
                return body
            at = body + length if length != UNDEFINED else self.after_sequence(body, depth)
