"""Reception over real sockets: proper senders, clumsy senders, and peers that mean harm."""

from __future__ import annotations

import errno
import os
import select
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.sop_class import CTImageStorage, MRImageStorage, Verification

from daemon.config import DicomSettings, ScannerSettings, SpoolSettings
from daemon.spool import AssociationEnded, StoredInstance
from tests.pushing import associate
from tests.receiving import (
    BIG_ENDIAN,
    EXPLICIT,
    IMPLICIT,
    MR,
    VERIFICATION,
    Peer,
    Running,
    make_dataset,
    pack_command,
    pack_request,
    pack_store,
    pack_values,
    receiving,
    uid,
    until,
)

ACCEPTED, REJECTED, ABORTED, RELEASED = 2, 3, 7, 6
QUICK = DicomSettings(port=0, association_timeout_s=1.0, network_timeout_s=1.0)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with receiving(tmp_path / "spool") as running:
        yield running


def wait_for_records(running: Running, count: int) -> list[Any]:
    """All records, once there are so many."""
    until(lambda: len(running.records()) >= count)
    return running.records()


# --- proper senders ---------------------------------------------------------------------------------------------------


def test_bytes_are_kept_exactly_as_received(running: Running) -> None:
    """Odd padding, group lengths, private elements: what was sent is what the spool holds, with its facts."""
    data = make_dataset(uid(1), size_bytes=300_000) + b"\x09\x30\x10\0LO\x04\0abcd"
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        assert peer.store(uid(1), data) == 0x0000
        assert peer.release() == RELEASED
    stored, ended = wait_for_records(running, 2)
    assert running.read(stored) == data
    assert (stored.sop_class_uid, stored.sop_instance_uid, stored.transfer_syntax_uid) == (MR, uid(1), EXPLICIT)
    assert (stored.scanner, stored.association) == ("unknown", ended.association)
    assert ended.released


def test_pynetdicom_echo_and_store(running: Running) -> None:
    """A pynetdicom sender verifies and stores an MR and a CT image."""
    classes = (Verification, MRImageStorage, CTImageStorage)
    assoc = associate(running.port, classes, syntaxes=[ExplicitVRLittleEndian])
    assert assoc.is_established
    assert assoc.send_c_echo().Status == 0x0000
    for number, sop_class in enumerate([MRImageStorage, CTImageStorage]):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = sop_class, uid(number), "CANARY^PATIENT"
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        assert assoc.send_c_store(ds).Status == 0x0000
    assoc.release()
    records = wait_for_records(running, 3)
    assert [record.sop_class_uid for record in records[:2]] == [MRImageStorage, CTImageStorage]


def test_large_and_small_pdus(running: Running) -> None:
    """The same instance arrives whole in the smallest and the largest pieces that senders use."""
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        for number, pdu_bytes in enumerate([512, 4096, 16384, 131072]):
            data = make_dataset(uid(number), size_bytes=200_000, fill=number)
            assert peer.store(uid(number), data, pdu_bytes=pdu_bytes) == 0x0000
            assert running.read(running.instances()[-1]) == data


def test_commands_and_data_may_share_a_pdu(running: Running) -> None:
    """Several values in one P-DATA-TF, as PS3.8 allows, mean the same as one each."""
    data = make_dataset(uid(1))
    pieces = pack_store(uid(1), data, pdu_bytes=500)
    values, offset = b"", 0
    while offset < len(pieces):
        (length,) = struct.unpack_from(">xxI", pieces, offset)
        values += pieces[offset + 6 : offset + 6 + length]
        offset += 6 + length
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        peer.send(struct.pack(">BxI", 4, len(values)) + values)
        assert peer.response()[0x0900] == b"\0\0"
    assert running.read(running.instances()[0]) == data


def test_byte_by_byte(running: Running) -> None:
    """A network that delivers single bytes changes nothing."""
    with Peer(running.port) as peer:
        for byte in pack_request():
            peer.send(bytes([byte]))
        assert peer.pdu()[0] == ACCEPTED
        for byte in pack_store(uid(1), make_dataset(uid(1), size_bytes=10)):
            peer.send(bytes([byte]))
        assert peer.response()[0x0900] == b"\0\0"


@pytest.mark.parametrize("syntax", [IMPLICIT, BIG_ENDIAN])
def test_other_encodings_are_kept_as_they_are(running: Running, syntax: str) -> None:
    """No data set is re-encoded; its transfer syntax is recorded."""
    if syntax == BIG_ENDIAN:
        data = make_dataset(uid(1), order=">")
    else:
        data = struct.pack("<HHI", 8, 0x16, 26) + MR.encode() + b"\0" + struct.pack("<HHI", 8, 0x18, len(uid(1)) + 1)
        data += uid(1).encode() + b"\0" * 1
        data = _implicit(uid(1))
    with Peer(running.port) as peer:
        assert peer.associate(contexts={MR: [syntax]}) == ACCEPTED
        assert peer.store(uid(1), data) == 0x0000
    (stored,) = running.instances()
    assert running.read(stored) == data
    assert stored.transfer_syntax_uid == syntax


def _implicit(instance: str) -> bytes:
    def element(number: int, value: str) -> bytes:
        padded = value.encode() + b"\0" * (len(value) % 2)
        return struct.pack("<HHI", 8, number, len(padded)) + padded

    return element(0x16, MR) + element(0x18, instance)


def test_best_transfer_syntax_is_chosen_and_deflate_refused(running: Running) -> None:
    """Of several syntaxes the uncompressed explicit one is taken; a context with only deflate is refused, not the rest."""
    deflated = "1.2.840.10008.1.2.1.99"
    with Peer(running.port) as peer:
        contexts = {MR: [deflated, IMPLICIT, EXPLICIT], "1.2.840.10008.5.1.4.1.1.2": [deflated], "1.2.3.4": [EXPLICIT]}
        assert peer.associate(contexts=contexts) == ACCEPTED
        assert EXPLICIT.encode() in peer.answer
        results = {peer.answer[at + 4]: peer.answer[at + 6] for at in _items(peer.answer, 0x21)}
        assert results == {1: 0, 3: 4, 5: 3}


def _items(answer: bytes, kind: int) -> list[int]:
    """Offsets of the items of one kind in an A-ASSOCIATE-AC."""
    offset, found = 68, []
    while offset < len(answer):
        if answer[offset] == kind:
            found.append(offset)
        offset += 4 + int.from_bytes(answer[offset + 2 : offset + 4], "big")
    return found


def test_private_sop_classes_are_accepted_when_configured(tmp_path: Path) -> None:
    """A vendor's raw data class is stored when the site lists it."""
    private = "1.3.12.2.1107.5.9.1"
    with receiving(tmp_path / "spool", dicom=DicomSettings(port=0, private_sop_classes=(private,))) as running:
        with Peer(running.port) as peer:
            assert peer.associate(contexts={private: [EXPLICIT]}) == ACCEPTED
            assert peer.store(uid(1), make_dataset(uid(1), private), sop_class=private) == 0x0000
        assert running.instances()[0].sop_class_uid == private


# --- habits of senders ------------------------------------------------------------------------------------------------


def test_one_association_per_image(running: Running) -> None:
    """Thirty images on thirty associations: each is kept with an association of its own, and its end."""
    for number in range(30):
        with Peer(running.port) as peer:
            assert peer.associate() == ACCEPTED
            assert peer.store(uid(number), make_dataset(uid(number))) == 0x0000
            assert peer.release() == RELEASED
    records = wait_for_records(running, 60)
    ended = {record.association for record in records if isinstance(record, AssociationEnded)}
    assert ended == {record.association for record in records if isinstance(record, StoredInstance)}
    assert len(ended) == 30


def test_interleaved_associations(running: Running) -> None:
    """Two associations that send in turns are kept apart."""
    with Peer(running.port) as one, Peer(running.port) as two:
        assert one.associate() == two.associate() == ACCEPTED
        for number in range(6):
            peer = (one, two)[number % 2]
            assert peer.store(uid(number), make_dataset(uid(number))) == 0x0000
    stored = running.instances()
    assert len({record.association for record in stored[::2]}) == 1
    assert len({record.association for record in stored}) == 2


def test_duplicates_are_acknowledged_once_kept(running: Running) -> None:
    """A sender that repeats itself hears success, and the spool holds one."""
    data = make_dataset(uid(1))
    for _ in range(3):
        with Peer(running.port) as peer:
            assert peer.associate() == ACCEPTED
            assert peer.store(uid(1), data) == 0x0000
    assert len(running.instances()) == 1


@pytest.mark.parametrize("how", ["abort", "close"])
def test_an_association_cut_in_the_middle_keeps_what_was_acknowledged(running: Running, how: str) -> None:
    """Abort or loss amid a data set: the instances before are kept, the half one is not, and the end is on record."""
    peer = Peer(running.port)
    assert peer.associate() == ACCEPTED
    assert peer.store(uid(1), make_dataset(uid(1))) == 0x0000
    peer.send(pack_store(uid(2), make_dataset(uid(2), size_bytes=100_000))[:50_000])
    peer.abort() if how == "abort" else peer.close()
    stored, ended = wait_for_records(running, 2)
    assert stored.sop_instance_uid == uid(1)
    assert isinstance(ended, AssociationEnded)
    assert not ended.released


def test_abort_after_a_pdu_is_not_a_release(running: Running) -> None:
    """A-ABORT between messages is recorded as not released."""
    peer = Peer(running.port)
    assert peer.associate() == ACCEPTED
    assert peer.store(uid(1), make_dataset(uid(1))) == 0x0000
    peer.abort()
    assert not wait_for_records(running, 2)[1].released


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_statuses_on_the_wire(running: Running) -> None:
    """Each fault gets its status, with the association alive for the next instance."""
    good = make_dataset(uid(1))
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        assert peer.store("../../../etc/passwd", good) == 0x0117
        assert peer.store(uid(2), good) == 0xA900
        assert peer.store(uid(1), b"") == 0xA900
        assert peer.store(uid(1), b"garbage, no data set") == 0xC000
        assert peer.store(uid(1), good, sop_class="1.2.840.10008.5.1.4.1.1.2") == 0x0122
        peer.send(pack_store(uid(2), good))
        response = peer.response()
        assert response[0x0901] == struct.pack("<HH", 0x0008, 0x0018)
        assert uid(2).encode() not in response[0x0902]
        assert peer.store(uid(1), good) == 0x0000
    assert len(running.instances()) == 1


def test_path_traversal_makes_no_file(running: Running) -> None:
    """UIDs that are paths are refused, and nothing appears outside or inside the spool under their name."""
    before = set(running.folder.parent.rglob("*"))
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        for evil in ("../evil", "/tmp/evil", "..", "1.2/../../evil", "1.2\0evil", "evil\n"):
            assert peer.store(evil, make_dataset(evil)) in {0x0117, 0xA900}
    assert not [path for path in set(running.folder.parent.rglob("*")) - before if "evil" in path.name]


def test_an_instance_over_the_limit(tmp_path: Path) -> None:
    """Too long an instance is 0xA701 and is not held in memory; the next one is stored."""
    with receiving(tmp_path / "spool", dicom=DicomSettings(port=0, max_instance_bytes=1 << 20)) as running:
        with Peer(running.port) as peer:
            assert peer.associate() == ACCEPTED
            assert peer.store(uid(1), make_dataset(uid(1), size_bytes=(1 << 20) + 5000)) == 0xA701
            assert peer.store(uid(2), make_dataset(uid(2))) == 0x0000
        assert [stored.sop_instance_uid for stored in running.instances()] == [uid(2)]


def test_memory_for_what_comes_in_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When too much comes in at the same time, an instance is refused as out of resources and can be sent again."""
    monkeypatch.setattr("daemon.receive.MEMORY_BYTES", 0)
    with receiving(tmp_path / "spool", dicom=DicomSettings(port=0, max_instance_bytes=4 << 20)) as running:
        data = make_dataset(uid(1), size_bytes=3 << 20)
        with Peer(running.port) as one, Peer(running.port) as two:
            assert one.associate() == two.associate() == ACCEPTED
            whole = pack_store(uid(1), data)
            one.send(whole[:-100_000])
            until(lambda: running.receiver._memory._left <= 2 << 20)
            assert two.store(uid(2), make_dataset(uid(2), size_bytes=3 << 20)) == 0xA700
            one.send(whole[-100_000:])
            assert one.response()[0x0900] == b"\0\0"
            assert two.store(uid(2), make_dataset(uid(2), size_bytes=3 << 20)) == 0x0000


def test_full_spool_answers_a700_and_keeps_what_it_has(tmp_path: Path) -> None:
    """At the quota: 0xA700 for new instances, success for duplicates, everything acknowledged readable."""
    small = SpoolSettings(quota_bytes=16 << 20, reserve_bytes=0, segment_bytes=1 << 20)
    acknowledged = []
    with receiving(tmp_path / "spool", spool=small) as running:
        with Peer(running.port) as peer:
            assert peer.associate() == ACCEPTED
            for number in range(200):
                status = peer.store(uid(number), make_dataset(uid(number), size_bytes=400_000), pdu_bytes=131072)
                if status != 0x0000:
                    break
                acknowledged.append(number)
            assert status == 0xA700
            assert peer.store(uid(0), make_dataset(uid(0), size_bytes=400_000), pdu_bytes=131072) == 0x0000
        assert len(acknowledged) >= 20
        for number, stored in zip(acknowledged, running.instances(), strict=True):
            assert running.read(stored) == make_dataset(uid(number), size_bytes=400_000)


def test_a_failed_sync_answers_a700(tmp_path: Path) -> None:
    """A disk that cannot sync is never reported as success; the association goes on and the instance can be sent again."""
    broken = [True]

    def sync(fd: int) -> None:
        if broken[0]:
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)

    with receiving(tmp_path / "spool", sync=sync) as running:
        with Peer(running.port) as peer:
            assert peer.associate() == ACCEPTED
            assert peer.store(uid(1), make_dataset(uid(1))) == 0xA700
            assert running.instances() == []
            broken[0] = False
            assert peer.store(uid(1), make_dataset(uid(1))) == 0x0000
        assert len(running.instances()) == 1


def test_an_unexpected_error_is_a_failure_and_ends_nothing_else(
    running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bug in the handler answers 0x0110, is logged without the text of the error, and the next instance is stored."""
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> None:
                raise RuntimeError("CANARY^PATIENT")

            patch.setattr(running.spool, "append_instance", fail)
            assert peer.store(uid(1), make_dataset(uid(1))) == 0x0110
        assert peer.store(uid(1), make_dataset(uid(1))) == 0x0000
    logged = capfd.readouterr().err
    assert "RuntimeError" in logged
    assert "CANARY" not in logged


def test_other_operations_are_not_offered(running: Running) -> None:
    """C-ECHO works on its context; C-FIND on a storage context is an unrecognised operation."""
    with Peer(running.port) as peer:
        assert peer.associate(contexts={VERIFICATION: [IMPLICIT], MR: [EXPLICIT]}) == ACCEPTED
        echo = {
            0x0002: VERIFICATION.encode() + b"\0",
            0x0100: struct.pack("<H", 0x30),
            0x0110: struct.pack("<H", 9),
            0x0800: struct.pack("<H", 0x0101),
        }
        peer.send(pack_values(1, 1, pack_command(echo)))
        response = peer.response()
        assert (response[0x0100], response[0x0120], response[0x0900]) == (b"\x30\x80", b"\x09\0", b"\0\0")
        find = echo | {0x0100: struct.pack("<H", 0x20), 0x0800: struct.pack("<H", 1)}
        peer.send(pack_values(3, 1, pack_command(find)) + pack_values(3, 0, b"identifier"))
        assert peer.response()[0x0900] == struct.pack("<H", 0x0211)


# --- who may call -----------------------------------------------------------------------------------------------------

LISTED = (ScannerSettings(slug="mr1", ae_title="MRC1", address="127.0.0.1"),)


def test_the_allow_list_names_the_scanner(tmp_path: Path) -> None:
    """A listed caller gets its slug; another title is rejected permanently as not recognised."""
    with receiving(tmp_path / "spool", scanners=LISTED) as running:
        with Peer(running.port) as peer:
            assert peer.associate(calling="MRC1") == ACCEPTED
            assert peer.store(uid(1), make_dataset(uid(1))) == 0x0000
        with Peer(running.port) as peer:
            assert peer.associate(calling="MRC2") == REJECTED
            assert peer.answer[1:] == bytes([1, 1, 3])
            assert peer.closed()
        assert [stored.scanner for stored in running.instances()] == ["mr1"]


def test_a_listed_title_from_another_address_is_rejected(tmp_path: Path) -> None:
    """The AE title alone opens nothing."""
    elsewhere = (ScannerSettings(slug="mr1", ae_title="MRC1", address="10.0.0.1"),)
    with receiving(tmp_path / "spool", scanners=elsewhere) as running, Peer(running.port) as peer:
        assert peer.associate(calling="MRC1") == REJECTED


def test_the_called_title_can_be_required(tmp_path: Path) -> None:
    """With the setting on, another called AE title is rejected with reason 7."""
    with receiving(tmp_path / "spool", dicom=DicomSettings(port=0, require_called_ae_title=True)) as running:
        with Peer(running.port) as peer:
            assert peer.associate(called="OTHER") == REJECTED
            assert peer.answer[1:] == bytes([1, 1, 7])
        with Peer(running.port) as peer:
            assert peer.associate(called="RESCAN") == ACCEPTED


def test_too_many_associations_are_rejected_as_transient(tmp_path: Path) -> None:
    """Above the limit: transient, local limit exceeded; when one ends there is room again."""
    with receiving(tmp_path / "spool", dicom=DicomSettings(port=0, max_associations=2)) as running:
        first, second = Peer(running.port), Peer(running.port)
        assert first.associate() == second.associate() == ACCEPTED
        with Peer(running.port) as third:
            assert third.associate() == REJECTED
            assert third.answer[1:] == bytes([2, 3, 2])
        assert first.release() == RELEASED
        with running.receiver._state:
            assert running.receiver._state.wait_for(lambda: len(running.receiver._visits) < 2, timeout=10)
        with Peer(running.port) as third:
            assert third.associate() == ACCEPTED
        second.close()


def test_a_stopping_receiver_rejects_and_lets_others_finish(tmp_path: Path) -> None:
    """While it stops, new associations are rejected as transient and a running one can store and release."""
    with receiving(tmp_path / "spool") as running, Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        stopping = threading.Thread(target=running.receiver.stop, args=(20.0,))
        stopping.start()
        with running.receiver._state:
            assert running.receiver._state.wait_for(lambda: running.receiver._stopping, timeout=10)
        with Peer(running.port) as late:
            assert late.associate() == REJECTED
            assert late.answer[1:] == bytes([2, 3, 2])
        assert peer.store(uid(1), make_dataset(uid(1))) == 0x0000
        assert peer.release() == RELEASED
        stopping.join(20)
        assert not stopping.is_alive()
        assert len(running.instances()) == 1


# --- peers that mean harm ---------------------------------------------------------------------------------------------


def test_a_four_gigabyte_pdu_header_takes_no_memory(running: Running) -> None:
    """A PDU that claims 4 GiB ends with an abort at once, before and after the association is accepted."""
    with Peer(running.port) as peer:
        peer.send(struct.pack(">BxI", 1, 0xFFFFFFFF))
        assert peer.pdu()[0] == ABORTED
        assert peer.closed()
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        peer.send(struct.pack(">BxI", 4, 0xFFFFFFFF))
        assert peer.pdu()[0] == ABORTED


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">BxI", 99, 4) + bytes(4),  # no such PDU
        pack_request(),  # a second request
        struct.pack(">BxIIBB", 4, 6, 2, 1, 1)[:-1] + b"\0",  # a data set without its command
        struct.pack(">BxIIBB", 4, 6, 0xFFFFFFFF, 1, 1),  # a value longer than its PDU
        struct.pack(">BxI", 4, 3) + bytes(3),  # half a value header
        pack_values(77, 1, b""),  # a context that was not accepted
        pack_values(1, 1, b"no command set"),
        pack_values(1, 1, pack_command({0x0100: b"\1"})),
        pack_values(1, 1, bytes(40_000)),  # an endless command
    ],
)
def test_broken_protocol_is_aborted(running: Running, data: bytes) -> None:
    """What PS3.8 does not allow ends that association with A-ABORT; the receiver serves the next peer."""
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        peer.send(data)
        assert peer.pdu()[0] == ABORTED
        assert peer.closed()
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), bytes(6), pack_request()[:-30]]
)
def test_other_protocols_and_broken_requests_are_turned_away(running: Running, data: bytes) -> None:
    """HTTP, TLS and damaged requests get an abort or a closed connection."""
    if data.startswith(b"\1"):
        data = data[:2] + struct.pack(">I", len(data) - 6) + data[6:]
    with Peer(running.port) as peer:
        peer.send(data)
        assert peer.pdu()[0] == ABORTED
    assert running.instances() == []


def test_a_silent_peer_is_dropped(tmp_path: Path) -> None:
    """A connection that says nothing, before or after the request, is closed after its timeout."""
    with (
        receiving(tmp_path / "spool", dicom=QUICK) as running,
        Peer(running.port) as silent,
        Peer(running.port) as idle,
    ):
        assert idle.associate() == ACCEPTED
        assert silent.closed()
        assert idle.closed()


def test_a_slow_loris_is_dropped(tmp_path: Path) -> None:
    """A peer that keeps a PDU open with a byte now and then is closed after the timeout; others are served meanwhile."""
    with receiving(tmp_path / "spool", dicom=QUICK) as running, Peer(running.port) as loris:
        assert loris.associate() == ACCEPTED
        with Peer(running.port) as other:
            assert other.associate() == ACCEPTED
        sent = 0
        for byte in pack_store(uid(1), make_dataset(uid(1)))[:500]:
            if select.select([loris.socket], [], [], 0.1)[0]:
                break
            loris.send(bytes([byte]))
            sent += 1
        assert loris.closed()
        assert sent < 100
        assert running.instances() == []


def test_one_address_cannot_take_all_connections(tmp_path: Path) -> None:
    """Beyond its share an address is closed at once; the number of threads stays bounded."""
    with receiving(tmp_path / "spool", dicom=DicomSettings(port=0, max_associations=20)) as running:
        peers = [Peer(running.port) for _ in range(24)]
        closed = 0
        for peer in peers[16:]:
            closed += peer.closed()
        assert closed == 8
        assert peers[0].associate() == ACCEPTED
        for peer in peers:
            peer.close()


def test_ten_thousand_promises_and_no_data(running: Running) -> None:
    """A peer that pipelines requests without reading answers is served in order, one at a time."""
    requests = b"".join(pack_store(uid(n), make_dataset(uid(n), size_bytes=10), message=n) for n in range(50))
    with Peer(running.port) as peer:
        assert peer.associate() == ACCEPTED
        peer.send(requests)
        answered = [int.from_bytes(peer.response()[0x0120], "little") for _ in range(50)]
    assert answered == list(range(50))


# --- DCMTK ------------------------------------------------------------------------------------------------------------


def dcmtk(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed (Debian package dcmtk)")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


def write_series(folder: Path, count: int) -> dict[str, bytes]:
    """DICOM files of a tiny series: SOP Instance UID -> pixel data."""
    folder.mkdir()
    written = {}
    for number in range(count):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = MR, uid(number), "CANARY^PATIENT"
        ds.Rows = ds.Columns = 64
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 0, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.PixelData = written[uid(number)] = bytes([number]) * 8192
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        pydicom.dcmwrite(folder / f"{number}.dcm", ds, enforce_file_format=True)
    return written


@pytest.mark.parametrize("nagle", ["untuned", "tuned"])
def test_dcmtk_storescu(tmp_path: Path, running: Running, nagle: str) -> None:
    """Storescu sends a series, with Nagle's algorithm on (its default) and off; every pixel arrives."""
    written = write_series(tmp_path / "series", 20)
    tuned = {"TCP_NODELAY": "1"} if nagle == "tuned" else {}
    done = dcmtk("storescu", "+sd", "127.0.0.1", running.port, tmp_path / "series", **tuned)
    assert done.returncode == 0, done.stderr
    records = wait_for_records(running, 21)
    assert records[-1].released
    found = {stored.sop_instance_uid: running.read(stored) for stored in records[:-1]}
    assert found.keys() == written.keys()
    assert all(written[name] in data for name, data in found.items())


def test_dcmtk_echoscu(running: Running) -> None:
    """Echoscu is answered."""
    done = dcmtk("echoscu", "-v", "127.0.0.1", running.port)
    assert done.returncode == 0
    assert "Success" in done.stdout + done.stderr


# --- what is told -----------------------------------------------------------------------------------------------------


def test_metrics_move(tmp_path: Path) -> None:
    """Every metric of reception is reported, with labels from the configuration alone."""
    with receiving(tmp_path / "spool", scanners=LISTED) as running:
        with Peer(running.port) as peer:
            assert peer.associate(calling="MRC1") == ACCEPTED
            data = make_dataset(uid(1))
            assert peer.store(uid(1), data) == peer.store(uid(1), data) == 0x0000
            assert peer.store(uid(2), data) == 0xA900
            assert peer.release() == RELEASED
        with Peer(running.port) as peer:
            assert peer.associate(calling="EVIL") == REJECTED
    counted: dict[tuple[str, ...], float] = {}
    for message in running.messages:
        if message["kind"] == "count":
            key = (message["metric"], *message["labels"].values())
            counted[key] = counted.get(key, 0) + message["value"]
    assert counted["instances_received_total", "mr1", "stored"] == 1
    assert counted["instances_received_total", "mr1", "duplicate"] == 1
    assert counted["instances_received_total", "mr1", "a900"] == 1
    assert counted["receive_bytes_total", "mr1"] == len(data)
    assert counted["associations_total", "mr1", "released"] == 1
    assert counted["associations_total", "unknown", "rejected"] == 1
    assert counted["store_duration_seconds", "mr1"] > 0
    assert counted["last_instance_timestamp_seconds", "mr1"] > 0
    active = [m["value"] for m in running.messages if m.get("metric") == "associations_active"]
    assert active == [1, 0]
    assert max(m["position"] for m in running.messages if m["kind"] == "stored") == 2


def test_nothing_that_was_sent_is_logged(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    """A canary patient, hostile UIDs and AE titles through success and failure leave no trace in the output."""
    with Peer(running.port) as peer:
        assert peer.associate(calling="CANARYTITLE") == ACCEPTED
        peer.store("CANARY/../UID", make_dataset("CANARY/../UID"))
        peer.store(uid(1), make_dataset(uid(1)))
        peer.send(pack_values(1, 1, b"CANARY"))
        assert peer.pdu()[0] == ABORTED
    output = "".join(capfd.readouterr()) + str(running.messages)
    assert "CANARY" not in output
    assert uid(1) not in output
