"""A follower of the spool outlives restarts of its writer."""

from __future__ import annotations

from pathlib import Path

from daemon.spool import SpoolReader, SpoolWriter


def append(writer: SpoolWriter, name: str) -> int:
    stored, _ = writer.append_instance(
        name.encode(),
        sop_class_uid="1.2",
        sop_instance_uid=f"1.2.{name}",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        scanner="unknown",
        association=1,
    )
    return stored.position


def test_a_follower_sees_what_comes_after_a_writer_that_stored_nothing(tmp_path: Path) -> None:
    """A segment that stayed empty is made anew under its number; the follower must not hold on to the old file."""
    reader = SpoolReader(tmp_path)
    for name in ("1", "2", "3"):
        SpoolWriter(tmp_path, 1 << 30, 0, segment_bytes=1 << 20).close()
        idle = SpoolWriter(tmp_path, 1 << 30, 0, segment_bytes=1 << 20)
        last = reader.durable_position()
        assert reader.follow(last) == []
        list(reader.scan(last + 1))
        idle.close()
        writer = SpoolWriter(tmp_path, 1 << 30, 0, segment_bytes=1 << 20)
        position = append(writer, name)
        assert [record.position for record in reader.follow(last)] == [position]
        writer.close()
    reader.close()
