"""The spool keeps what it acknowledged, whatever happens to the end of its log."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from daemon import spool as spool_module
from daemon.spool import (
    PAGE_BYTES,
    AssociationEnded,
    Kept,
    SpoolError,
    SpoolFull,
    SpoolGone,
    SpoolReader,
    SpoolWriter,
    StoredInstance,
    remove_segments,
)
from tests.receiving import EXPLICIT, MR, make_dataset, uid, until

QUOTA = 64 << 20


def open_writer(folder: Path, **options: Any) -> SpoolWriter:
    return SpoolWriter(folder, **{"quota_bytes": QUOTA, "reserve_bytes": 0, "segment_bytes": 1 << 20} | options)


def put(writer: SpoolWriter, number: int, size_bytes: int = 3000, **facts: Any) -> StoredInstance:
    stored, _ = put_kept(writer, number, size_bytes, **facts)
    return stored


def put_kept(writer: SpoolWriter, number: int, size_bytes: int = 3000, **facts: Any) -> tuple[StoredInstance, Kept]:
    known: dict[str, Any] = {
        "sop_class_uid": MR,
        "sop_instance_uid": uid(number),
        "transfer_syntax_uid": EXPLICIT,
        "scanner": "mr1",
        "association": 1,
    }
    return writer.append_instance(payload(number, size_bytes), **(known | facts))


def payload(number: int, size_bytes: int = 3000) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (size_bytes // 32 + 1)


def crash(writer: SpoolWriter, folder: Path, to: Path) -> Path:
    """The folder as a crash would leave it: copied while the writer is still open."""
    to.mkdir(mode=0o700)
    for path in folder.iterdir():
        if path.name not in {"making.tmp", "prepared"}:  # these come and go in the background
            (to / path.name).write_bytes(path.read_bytes())
    return to


def records(folder: Path) -> list[Any]:
    reader = SpoolReader(folder)
    found: list[Any] = []
    while more := reader.follow(found[-1].position if found else 0):
        found += more
    reader.close()
    return found


def last_segment(folder: Path) -> Path:
    return max(folder.glob("*.segment"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def test_reads_back_what_was_stored(folder: Path) -> None:
    """Bytes, facts and order come back as they went in, from another reader."""
    writer = open_writer(folder)
    stored = [put(writer, n, size) for n, size in enumerate([1, 4000, 5000, 700_000, 2])]
    ended = writer.append_association_ended(1, "mr1", released=True)
    found = records(folder)
    assert found == [*stored, ended]
    assert [record.position for record in found] == [1, 2, 3, 4, 5, 6]
    reader = SpoolReader(folder)
    for n, size in enumerate([1, 4000, 5000, 700_000, 2]):
        assert reader.read(stored[n]) == payload(n, size)
        assert stored[n].sha256 == hashlib.sha256(payload(n, size)).hexdigest()
    reader.close()
    writer.close()


def test_follow_gives_only_what_is_new(folder: Path) -> None:
    """A follower gets each record once, across segments, and nothing when there is no news."""
    writer, reader = open_writer(folder), SpoolReader(folder)
    assert reader.follow(0) == []
    seen: list[int] = []
    for n in range(12):
        put(writer, n, 300_000)
        seen += [record.position for record in reader.follow(seen[-1] if seen else 0)]
        assert reader.follow(seen[-1]) == []
    assert seen == list(range(1, 13))
    assert len(list(folder.glob("*.segment"))) > 2
    assert [record.position for record in SpoolReader(folder).follow(4, limit=3)] == [5, 6, 7]
    writer.close()


def test_follow_hides_what_is_not_durable(folder: Path) -> None:
    """A record is not followed before the sync that covers it has returned."""
    during: list[int] = []

    def sync(fd: int) -> None:
        during.append(len(records(folder)))
        os.fdatasync(fd)

    writer = open_writer(folder, sync=sync)
    put(writer, 1)
    put(writer, 2)
    assert during == [0, 1]
    assert len(records(folder)) == 2
    writer.close()


def test_part10_is_a_dicom_file(folder: Path) -> None:
    """The file form has a zero preamble and the file meta information that pydicom expects, then the bytes as received."""
    writer, data = open_writer(folder), make_dataset(uid(1))
    stored, _ = writer.append_instance(
        data, sop_class_uid=MR, sop_instance_uid=uid(1), transfer_syntax_uid=EXPLICIT, scanner="mr1", association=1
    )
    whole = SpoolReader(folder).part10(stored)
    assert whole[:132] == bytes(128) + b"DICM"
    assert whole.endswith(data)
    ds = pydicom.dcmread(io.BytesIO(whole))
    assert ds.file_meta.FileMetaInformationGroupLength == len(whole) - len(data) - 144
    assert (ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID) == (MR, uid(1))
    assert ds.file_meta.TransferSyntaxUID == EXPLICIT
    assert ds.SOPInstanceUID == uid(1)
    pydicom.dataset.validate_file_meta(ds.file_meta, enforce_standard=True)
    writer.close()


def test_private_files_without_uids_in_names(folder: Path) -> None:
    """Folder 0700, files 0600, names made of numbers: what a UID says never names a file."""
    writer = open_writer(folder)
    put(writer, 1, sop_instance_uid="../../../1.2.3")
    assert folder.stat().st_mode & 0o777 == 0o700
    writer.close()
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.name.removesuffix(".segment").isdecimal() or path.name in {"lock", "durable", "prepared"}


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_duplicate_is_kept_once(folder: Path) -> None:
    """The same bytes under the same UIDs are acknowledged again and not written again, also after a restart."""
    writer = open_writer(folder)
    first, kept = put_kept(writer, 1)
    assert kept is Kept.STORED
    assert put_kept(writer, 1, association=2) == (first, Kept.DUPLICATE)
    writer.close()
    writer = open_writer(folder)
    writer._indexer.join()
    assert put_kept(writer, 1) == (first, Kept.DUPLICATE)
    assert len(records(folder)) == 1
    writer.close()


def test_other_bytes_under_one_uid_are_both_kept(folder: Path) -> None:
    """Different content, scanner or transfer syntax under one SOP Instance UID is no duplicate."""
    writer = open_writer(folder)
    put(writer, 1)
    stored, kept = writer.append_instance(
        b"other", sop_class_uid=MR, sop_instance_uid=uid(1), transfer_syntax_uid=EXPLICIT, scanner="mr1", association=1
    )
    assert kept is Kept.CONFLICT
    assert put_kept(writer, 1, scanner="mr2")[1] is Kept.STORED
    assert put_kept(writer, 1, scanner="mr2", transfer_syntax_uid="1.2.840.10008.1.2")[1] is Kept.CONFLICT
    assert len(records(folder)) == 4
    assert SpoolReader(folder).read(stored) == b"other"
    writer.close()


def test_a_removed_instance_is_new_again(folder: Path) -> None:
    """After retention removed an instance, the same bytes are stored again."""
    writer = open_writer(folder)
    put(writer, 1)
    writer.seal_aged(0)
    put(writer, 2)
    assert remove_segments(folder, 2, 0.0) == 1
    assert put_kept(writer, 1)[1] is Kept.STORED
    writer.close()


def test_the_index_of_duplicates_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many instances come, the index holds the latest ones alone."""
    monkeypatch.setattr(spool_module, "INDEXED_INSTANCES", 5)
    writer = open_writer(folder)
    for n in range(9):
        put(writer, n)
    assert len(writer._index) == 5
    assert put_kept(writer, 8)[1] is Kept.DUPLICATE
    assert put_kept(writer, 0)[1] is Kept.STORED
    writer.close()


# --- group commit -----------------------------------------------------------------------------------------------------


def test_one_sync_covers_all_who_wait(folder: Path) -> None:
    """Eight handlers that append while a sync runs share the next one."""
    release, syncs, inside = threading.Event(), itertools.count(1), threading.Event()
    done: list[int] = []

    def sync(fd: int) -> None:
        if next(syncs) == 1:
            inside.set()
            assert release.wait(10)
        os.fdatasync(fd)

    writer = open_writer(folder, sync=sync)
    threads = [threading.Thread(target=lambda n=n: done.append(put(writer, n).position)) for n in range(9)]
    threads[0].start()
    assert inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    until(lambda: writer._last_position == 9)
    assert done == []
    release.set()
    for thread in threads:
        thread.join(10)
    assert sorted(done) == list(range(1, 10))
    assert next(syncs) == 3
    writer.close()


def test_many_threads_lose_nothing(folder: Path) -> None:
    """Four threads and many segments: every acknowledged instance is found once, with its bytes."""
    writer = open_writer(folder, quota_bytes=256 << 20)
    kept: list[StoredInstance] = []

    def work(thread: int) -> None:
        for n in range(40):
            stored = put(writer, 1000 * thread + n, 40_000 + n)
            kept.append(stored)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    writer.close()
    found = records(folder)
    assert [record.position for record in found] == list(range(1, 161))
    assert sorted(kept, key=lambda stored: stored.position) == found
    reader = SpoolReader(folder)
    for stored in found:
        reader.read(stored)
    reader.close()


# --- failures ---------------------------------------------------------------------------------------------------------


def failing_sync(failing: Callable[[], bool]) -> Callable[[int], None]:
    def sync(fd: int) -> None:
        if failing():
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)

    return sync


def test_a_failed_sync_acknowledges_nothing(folder: Path) -> None:
    """After a sync error the instance is refused and not found; what came before stays; the next goes to a new segment."""
    broken = [False]
    writer = open_writer(folder, sync=failing_sync(lambda: broken[0]))
    first = put(writer, 1)
    broken[0] = True
    with pytest.raises(SpoolError, match="could not sync"):
        put(writer, 2)
    broken[0] = False
    second, kept = put_kept(writer, 2)
    assert kept is Kept.STORED
    assert second.segment != first.segment
    assert records(folder) == [first, second]
    writer.close()
    assert records(folder) == [first, second]


def test_a_failed_sync_fails_all_who_wait_on_that_segment(folder: Path) -> None:
    """Records appended during the failing sync lie in the same pages, so they are refused too."""
    inside, go, calls = threading.Event(), threading.Event(), itertools.count()

    def sync(fd: int) -> None:
        if next(calls) == 0:
            inside.set()
            assert go.wait(10)
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)

    writer = open_writer(folder, sync=sync)
    outcomes: list[str] = []

    def work(n: int) -> None:
        try:
            put(writer, n)
            outcomes.append("stored")
        except SpoolError:
            outcomes.append("refused")

    first = threading.Thread(target=work, args=(1,))
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=work, args=(2,))
    second.start()
    until(lambda: writer._last_position == 2)
    go.set()
    first.join(10)
    second.join(10)
    assert outcomes == ["refused", "refused"]
    assert records(folder) == []
    assert put(writer, 3).position == 3
    writer.close()


def test_a_failed_write_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full says SpoolFull, one that fails says SpoolError; afterwards storing goes on."""
    writer = open_writer(folder)
    first = put(writer, 1)
    for number, kind in ((errno.ENOSPC, SpoolFull), (errno.EIO, SpoolError)):
        with monkeypatch.context() as patch:

            def pwritev(*_: object, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

            patch.setattr(os, "pwritev", pwritev)
            with pytest.raises(kind):
                put(writer, 2)
    second = put(writer, 2)
    assert records(folder) == [first, second]
    writer.close()


def test_full_spool_keeps_what_it_has_and_recovers(folder: Path) -> None:
    """At its quota the spool refuses; when retention has made room it takes instances again."""
    writer = open_writer(folder, quota_bytes=8 << 20)
    kept: list[StoredInstance] = []
    with pytest.raises(SpoolFull):
        kept.extend(put(writer, n, 200_000) for n in range(1000))
    assert SpoolReader(folder).facts().size_bytes <= 8 << 20
    assert records(folder) == kept
    assert len(kept) > 20
    assert remove_segments(folder, kept[-1].position, 0.0) > 3
    stored = put(writer, 2000, 200_000)
    assert SpoolReader(folder).read(stored) == payload(2000, 200_000)
    writer.close()


def test_reserve_is_kept_free(folder: Path) -> None:
    """A disk with less free space than the reserve takes nothing, and a restart on it works."""
    writer = open_writer(folder, reserve_bytes=1 << 60)
    with pytest.raises(SpoolFull, match="reserve"):
        put(writer, 1)
    writer.close()
    writer = open_writer(folder)
    put(writer, 1)
    writer.close()


def test_an_instance_larger_than_a_segment_is_kept(folder: Path) -> None:
    """A segment of its own is made for it."""
    writer = open_writer(folder)
    stored = put(writer, 1, 5 << 20)
    after = put(writer, 2)
    assert SpoolReader(folder).read(stored) == payload(1, 5 << 20)
    writer.close()
    assert records(folder) == [stored, after]


def test_one_writer_alone(folder: Path) -> None:
    """A second writer is refused with what to do; after the first closed it may open."""
    writer = open_writer(folder)
    with pytest.raises(SpoolError, match="in use by another receiver"):
        open_writer(folder)
    writer.close()
    with pytest.raises(SpoolError, match="closed"):
        put(writer, 1)
    open_writer(folder).close()


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_restart_continues_numbering(folder: Path) -> None:
    """Positions and association numbers go on after a restart, also when retention removed everything it may."""
    writer = open_writer(folder)
    put(writer, 1, association=writer.next_association())
    put(writer, 2, association=writer.next_association())
    writer.close()
    writer = open_writer(folder)
    assert put(writer, 3, association=writer.next_association()).position == 3
    assert records(folder)[-1].association == 3
    writer.close()
    for path in folder.glob("*.segment"):
        path.unlink()
    writer = open_writer(folder)
    assert put(writer, 4).position == 4
    writer.close()


@pytest.mark.parametrize("cut", [1, 100, 5000, 40_000])
def test_truncated_tail_loses_only_what_was_cut(folder: Path, tmp_path: Path, cut: int) -> None:
    """A log that ends early keeps every record before the cut, and takes new ones."""
    writer = open_writer(folder)
    stored = [put(writer, n, 30_000) for n in range(4)]
    copy = crash(writer, folder, tmp_path / "copy")
    writer.close()
    end = stored[-1].offset + stored[-1].size_bytes
    os.truncate(last_segment(copy), end - cut)
    (copy / "durable").write_bytes(bytes(8))  # as low as a power cut can leave it
    writer = open_writer(copy)
    whole = 3 if cut < 34_000 else 2
    assert records(copy) == stored[:whole]
    again = put(writer, 9)
    assert records(copy) == [*stored[:whole], again]
    writer.close()


@pytest.mark.parametrize("where", ["head", "check", "first byte", "last byte"])
def test_corrupted_tail_is_not_believed(folder: Path, tmp_path: Path, where: str) -> None:
    """A torn last record, in its header or its bytes, is not found after recovery; the ones before are."""
    writer = open_writer(folder)
    stored = [put(writer, n, 30_000) for n in range(3)]
    copy = crash(writer, folder, tmp_path / "copy")
    writer.close()
    start = stored[-1].offset // PAGE_BYTES * PAGE_BYTES
    places = {
        "head": start + 9,
        "check": stored[-1].offset - 1,
        "first byte": stored[-1].offset,
        "last byte": stored[-1].offset + stored[-1].size_bytes - 1,
    }
    flip(last_segment(copy), places[where])
    (copy / "durable").write_bytes(bytes(8))
    writer = open_writer(copy)
    assert records(copy) == stored[:2]
    writer.close()


@pytest.mark.parametrize("where", ["head", "bytes"])
def test_damage_in_the_middle_loses_nothing_behind_it(folder: Path, where: str) -> None:
    """A record that rotted in a sealed segment is stepped over or refused; all others are read."""
    writer = open_writer(folder)
    stored = [put(writer, n, 30_000) for n in range(5)]
    writer.close()
    start = stored[2].offset // PAGE_BYTES * PAGE_BYTES
    flip(last_segment(folder), start + 9 if where == "head" else stored[2].offset + 10)
    writer = open_writer(folder)
    found = records(folder)
    reader = SpoolReader(folder)
    if where == "head":
        assert found == [*stored[:2], *stored[3:]]
    else:
        assert found == stored
        with pytest.raises(SpoolError, match="check the disk"):
            reader.read(stored[2])
    for other in (stored[0], stored[4]):
        reader.read(other)
    assert put(writer, 9).position == 6
    writer.close()


def test_a_dataset_cannot_forge_a_record(folder: Path, tmp_path: Path) -> None:
    """Bytes that look like a record, inside a data set behind a damaged header, are not believed."""
    writer = open_writer(folder)
    real = put(writer, 1, 30_000)
    segment = last_segment(folder).read_bytes()
    head = segment[PAGE_BYTES : real.offset]
    padding = PAGE_BYTES - (real.offset - PAGE_BYTES) % PAGE_BYTES
    forged = bytes(padding) + (head + payload(1, 30_000)).ljust(9 * PAGE_BYTES, b"\0")
    holder, _ = writer.append_instance(
        forged, sop_class_uid=MR, sop_instance_uid=uid(2), transfer_syntax_uid=EXPLICIT, scanner="mr1", association=1
    )
    copy = crash(writer, folder, tmp_path / "copy")
    writer.close()
    flip(last_segment(copy), holder.offset // PAGE_BYTES * PAGE_BYTES + 9)
    writer = open_writer(copy)
    assert records(copy) == [real]
    writer.close()


def test_a_damaged_segment_head_does_not_stop_the_spool(folder: Path, tmp_path: Path) -> None:
    """A segment whose head cannot be read is left aside, its number is not used again, and storing goes on."""
    writer = open_writer(folder)
    put(writer, 1)
    copy = crash(writer, folder, tmp_path / "copy")
    writer.close()
    flip(last_segment(copy), 3)
    writer = open_writer(copy)
    stored = put(writer, 2)
    assert stored.position == 2
    assert records(copy) == [stored]
    writer.close()


def test_unfinished_files_are_removed(folder: Path) -> None:
    """Half-made segments of an earlier run go; a prepared one is used."""
    folder.mkdir(mode=0o700)
    (folder / "making.tmp").write_bytes(b"half")
    (folder / "waited.tmp").write_bytes(b"half")
    writer = open_writer(folder)
    stored = put(writer, 1)
    assert not (folder / "waited.tmp").exists()
    writer.close()
    assert records(folder) == [stored]
    assert not (folder / "making.tmp").exists()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x5A
    path.write_bytes(data)


# --- retention --------------------------------------------------------------------------------------------------------


def test_retention_removes_only_what_is_judged_and_old(folder: Path) -> None:
    """Whole segments go when all in them is judged and they are old; the newest stays; a reader says that it is gone."""
    writer = open_writer(folder)
    first = put(writer, 1)
    writer.seal_aged(0)
    second = put(writer, 2)
    writer.seal_aged(0)
    third = put(writer, 3)
    later = last_segment(folder).stat().st_mtime + 1000
    assert remove_segments(folder, third.position, 2000.0, lambda: later) == 0
    assert remove_segments(folder, second.position, 500.0, lambda: later) == 1
    reader = SpoolReader(folder)
    with pytest.raises(SpoolGone):
        reader.read(first)
    assert remove_segments(folder, 100, 0.0, lambda: later) == 1
    assert records(folder) == [third]
    assert reader.read(third) == payload(3)
    writer.close()


def test_a_reader_lets_go_of_what_was_removed(folder: Path) -> None:
    """A removed segment is closed at the next use, so that its disk space is really free; no file is kept open in vain."""
    writer, reader = open_writer(folder), SpoolReader(folder)
    first = put(writer, 1)
    reader.read(first)
    writer.seal_aged(0)
    second = put(writer, 2)
    remove_segments(folder, second.position, 0.0)
    with pytest.raises(SpoolGone):
        reader.read(first)
    assert list(reader._files) == []
    reader.close()
    writer.close()


def test_facts_tell_bytes_and_age(folder: Path) -> None:
    """The facts for metrics: bytes within the quota, free bytes of the disk, age of the oldest record."""
    writer = open_writer(folder, clock=lambda: 1000.0)
    reader = SpoolReader(folder)
    assert reader.facts().oldest_age_s is None
    ended = writer.append_association_ended(1, "mr1", released=False)
    facts = reader.facts(now=1060.0)
    assert facts.oldest_age_s == 60.0
    assert facts.durable_position == ended.position == 1
    assert 0 < facts.size_bytes <= QUOTA
    assert facts.free_bytes > 0
    assert records(folder) == [AssociationEnded(1, 1, "mr1", 1000.0, False)]
    writer.close()


def test_a_reader_that_saw_a_new_segment_empty_misses_nothing_of_it(folder: Path) -> None:
    """After a restart the new segment may stand there before its first record; what comes into it is followed whole."""
    writer = open_writer(folder)
    for number in range(5):
        put(writer, number)
    writer.close()
    reader = SpoolReader(folder)
    writer = open_writer(folder)
    with writer._state:  # the segment of the next record, as a prompt start makes it
        if writer._open is None:
            writer._start_segment(PAGE_BYTES)
    assert len(reader.follow(0)) == 5
    for number in range(10, 14):
        put(writer, number)
    assert [record.position for record in reader.follow(5)] == [6, 7, 8, 9]
    reader.close()
    writer.close()
