"""The spool: what was received and not yet judged, durable before the scanner hears success.

One append-only log of preallocated segment files. A record is a header (what it is, keyed check) followed by the data
set exactly as received; header and bytes lie side by side, so one fdatasync covers both and the log is its own index.
Group commit: whoever waits first syncs for all who have appended by then, and each waits for a sync that covers its
own record.

- Records start on page boundaries and nothing is ever overwritten, so no later write can tear an acknowledged record.
- The check is keyed with a random salt of the segment: a data set cannot contain a record that recovery would believe.
- A segment is sealed (cut to its length) when it is full, old, failed or found after a crash; it is then read-only.
- `durable` holds the last durable position, so that other processes never act on what a power cut could take back.
- Names hold numbers alone; UIDs never become file names.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

Buffer = bytes | bytearray | memoryview | mmap.mmap

PAGE_BYTES = 4096
"""Records start at multiples of this: the unit in which disks and the page cache write."""

FIRST_SEGMENT_BYTES = 32 << 20
"""Size of a segment made while a caller waits (at the first start, or none prepared in time); small, to be quick."""

SEGMENT_AGE_S = 3600.0
"""A segment that holds something is sealed after this time, so that retention can remove it on a quiet site."""

INDEXED_INSTANCES = 100_000
"""Duplicates are known among so many latest instances (about 20 MB); an older one is stored again: no harm."""

IMPLEMENTATION_CLASS_UID = "2.25.68075793166747366948640677038784754122"
"""Who wrote the file meta information and answers associations (PS3.7 D.3.3.2); made once from a random UUID."""

_SUFFIX = ".segment"
_PREPARED = "prepared"
_MAKING = "making.tmp"
_WAITED = "waited.tmp"
_FILE_MAGIC = b"RSCNSPL1"
_RECORD_MAGIC = b"RREC"
_FILE_HEAD = struct.Struct("<8sQQ32s")
_RECORD_HEAD = struct.Struct("<4sHHQQ")
_CHECK_BYTES = 16
_COUNTER = struct.Struct("<Q")
_PLACE = struct.Struct("<QQ")
_ZEROS = bytes(1 << 20)
_OPEN_FILES = 8
_PREPARED_STEP = 8 << 20


class SpoolError(Exception):
    """The spool could not keep or give back an instance; whoever sent it must not be told that it is stored."""


class SpoolFull(SpoolError):
    """No room within the quota or the free-space reserve; what is held stays. Retention brings room back."""


class SpoolGone(SpoolError):
    """The record was removed by retention; nothing can be read again."""


class Kind(IntEnum):
    """What a record is."""

    INSTANCE = 1
    ASSOCIATION_ENDED = 2


class Kept(StrEnum):
    """What became of an instance."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # the same bytes under the same SOP Instance UID are in the spool already
    CONFLICT = "conflict"  # stored, beside other bytes under the same SOP Instance UID


@dataclass(frozen=True)
class StoredInstance:
    """One instance in the spool.

    Attributes:
        position: arrival number of the record, increasing; the cursor of `SpoolReader.follow`.
        segment: number of the segment file.
        offset: byte in that file at which the data set starts.
        size_bytes: length of the data set as received, without preamble and file meta information.
        sha256: of those bytes, hexadecimal.
        sop_class_uid: as in the C-STORE command.
        sop_instance_uid: as in the C-STORE command.
        transfer_syntax_uid: as negotiated.
        scanner: configured slug, else "unknown".
        association: number of the association, unique within the spool.
        received_at: seconds since 1970 at which the last byte had arrived.
    """

    position: int
    segment: int
    offset: int
    size_bytes: int
    sha256: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    scanner: str
    association: int
    received_at: float


@dataclass(frozen=True)
class AssociationEnded:
    """An association that stored something is over; `released` is false where it was aborted or lost."""

    position: int
    association: int
    scanner: str
    received_at: float
    released: bool


SpoolRecord = StoredInstance | AssociationEnded


@dataclass(frozen=True)
class SpoolFacts:
    """How the spool stands: bytes held, bytes free on its disk, age of its oldest record (None if empty), last one."""

    size_bytes: int
    free_bytes: int
    oldest_age_s: float | None
    durable_position: int


@dataclass(frozen=True)
class _Segment:
    """The head of a segment file; its number is the position of its first record."""

    number: int
    first_association: int
    salt: bytes


@dataclass(frozen=True)
class _Found:
    """A record as it lies in a segment: its header at `offset`, the next record at `end` or later."""

    record: SpoolRecord
    offset: int
    end: int


# --- The layout -------------------------------------------------------------------------------------------------------


def _up(size_bytes: int) -> int:
    """The next page boundary."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:016d}{_SUFFIX}"


def _segment_numbers(folder: Path) -> list[int]:
    """Numbers of all segments, oldest first."""
    names = (entry.name for entry in os.scandir(folder) if entry.name.endswith(_SUFFIX))
    return sorted(int(stem) for name in names if (stem := name.removesuffix(_SUFFIX)).isdecimal())


def _pack_segment(segment: _Segment) -> bytes:
    head = _FILE_HEAD.pack(_FILE_MAGIC, segment.number, segment.first_association, segment.salt)
    return (head + hashlib.sha256(head).digest()).ljust(PAGE_BYTES, b"\0")


def _unpack_segment(page: bytes) -> _Segment | None:
    """The head of a segment, or None where it is damaged."""
    head, check = page[: _FILE_HEAD.size], page[_FILE_HEAD.size : _FILE_HEAD.size + 32]
    if len(check) != 32 or hashlib.sha256(head).digest() != check:
        return None
    magic, number, association, salt = _FILE_HEAD.unpack(head)
    return _Segment(number, association, salt) if magic == _FILE_MAGIC else None


def _check(head: bytes, offset: int, salt: bytes) -> bytes:
    return hashlib.blake2b(head + _COUNTER.pack(offset), digest_size=_CHECK_BYTES, key=salt).digest()


def _pack_record(kind: Kind, position: int, facts: list[Any], size_bytes: int, offset: int, salt: bytes) -> bytes:
    """The header of a record.

    Raises:
        ValueError: facts that do not fit into one page.
    """
    words = json.dumps(facts, separators=(",", ":")).encode("ascii")
    length = _RECORD_HEAD.size + len(words) + _CHECK_BYTES
    if length > PAGE_BYTES:
        raise ValueError(f"a record header takes at most {PAGE_BYTES} bytes, got {length}; shorten its facts")
    head = _RECORD_HEAD.pack(_RECORD_MAGIC, kind, length, position, size_bytes) + words
    return head + _check(head, offset, salt)


def _unpack_record(page: bytes, offset: int, segment: _Segment) -> _Found | None:
    """The record whose header starts a page, or None where there is none or it is damaged."""
    if page[:4] != _RECORD_MAGIC or len(page) < _RECORD_HEAD.size:
        return None
    _, kind, length, position, size_bytes = _RECORD_HEAD.unpack_from(page)
    head, check = page[: length - _CHECK_BYTES], page[length - _CHECK_BYTES : length]
    if length <= _RECORD_HEAD.size + _CHECK_BYTES or check != _check(head, offset, segment.salt):
        return None
    facts = json.loads(head[_RECORD_HEAD.size :])
    record: SpoolRecord
    if kind == Kind.INSTANCE:
        record = StoredInstance(position, segment.number, offset + length, size_bytes, *facts)
    else:
        record = AssociationEnded(position, *facts)
    return _Found(record, offset, offset + _up(length + size_bytes))


def _next_record(fd: int, segment: _Segment, offset: int) -> _Found | None:
    """The first whole header at or after a page boundary, stepping over damage; None at the end of the file."""
    end = os.fstat(fd).st_size
    while offset < end:
        found = _unpack_record(os.pread(fd, PAGE_BYTES, offset), offset, segment)
        if found:
            return found
        offset += PAGE_BYTES
    return None


def _digest_of(fd: int, stored: StoredInstance) -> str:
    """SHA-256 of the bytes on disk."""
    digest, offset, left = hashlib.sha256(), stored.offset, stored.size_bytes
    while left > 0 and (piece := os.pread(fd, min(left, 1 << 20), offset)):
        digest.update(piece)
        offset, left = offset + len(piece), left - len(piece)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, pieces: list[Buffer], offset: int) -> None:
    """Write the pieces one after another, whatever the kernel takes at a time."""
    views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    while views:
        written = os.pwritev(fd, views[:512], offset)
        offset += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views and written:
            views[0] = views[0][written:]


# --- What both sides share --------------------------------------------------------------------------------------------


class _Durable:
    """The last durable position, shared with other processes through one small mapped file.

    It is raised only after a sync. A power cut can leave it too low, never too high.
    """

    def __init__(self, folder: Path, write: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
        fd = os.open(folder / "durable", flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if write and os.fstat(fd).st_size < _COUNTER.size:
                os.ftruncate(fd, _COUNTER.size)
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            self._map = mmap.mmap(fd, _COUNTER.size, access=access)
        finally:
            os.close(fd)

    def get(self) -> int:
        position: int = _COUNTER.unpack_from(self._map)[0]
        return position

    def put(self, position: int) -> None:
        _COUNTER.pack_into(self._map, 0, position)

    def close(self) -> None:
        self._map.close()


def _held_bytes(folder: Path) -> int:
    """Bytes that the spool's files take."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            total += entry.stat(follow_symlinks=False).st_size
    return total


def _free_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


# --- Writing ----------------------------------------------------------------------------------------------------------


class _Preparer:
    """Makes the next segment ahead of its use, written with zeros: syncing into unwritten extents is far slower."""

    def __init__(self, folder: Path, size_bytes: int, has_room: Callable[[int], bool]) -> None:
        self._folder, self._size_bytes, self._has_room = folder, size_bytes, has_room
        self._wanted, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="spool-prepare", daemon=True)
        self._thread.start()

    def want(self) -> None:
        """Ask for one; returns at once."""
        self._wanted.set()

    def close(self) -> None:
        self._ended = True
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            self._wanted.wait()
            self._wanted.clear()
            prepared = self._folder / _PREPARED
            if not self._ended and not prepared.exists() and self._has_room(self._size_bytes):
                with suppress(OSError):  # a full or failing disk shows, and is told, when the segment is needed
                    self._make(prepared)

    def _make(self, prepared: Path) -> None:
        making = self._folder / _MAKING
        fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            for offset in range(0, self._size_bytes, len(_ZEROS)):
                if self._ended:
                    return
                os.pwrite(fd, _ZEROS[: self._size_bytes - offset], offset)
                if offset % _PREPARED_STEP == 0:
                    os.fdatasync(fd)  # a little at a time, so that the syncs of instances do not queue behind all of it
            os.fsync(fd)
            making.rename(prepared)
        finally:
            os.close(fd)
            making.unlink(missing_ok=True)


@dataclass
class _Open:
    """The segment that is being written."""

    segment: _Segment
    fd: int
    size_bytes: int
    end: int  # where the next record goes
    durable_end: int  # up to here everything is on stable storage
    opened_at: float


@dataclass(slots=True)
class _Batch:
    """Records appended since the last sync began; one sync decides over all of them."""

    last: int = 0  # position of the last record; 0 while empty
    done: bool = False
    error: OSError | None = None
    known: dict[bytes, _Known] = field(default_factory=dict)  # its instances, until the sync decides over them


@dataclass(frozen=True)
class _Place:
    """Where a record was appended: its header at `start`, its data set at `offset`; the batch decides over it."""

    position: int
    segment: int
    start: int
    offset: int
    batch: _Batch


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of an instance to find its duplicates; the rest is read from its record when needed."""

    digest: bytes
    segment: int
    start: int
    batch: _Batch

    def packed(self) -> bytes:
        """As the index holds it once it is durable: the digest, and where the record lies."""
        return self.digest + _PLACE.pack(self.segment, self.start)


_DURABLE = _Batch(done=True)


def _unpack_known(packed: bytes) -> _Known:
    segment, start = _PLACE.unpack(packed[-_PLACE.size :])
    return _Known(packed[: -_PLACE.size], segment, start, _DURABLE)


class SpoolWriter:
    """The one writer of a spool. Any thread may append; each returns when its record is on stable storage."""

    def __init__(
        self,
        folder: Path,
        quota_bytes: int,
        reserve_bytes: int,
        segment_bytes: int = 256 << 20,
        *,
        sync: Callable[[int], None] = os.fdatasync,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a spool, recover what a crash left, and start a segment.

        Args:
            folder: made if absent; belongs to the spool alone.
            quota_bytes: most that all files may take.
            reserve_bytes: free space on the disk below which nothing is taken.
            segment_bytes: size of a segment; smaller where the quota would not hold eight of them.
            sync: makes the bytes behind a file descriptor durable.
            clock: seconds since 1970.

        Raises:
            SpoolError: the folder belongs to another writer, or cannot be used.
        """
        self._folder, self._quota_bytes, self._reserve_bytes = (folder, quota_bytes, reserve_bytes)
        self._segment_bytes = _up(max(16 * PAGE_BYTES, min(segment_bytes, quota_bytes // 8)))
        self._sync, self._clock = sync, clock
        self._state = threading.Condition()
        self._syncing = self._closed = False
        self._batch = _Batch()
        self._open: _Open | None = None
        self._index: dict[bytes, bytes] = {}  # of durable instances; packed, since there are many
        self._fresh: dict[bytes, _Known] = {}  # of instances that no sync has decided over
        self._last_position = self._last_association = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _take_lock(folder)
            self._durable = _Durable(folder, write=True)
            self._recover()
            self._preparer = _Preparer(folder, self._segment_bytes, self._has_room)
            with suppress(SpoolFull):  # said to each sender until there is room
                self._start_segment(0)
        except OSError as error:
            raise SpoolError(f"the spool cannot be opened ({error.strerror}); check its folder and disk") from error
        self._indexer = threading.Thread(target=self._index_old, name="spool-index", daemon=True)
        self._indexer.start()

    # --- appending ---

    def append_instance(
        self,
        dataset: Buffer,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        scanner: str,
        association: int,
    ) -> tuple[StoredInstance, Kept]:
        """Keep one instance; returns when its bytes and their index are on stable storage.

        An exact duplicate (same bytes, UIDs and scanner) is not written again: its first record is returned.

        Raises:
            SpoolFull: no room; nothing was kept.
            SpoolError: writing or syncing failed; the instance must not be reported as stored.
        """
        sha256 = hashlib.sha256(dataset)
        uids = (sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        key = _short_hash(sop_instance_uid.encode(), scanner.encode())
        digest = _short_hash(sha256.digest(), transfer_syntax_uid.encode())
        with self._state:
            known = self._known(key)
            stored = self._duplicate(known) if known and known.digest == digest else None
            if known and stored:
                batch, kept = known.batch, Kept.DUPLICATE
            else:
                facts: list[Any] = [sha256.hexdigest(), *uids, scanner, association, self._clock()]
                place = self._append(Kind.INSTANCE, facts, dataset)
                stored = StoredInstance(place.position, place.segment, place.offset, len(dataset), *facts)
                batch, kept = place.batch, Kept.CONFLICT if known else Kept.STORED
                self._fresh[key] = batch.known[key] = _Known(digest, place.segment, place.start, batch)
        self._wait_durable(batch)
        return stored, kept

    def append_association_ended(self, association: int, scanner: str, released: bool) -> AssociationEnded:
        """Keep that an association is over; returns when that is durable.

        Raises:
            SpoolError: as for `append_instance`.
        """
        facts: list[Any] = [association, scanner, self._clock(), released]
        with self._state:
            place = self._append(Kind.ASSOCIATION_ENDED, facts, b"")
        self._wait_durable(place.batch)
        return AssociationEnded(place.position, *facts)

    def next_association(self) -> int:
        """A number that no association with a record in this spool has had."""
        with self._state:
            self._last_association += 1
            return self._last_association

    def seal_aged(self, age_s: float = SEGMENT_AGE_S) -> None:
        """Seal a segment that holds something and is older than this, so that retention can reach it."""
        with self._state:
            self._settle()
            if self._open and self._open.end > PAGE_BYTES and self._clock() - self._open.opened_at >= age_s:
                self._seal()

    def close(self) -> None:
        """Finish what was appended and let go of the folder."""
        with self._state:
            self._settle()
            self._closed = True
            self._seal()
        self._indexer.join()
        self._preparer.close()
        self._durable.close()
        os.close(self._lock_fd)

    # --- group commit; the lock is held on entry and exit of each ---

    def _append(self, kind: Kind, facts: list[Any], dataset: Buffer) -> _Place:
        """Put a record into the page cache and into the current batch."""
        opened = self._room_for(_up(PAGE_BYTES + len(dataset)))
        position, start = self._last_position + 1, opened.end
        head = _pack_record(kind, position, facts, len(dataset), start, opened.segment.salt)
        end = start + _up(len(head) + len(dataset))
        padding = _ZEROS[: end - start - len(head) - len(dataset)]  # whole pages need no reading back
        try:
            _write_all(opened.fd, [head, dataset, padding], start)
        except OSError as error:
            raise _as_spool_error(error) from error
        self._last_position, opened.end, self._batch.last = position, end, position
        return _Place(position, opened.segment.number, start, start + len(head), self._batch)

    def _room_for(self, size_bytes: int) -> _Open:
        """The open segment, a new one where this does not fit."""
        if _free_bytes(self._folder) < self._reserve_bytes:
            raise SpoolFull("the disk is below its free-space reserve; nothing more is taken until there is room")
        while True:
            if self._closed:
                raise SpoolError("the spool is closed; send again after the restart")
            opened = self._open
            if opened and opened.end + size_bytes <= opened.size_bytes:
                return opened
            if self._syncing or self._batch.last:
                self._settle()
                continue
            self._seal()
            try:
                self._start_segment(size_bytes)
            except OSError as error:
                raise _as_spool_error(error) from error

    def _wait_durable(self, batch: _Batch) -> None:
        """Return when this batch is on stable storage; sync it if nobody else is syncing. Takes the lock itself."""
        with self._state:
            while not batch.done:
                if self._syncing:
                    self._state.wait()
                else:
                    self._commit()
        if batch.error:
            raise SpoolError(f"the disk could not sync ({batch.error.strerror}); send again") from batch.error

    def _settle(self) -> None:
        """Wait until nothing appended is undecided. Others may append meanwhile."""
        while self._syncing or self._batch.last:
            if self._syncing:
                self._state.wait()
            else:
                self._commit()

    def _commit(self) -> None:
        """Sync the current batch. The lock is free while the disk works, so the next batch gathers."""
        opened = self._open
        if opened is None:
            raise SpoolError("expected an open segment under a batch")
        batch, self._batch, end = self._batch, _Batch(), opened.end
        self._syncing = True
        self._state.release()
        try:
            self._sync(opened.fd)
        except OSError as error:
            batch.error = error
        finally:
            self._state.acquire()
            self._syncing = False
        batch.done = True
        if batch.error:
            self._abandon(batch.error)
        else:
            opened.durable_end = end
            self._durable.put(batch.last)
            self._remember(batch)
        self._state.notify_all()

    def _abandon(self, error: OSError) -> None:
        """Give a segment up after a failed sync: the kernel may have dropped its pages, and a second sync would lie."""
        self._batch.error, self._batch.done, self._batch = error, True, _Batch()
        opened, self._open = self._open, None
        if opened:
            opened.end = opened.durable_end
            _cut(self._folder, opened)
        self._fresh.clear()  # all of it is in the two batches that failed

    # --- segments ---

    def _seal(self) -> None:
        """Cut the open segment to its length; nothing more goes into it."""
        opened, self._open = self._open, None
        if opened:
            _cut(self._folder, opened)

    def _start_segment(self, size_bytes: int) -> None:
        """Open a segment that has room for a record of this size.

        Raises:
            SpoolFull: the quota or the disk has no room for it.
            OSError: the disk failed.
        """
        number = self._last_position + 1
        prepared, path = self._folder / _PREPARED, _segment_path(self._folder, number)
        fits = PAGE_BYTES + size_bytes <= self._segment_bytes
        if not (fits and prepared.exists()):
            size = max(min(FIRST_SEGMENT_BYTES, self._segment_bytes), _up(PAGE_BYTES + size_bytes))
            if not self._has_room(size):
                raise SpoolFull("the spool has reached its quota, or the disk its reserve; what it holds is kept")
            prepared = self._folder / _WAITED
            _preallocate(prepared, size)
        fd = os.open(prepared, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        segment = _Segment(number, self._last_association + 1, secrets.token_bytes(32))
        _write_all(fd, [_pack_segment(segment)], 0)
        os.fsync(fd)
        prepared.rename(path)
        _sync_folder(self._folder)
        self._open = _Open(segment, fd, os.fstat(fd).st_size, PAGE_BYTES, PAGE_BYTES, self._clock())
        self._preparer.want()

    def _has_room(self, size_bytes: int) -> bool:
        """Whether a new file of this size keeps quota and reserve."""
        within_quota = _held_bytes(self._folder) + size_bytes <= self._quota_bytes
        return within_quota and _free_bytes(self._folder) - size_bytes >= self._reserve_bytes

    def _recover(self) -> None:
        """Find the end of what is whole, cut off what is torn, and make the rest durable."""
        for name in (_MAKING, _WAITED):
            (self._folder / name).unlink(missing_ok=True)
        numbers = _segment_numbers(self._folder)
        durable = self._durable.get()
        self._last_position, self._last_association = (max([durable, *(n - 1 for n in numbers)]), 0)
        if not numbers:
            return
        fd = os.open(_segment_path(self._folder, numbers[-1]), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            segment = _unpack_segment(os.pread(fd, PAGE_BYTES, 0))
            if segment is None:  # keep what may still be rescued by hand; its number is not used again
                self._last_position = max(self._last_position, numbers[-1])
                return
            self._last_association = segment.first_association - 1
            end = self._recover_records(fd, segment, durable)
            opened = _Open(segment, os.dup(fd), end, end, end, 0.0)
            os.fsync(fd)
        finally:
            os.close(fd)
        _cut(self._folder, opened)
        self._durable.put(max(self._last_position, durable))

    def _recover_records(self, fd: int, segment: _Segment, durable: int) -> int:
        """Walk the last segment; returns where its last whole record ends.

        Beyond the durable position a record may be torn: its header is wiped, so that nobody takes it for an instance.
        """
        end = PAGE_BYTES
        while found := _next_record(fd, segment, end):
            record, torn = found.record, False
            if isinstance(record, StoredInstance) and record.position > durable:
                torn = _digest_of(fd, record) != record.sha256
            if torn:
                os.pwrite(fd, _ZEROS[:PAGE_BYTES], found.offset)
                continue
            end = found.end
            self._last_position = max(self._last_position, record.position)
            self._last_association = max(self._last_association, record.association)
        return min(end, max(PAGE_BYTES, os.fstat(fd).st_size))

    # --- duplicates; the lock is held ---

    def _known(self, key: bytes) -> _Known | None:
        """The instance of this key if it is still in the spool."""
        packed = self._index.get(key)
        known = self._fresh.get(key) or (_unpack_known(packed) if packed else None)
        if known and not _segment_path(self._folder, known.segment).exists():
            self._index.pop(key, None)
            self._fresh.pop(key, None)
            return None
        return known

    def _duplicate(self, known: _Known) -> StoredInstance | None:
        """The record of a known instance, read again."""
        with suppress(OSError):
            fd = os.open(_segment_path(self._folder, known.segment), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                segment = _unpack_segment(os.pread(fd, PAGE_BYTES, 0))
                page = os.pread(fd, PAGE_BYTES, known.start)
                found = _unpack_record(page, known.start, segment) if segment else None
            finally:
                os.close(fd)
            if found and isinstance(found.record, StoredInstance):
                return found.record
        return None

    def _remember(self, batch: _Batch) -> None:
        """Move the instances of a durable batch into the index."""
        for key, known in batch.known.items():
            if self._fresh.get(key) is known:
                del self._fresh[key]
            self._index.pop(key, None)
            self._index[key] = known.packed()
            if len(self._index) > INDEXED_INSTANCES:
                del self._index[next(iter(self._index))]
        batch.known.clear()

    def _index_old(self) -> None:
        """Rebuild the index of duplicates from the segments of earlier runs, newest first."""
        reader = SpoolReader(self._folder)
        ours = self._open.segment.number if self._open else self._last_position + 1
        for number in reversed([n for n in _segment_numbers(self._folder) if n < ours]):
            for found in reader.scan(number):
                if self._closed or len(self._index) >= INDEXED_INSTANCES:
                    return
                stored = found.record
                if isinstance(stored, StoredInstance):
                    key = _short_hash(stored.sop_instance_uid.encode(), stored.scanner.encode())
                    digest = _short_hash(bytes.fromhex(stored.sha256), stored.transfer_syntax_uid.encode())
                    with self._state:
                        if key not in self._fresh:
                            self._index.setdefault(key, _Known(digest, number, found.offset, _DURABLE).packed())


def _short_hash(*parts: bytes) -> bytes:
    """16 bytes that stand for these parts."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _take_lock(folder: Path) -> int:
    """The lock that makes its holder the one writer; held until the file descriptor closes."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SpoolError(
            "the spool is in use by another receiver; stop that one, or give this one its own folder"
        ) from None
    return fd


def _preallocate(path: Path, size_bytes: int) -> None:
    """A file with its blocks reserved; with zeros written where it is small."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        if size_bytes <= FIRST_SEGMENT_BYTES:
            for offset in range(0, size_bytes, len(_ZEROS)):
                os.pwrite(fd, _ZEROS[: size_bytes - offset], offset)
    finally:
        os.close(fd)


def _cut(folder: Path, opened: _Open) -> None:
    """Cut a segment to its length and close it; remove it when it holds nothing.

    A failure here is no loss: the space stays taken until retention, and readers step over what is not whole.
    """
    with suppress(OSError):
        if opened.end <= PAGE_BYTES:
            _segment_path(folder, opened.segment.number).unlink(missing_ok=True)
        else:
            os.ftruncate(opened.fd, opened.end)
            os.utime(opened.fd)
    os.close(opened.fd)


def _as_spool_error(error: OSError) -> SpoolError:
    """What a failed write means to a sender."""
    if isinstance(error, SpoolError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpoolFull("the disk is full; what the spool holds is kept")
    return SpoolError(f"the disk could not write ({error.strerror}); send again")


# --- Reading ----------------------------------------------------------------------------------------------------------


class SpoolReader:
    """Reads a spool from any process; one thread at a time."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder; it may still be empty."""
        self._folder = folder
        self._files: dict[int, tuple[int, _Segment]] = {}
        self._durable: _Durable | None = None
        self._at = (0, 0, 0)  # position of the last record seen, its segment, and where the next one starts

    def durable_position(self) -> int:
        """Position of the last durable record; 0 while there is none."""
        if self._durable is None:
            with suppress(FileNotFoundError, ValueError):
                self._durable = _Durable(self._folder, write=False)
        return self._durable.get() if self._durable else 0

    def follow(self, position: int, limit: int = 4096) -> list[SpoolRecord]:
        """Durable records after a position, oldest first.

        Args:
            position: of the last record already seen; 0 for all.
            limit: at most so many; call again with the last one's position for the rest.
        """
        last = self.durable_position()
        records: list[SpoolRecord] = []
        if position >= last:
            return records
        for found in self._walk(position):
            if found.record.position > last:
                break
            if found.record.position > position:
                records.append(found.record)
                segment = found.record.segment if isinstance(found.record, StoredInstance) else self._at[1]
                self._at = (found.record.position, segment, found.end)
            if len(records) >= limit:
                break
        return records

    def scan(self, number: int) -> Iterator[_Found]:
        """Every whole record of one segment, durable or not."""
        yield from self._records(number, PAGE_BYTES)

    def read(self, stored: StoredInstance) -> bytes:
        """The data set as received, without preamble and file meta information.

        Raises:
            SpoolGone: removed by retention.
            SpoolError: the bytes are not the ones that were stored.
        """
        opened = self._file(stored.segment)
        data = os.pread(opened[0], stored.size_bytes, stored.offset) if opened else b""
        while opened and len(data) < stored.size_bytes:  # the kernel gives at most 2 GiB at a time
            more = os.pread(opened[0], stored.size_bytes - len(data), stored.offset + len(data))
            if not more:
                break
            data += more
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            if not _segment_path(self._folder, stored.segment).exists():
                raise SpoolGone(f"record {stored.position} was removed by retention; nothing is left to read")
            raise SpoolError(
                f"record {stored.position}: expected {stored.size_bytes} bytes as stored, got others; check the disk"
            )
        return data

    def part10(self, stored: StoredInstance) -> bytes:
        """The instance as a DICOM file: zero preamble, file meta information, data set as received."""
        return file_meta(stored) + self.read(stored)

    def facts(self, now: float | None = None) -> SpoolFacts:
        """How the spool stands, for metrics and the doctor."""
        numbers = _segment_numbers(self._folder)
        age = None
        for number in numbers[:1]:
            first = next(self.scan(number), None)
            age = max(0.0, (time.time() if now is None else now) - first.record.received_at) if first else None
        return SpoolFacts(_held_bytes(self._folder), _free_bytes(self._folder), age, self.durable_position())

    def close(self) -> None:
        """Close the files."""
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()
        if self._durable:
            self._durable.close()

    def _walk(self, position: int) -> Iterator[_Found]:
        """Records from just after a position, segment by segment."""
        numbers = _segment_numbers(self._folder)
        seen, current, offset = self._at
        if position != seen or current not in numbers:
            current = max((n for n in numbers if n <= position + 1), default=numbers[0] if numbers else 0)
            offset = PAGE_BYTES
        for number in numbers:
            if number >= current:
                start = offset if number == current else PAGE_BYTES
                self._at = (self._at[0], number, start)  # where to look again, should nothing stand there yet
                yield from self._records(number, start)

    def _records(self, number: int, offset: int) -> Iterator[_Found]:
        opened = self._file(number)
        while opened and (found := _next_record(opened[0], opened[1], offset)):
            yield found
            offset = found.end

    def _let_go_of_removed(self) -> None:
        """Close files that retention has removed: while one is open, its disk space is not free."""
        for number, (fd, _) in list(self._files.items()):
            if os.fstat(fd).st_nlink == 0:
                os.close(fd)
                del self._files[number]

    def _file(self, number: int) -> tuple[int, _Segment] | None:
        """An open segment, or None where it is gone or its head is damaged."""
        self._let_go_of_removed()
        if number in self._files:
            return self._files[number]
        try:
            fd = os.open(_segment_path(self._folder, number), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        segment = _unpack_segment(os.pread(fd, PAGE_BYTES, 0))
        if segment is None:
            os.close(fd)
            return None
        if len(self._files) >= _OPEN_FILES:
            oldest = next(iter(self._files))
            os.close(self._files.pop(oldest)[0])
        self._files[number] = fd, segment
        return self._files[number]


def file_meta(stored: StoredInstance) -> bytes:
    """Zero preamble, prefix and file meta information of an instance, explicit VR little endian (PS3.10 section 7.1).

    Zeros because a sender's preamble can make a file mean something else to another program.
    """

    def uid(element: int, value: str) -> bytes:
        data = value.encode("ascii")
        data += b"\0" * (len(data) % 2)
        return struct.pack("<HH2sH", 2, element, b"UI", len(data)) + data

    body = (
        struct.pack("<HH2sHI2s", 2, 0x0001, b"OB", 0, 2, b"\0\1")
        + uid(0x0002, stored.sop_class_uid)
        + uid(0x0003, stored.sop_instance_uid)
        + uid(0x0010, stored.transfer_syntax_uid)
        + uid(0x0012, IMPLEMENTATION_CLASS_UID)
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(body)) + body


# --- Retention --------------------------------------------------------------------------------------------------------


def remove_segments(
    folder: Path, judged_before_position: int, older_than_s: float, now: Callable[[], float] = time.time
) -> int:
    """Remove segments in which everything is judged and old. The newest one is left to its writer.

    Args:
        folder: the spool.
        judged_before_position: every record before this position may go.
        older_than_s: least time since the segment was sealed.
        now: seconds since 1970.

    Returns:
        How many were removed.
    """
    numbers = _segment_numbers(folder)
    removed = 0
    for number, following in itertools.pairwise(numbers):
        path = _segment_path(folder, number)
        with suppress(FileNotFoundError):
            if following <= judged_before_position and now() - path.stat().st_mtime >= older_than_s:
                path.unlink()
                removed += 1
    if removed:
        _sync_folder(folder)
    return removed
