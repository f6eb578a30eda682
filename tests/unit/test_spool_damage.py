"""Whatever byte of a log rots or wherever it is cut, every record that was not hit is still there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.spool import PAGE_BYTES, SpoolError, SpoolReader, SpoolWriter, StoredInstance
from tests.receiving import EXPLICIT, MR, uid

SIZES = (1, 5000, 4096, 30_000, 12_345, 3, 60_000)


@dataclass(frozen=True)
class Log:
    """A log as a crash leaves it, and what was acknowledged in it."""

    folder: Path
    stored: list[StoredInstance]

    @property
    def segment(self) -> Path:
        return max(self.folder.glob("*.segment"))

    def span(self, stored: StoredInstance) -> range:
        """Bytes of the file that this record needs."""
        start = (stored.offset - 1) // PAGE_BYTES * PAGE_BYTES
        return range(start, stored.offset + stored.size_bytes)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("log")
    writer = SpoolWriter(folder / "live", quota_bytes=64 << 20, reserve_bytes=0, segment_bytes=1 << 20)
    stored = [
        writer.append_instance(
            bytes([n]) * size,
            sop_class_uid=MR,
            sop_instance_uid=uid(n),
            transfer_syntax_uid=EXPLICIT,
            scanner="mr1",
            association=1,
        )[0]
        for n, size in enumerate(SIZES)
    ]
    shutil.copytree(folder / "live", folder / "crashed", ignore=shutil.ignore_patterns("making.tmp", "prepared"))
    writer.close()
    return Log(folder / "crashed", stored)


def intact(folder: Path) -> list[StoredInstance]:
    """The records that are found and whose bytes are right."""
    reader, found = SpoolReader(folder), []
    for record in reader.follow(0):
        try:
            assert isinstance(record, StoredInstance)
            reader.read(record)
            found.append(record)
        except SpoolError:
            continue
    reader.close()
    return found


@settings(deadline=None, max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True, allow_subnormal=False), mask=st.integers(1, 255))
def test_one_rotten_byte_costs_one_record_at_most(log: Log, where: float, mask: int) -> None:
    """A follower finds every record but the one whose bytes rotted."""
    last = log.span(log.stored[-1]).stop
    at = PAGE_BYTES + int(where * (last - PAGE_BYTES))
    healthy = log.segment.read_bytes()
    rotten = bytearray(healthy)
    rotten[at] ^= mask
    try:
        log.segment.write_bytes(rotten)
        assert intact(log.folder) == [stored for stored in log.stored if at not in log.span(stored)]
    finally:
        log.segment.write_bytes(healthy)


@settings(deadline=None, max_examples=12)
@given(where=st.floats(0, 1, allow_subnormal=False), durable=st.booleans())
def test_a_cut_anywhere_costs_only_what_lay_behind_it(
    log: Log, tmp_path_factory: pytest.TempPathFactory, where: float, durable: bool
) -> None:
    """After recovery from a log that ends early, every record before the cut is whole, and storing goes on."""
    folder = tmp_path_factory.mktemp("cut") / "spool"
    shutil.copytree(log.folder, folder)
    segment = max(folder.glob("*.segment"))
    at = PAGE_BYTES + int(where * (log.span(log.stored[-1]).stop - PAGE_BYTES))
    with segment.open("r+b") as file:
        file.truncate(at)
    if not durable:
        (folder / "durable").write_bytes(bytes(8))  # as low as a power cut can leave it
    writer = SpoolWriter(folder, quota_bytes=64 << 20, reserve_bytes=0, segment_bytes=1 << 20)
    kept = [stored for stored in log.stored if log.span(stored).stop <= at]
    assert intact(folder) == kept
    stored, _ = writer.append_instance(
        b"next", sop_class_uid=MR, sop_instance_uid=uid(99), transfer_syntax_uid=EXPLICIT, scanner="mr1", association=2
    )
    assert intact(folder) == [*kept, stored]
    writer.close()
