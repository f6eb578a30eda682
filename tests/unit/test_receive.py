"""What reception decides by value: who calls, what a data set says it is, which status goes out."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID
from pynetdicom import AllStoragePresentationContexts

from daemon.association import Answer, StoreRequest, pack_response, read_command
from daemon.config import ScannerSettings
from daemon.receive import (
    STATUSES,
    TRANSFER_SYNTAXES,
    Refused,
    Reports,
    check_request,
    dataset_uids,
    scanner_of,
    supported_contexts,
)
from tests.receiving import BIG_ENDIAN, EXPLICIT, IMPLICIT, MR, explicit_element, make_dataset, pack_command, uid

DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"
CLASS, INSTANCE = 0x00080016, 0x00080018


def encode(ds: Dataset, syntax: str) -> bytes:
    """A data set as pydicom writes it."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = syntax == IMPLICIT, syntax != BIG_ENDIAN
    write_dataset(out, ds)
    return out.getvalue()


def plain(instance: str = uid(5)) -> Dataset:
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SOPClassUID, ds.SOPInstanceUID = MR, instance
    ds.PatientName = "CANARY^PATIENT"
    return ds


def request(**changes: Any) -> StoreRequest:
    dataset = bytearray(changes.pop("dataset", make_dataset(uid(5))))
    facts: dict[str, Any] = {
        "sop_class_uid": MR,
        "sop_instance_uid": uid(5),
        "abstract_syntax_uid": MR,
        "transfer_syntax_uid": EXPLICIT,
        "dataset": dataset,
        "size_bytes": len(dataset),
        "kept": True,
    }
    return StoreRequest(**(facts | changes))


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN, JPEG_LOSSLESS])
def test_uids_are_read_from_each_encoding(syntax: str) -> None:
    """The walker finds what pydicom wrote, in every byte order and VR form."""
    assert dataset_uids(encode(plain(), syntax), syntax) == {CLASS: MR, INSTANCE: uid(5)}


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_a_sequence_before_the_uids_is_stepped_over(syntax: str, undefined: bool) -> None:
    """A language code sequence may stand first, with or without a length."""
    ds, item = plain(), Dataset()
    item.CodeValue, item.CodeMeaning = "en", "English"
    ds.LanguageCodeSequence = Sequence([item])
    ds["LanguageCodeSequence"].is_undefined_length = undefined
    item.is_undefined_length_sequence_item = undefined
    assert dataset_uids(encode(ds, syntax), syntax) == {CLASS: MR, INSTANCE: uid(5)}


def test_absent_uids_are_absent() -> None:
    """A data set that goes on, or ends, without them gives none."""
    assert dataset_uids(explicit_element(0x00100010, b"PN", b"A^B "), EXPLICIT) == {}
    assert dataset_uids(explicit_element(CLASS, b"UI", b"1.2\0"), EXPLICIT) == {CLASS: "1.2"}
    assert dataset_uids(b"", EXPLICIT) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\0\x16\0UI\x40",
        b"\x08\0\x16\0UI\xff\xff1.2",
        b"\x08\0\x16\0\xff\xff\x04\x001.2\0",
        b"\x08\0\x06\0SQ\0\0\xff\xff\xff\xff" + bytes(100),
        b"\x08\0\x05\0CS\0\0" * 100,
        bytes(7),
        b"\xff" * 300,
    ],
)
def test_broken_datasets_are_told_from_others(data: bytes) -> None:
    """Whatever cannot be walked is a ValueError, never a hang, a crash or a wrong UID."""
    with pytest.raises(ValueError, match="data set"):
        dataset_uids(data, EXPLICIT)


# --- statuses ---------------------------------------------------------------------------------------------------------


def test_a_proper_request_passes() -> None:
    """SOP UIDs of command, context and data set agree."""
    check_request(request())


@pytest.mark.parametrize(
    ("changes", "outcome", "code"),
    [
        ({"sop_instance_uid": "../../etc/passwd"}, "bad_uid", 0x0117),
        ({"sop_instance_uid": ""}, "bad_uid", 0x0117),
        ({"sop_instance_uid": "1." * 33}, "bad_uid", 0x0117),
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.2"}, "wrong_class", 0x0122),
        ({"sop_instance_uid": uid(6)}, "mismatch", 0xA900),
        ({"dataset": b""}, "mismatch", 0xA900),
        ({"dataset": explicit_element(0x00100010, b"PN", b"A^B ")}, "mismatch", 0xA900),
        ({"dataset": make_dataset(uid(5), sop_class="1.2.840.10008.5.1.4.1.1.2")}, "mismatch", 0xA900),
        ({"dataset": b"no data set at all"}, "unreadable", 0xC000),
        ({"transfer_syntax_uid": BIG_ENDIAN}, "mismatch", 0xA900),
        ({"transfer_syntax_uid": IMPLICIT, "dataset": make_dataset(uid(5))[:20]}, "unreadable", 0xC000),
    ],
)
def test_what_is_wrong_has_its_status(changes: dict[str, Any], outcome: str, code: int) -> None:
    """Each fault has the status of the conformance statement, and the comment repeats nothing that was sent."""
    with pytest.raises(Refused) as caught:
        check_request(request(**changes))
    assert caught.value.outcome == outcome
    assert STATUSES[outcome].code == code
    assert len(caught.value.comment) <= 64
    assert not any(str(value) in caught.value.comment for value in changes.values() if value)


def test_offending_elements_are_named() -> None:
    """A mismatch names the element that differs."""
    with pytest.raises(Refused) as caught:
        check_request(request(sop_instance_uid=uid(6)))
    assert caught.value.offending == (INSTANCE,)


def test_statuses_are_failures_or_plain_success() -> None:
    """No warning status is ever sent (senders take Bxxx for failures), and codes fit into two bytes."""
    for status in STATUSES.values():
        assert 0 <= status.code <= 0xFFFF
        assert status.code >> 12 != 0xB
        assert status.meaning.endswith(".")
    labels = [status.label for status in STATUSES.values()]
    assert len(set(labels)) == len(labels)


def test_metric_labels_of_statuses_are_on_the_list() -> None:
    """Every outcome can be counted under its own label."""
    from daemon.metrics import LABEL_VALUES

    assert {status.label for status in STATUSES.values()} <= LABEL_VALUES["status"]


# --- callers ----------------------------------------------------------------------------------------------------------

SCANNERS = (
    ScannerSettings(slug="mr1", ae_title="MRC1", address="10.1.2.3"),
    ScannerSettings(slug="mr2", ae_title="MRC2", address="10.1.4.0/24"),
    ScannerSettings(slug="mr6", ae_title="MRC6", address="fd00::/8"),
)


@pytest.mark.parametrize(
    ("title", "address", "slug"),
    [
        ("MRC1", "10.1.2.3", "mr1"),
        (" MRC1 ", "10.1.2.3", "mr1"),
        ("MRC1", "::ffff:10.1.2.3", "mr1"),
        ("MRC2", "10.1.4.77", "mr2"),
        ("MRC6", "fd00::1", "mr6"),
        ("MRC6", "fe80::1%eth0", None),
        ("MRC1", "10.1.2.4", None),
        ("MRC2", "10.1.2.3", None),
        ("mrc1", "10.1.2.3", None),
        ("", "10.1.2.3", None),
    ],
)
def test_title_and_address_name_the_scanner(title: str, address: str, slug: str | None) -> None:
    """Both must fit one entry; neither alone is enough."""
    assert scanner_of(SCANNERS, title, address) == slug


def test_without_a_list_everybody_is_unknown() -> None:
    """What the network says never becomes a name."""
    assert scanner_of((), "EVIL", "127.0.0.1") == "unknown"


def test_all_storage_classes_without_deflate() -> None:
    """Every standard storage class and the configured private ones, each with the explicit list."""
    private = "1.3.12.2.1107.5.9.1"
    contexts = {str(c.abstract_syntax): [str(t) for t in c.transfer_syntax] for c in supported_contexts([private])}
    expected = {str(c.abstract_syntax) for c in AllStoragePresentationContexts} | {private, "1.2.840.10008.1.1"}
    assert set(contexts) == expected
    assert DEFLATED not in TRANSFER_SYNTAXES
    for syntaxes in contexts.values():
        assert tuple(syntaxes) == TRANSFER_SYNTAXES
    for syntax in TRANSFER_SYNTAXES:
        assert UID(syntax).is_transfer_syntax
        assert not UID(syntax).is_deflated


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_response_can_be_read_by_pynetdicom() -> None:
    """Our hand-made C-STORE response is the one pynetdicom reads, with status, comment and offending element."""
    from pynetdicom.dimse_messages import DIMSEMessage
    from pynetdicom.pdu import P_DATA_TF

    command = read_command(
        pack_command(
            {
                0x0002: MR.encode() + b"\0" * (len(MR) % 2),
                0x0100: struct.pack("<H", 1),
                0x0110: struct.pack("<H", 77),
                0x0800: struct.pack("<H", 1),
                0x1000: b"1.2.3\0",
            }
        )
    )
    pdu = P_DATA_TF()
    pdu.decode(pack_response(5, command, Answer(0xA900, "differs", (INSTANCE,))))
    message = DIMSEMessage()
    assert message.decode_msg(pdu.to_primitive())
    response = message.message_to_primitive()
    assert type(response).__name__ == "C_STORE"
    assert (response.MessageIDBeingRespondedTo, response.Status) == (77, 0xA900)
    assert (response.AffectedSOPClassUID, response.AffectedSOPInstanceUID) == (MR, "1.2.3")
    assert response.ErrorComment == "differs"
    assert message.command_set.CommandGroupLength == len(encode(message.command_set, IMPLICIT)) - 12


@pytest.mark.parametrize("data", [b"\0", bytes(8) + b"\x10\0\x10\0\0\0\0\0", b"\0\0\0\1\xff\xff\xff\x7f"])
def test_broken_commands_are_refused(data: bytes) -> None:
    """A command set that lies about itself is a ValueError."""
    with pytest.raises(ValueError, match="command set"):
        read_command(data)


def test_reports_gather_and_end() -> None:
    """Counts add up, the position is the highest one, and nothing is lost at the end."""
    sent: list[dict[str, Any]] = []
    reports = Reports(sent.append)
    for position in (3, 9, 4):
        reports.stored(position)
        reports.count("instances_received_total", scanner="mr1", status="stored")
    reports.value("store_duration_seconds", 0.5, scanner="mr1")
    reports.close()
    assert max(m["position"] for m in sent if m["kind"] == "stored") == 9
    counted = [m["value"] for m in sent if m.get("metric") == "instances_received_total"]
    assert sum(counted) == 3
    assert [m["labels"] for m in sent if m.get("metric") == "store_duration_seconds"] == [{"scanner": "mr1"}]


def test_reports_survive_a_lost_main_process() -> None:
    """When the main process is gone, reporting ends quietly."""

    def gone(_: dict[str, Any]) -> None:
        raise BrokenPipeError

    reports = Reports(gone)
    reports.stored(1)
    reports.close()
    reports.stored(2)
