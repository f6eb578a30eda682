"""Success means stable storage: after kill -9 every acknowledged instance is there, and no success leaves before its sync."""

from __future__ import annotations

import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon.spool import SpoolReader, StoredInstance
from tests.receiving import Peer, ReceiverProcess, make_dataset, settings_for, uid

ACCEPTED = 2
ROUNDS = 5
SENDERS = 2


def sizes(number: int) -> int:
    """Some instances within a page, some over many."""
    return (300, 4096, 40_000, 150_000)[number % 4]


def data_of(number: int) -> bytes:
    return make_dataset(uid(number), size_bytes=sizes(number), fill=number)


def found_in(folder: Path) -> dict[str, bytes]:
    """Everything that the spool gives back: SOP Instance UID -> bytes."""
    reader, found, position = SpoolReader(folder), {}, 0
    while records := reader.follow(position):
        position = records[-1].position
        for record in records:
            if isinstance(record, StoredInstance):
                found[record.sop_instance_uid] = reader.read(record)
    reader.close()
    return found


@dataclass
class Pushing:
    """Senders that push until the receiver dies, and what was acknowledged to them."""

    acknowledged: list[int]
    enough: threading.Event
    goal: int

    def push(self, port: int, numbers: Iterator[int]) -> None:
        try:
            with Peer(port) as peer:
                assert peer.associate() == ACCEPTED
                for number in numbers:
                    if peer.store(uid(number), data_of(number)) == 0x0000:
                        self.acknowledged.append(number)
                    if len(self.acknowledged) >= self.goal:
                        self.enough.set()
        except OSError:
            self.enough.set()


def test_kill_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    """Kill -9 while two associations push, again and again: each acknowledged instance is found with its bytes."""
    settings, chance = settings_for(tmp_path), random.Random(20)
    acknowledged: list[int] = []
    for attempt in range(ROUNDS):
        process = ReceiverProcess(settings)
        pushing = Pushing([], threading.Event(), chance.randint(1, 25))
        numbers = [
            iter(range(10_000 * attempt + 1_000 * n, 10_000 * attempt + 1_000 * n + 400)) for n in range(SENDERS)
        ]
        threads = [threading.Thread(target=pushing.push, args=(process.port, each)) for each in numbers]
        for thread in threads:
            thread.start()
        assert pushing.enough.wait(60)
        threading.Event().wait(chance.random() * 0.02)  # the moment is random on purpose
        assert process.kill() == -signal.SIGKILL
        for thread in threads:
            thread.join(30)
        acknowledged += pushing.acknowledged
        before = found_in(tmp_path / "spool")
        missing = [number for number in acknowledged if before.get(uid(number)) != data_of(number)]
        assert missing == []
    process = ReceiverProcess(settings)
    with Peer(process.port) as peer:
        assert peer.associate() == ACCEPTED
        assert peer.store(uid(acknowledged[0]), data_of(acknowledged[0])) == 0x0000
        assert peer.store(uid(999_999), data_of(999_999)) == 0x0000
    assert process.stop() == 0
    after = found_in(tmp_path / "spool")
    assert [number for number in [*acknowledged, 999_999] if after.get(uid(number)) != data_of(number)] == []
    assert len(acknowledged) >= ROUNDS


# --- the order of system calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One system call as strace saw it, with the lines at which it began and ended."""

    name: str
    text: str
    began: int
    ended: int


def traced(log: Path) -> list[Call]:
    """The calls in a log of `strace -f`, in the order of their beginning."""
    calls: list[Call] = []
    open_calls: dict[str, tuple[str, str, int]] = {}
    for at, line in enumerate(log.read_text(errors="replace").splitlines()):
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if resumed := re.match(r"<\.\.\. (\w+) resumed>(.*)", rest):
            name, text, began = open_calls.pop(thread, (resumed[1], "", at))
            calls.append(Call(name, text + resumed[2], began, at))
        elif rest.endswith("<unfinished ...>"):
            open_calls[thread] = (rest.partition("(")[0], rest, at)
        elif "(" in rest and not rest.startswith(("---", "+++")):
            calls.append(Call(rest.partition("(")[0], rest, at, at))
    return sorted(calls, key=lambda call: call.began)


@pytest.fixture
def strace(tmp_path: Path) -> tuple[str, ...]:
    """How to run a program under strace, its log in `tmp_path / "strace"`."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed (Debian package strace)")
    calls = "trace=fdatasync,fsync,pwrite64,pwritev,pwritev2,sendto,rename,renameat,renameat2"
    return (program, "-f", "-y", "-s", "700", "-e", calls, "-e", "signal=none", "-o", str(tmp_path / "strace"))


def push_all(port: int, senders: int, each: int) -> None:
    def push(sender: int) -> None:
        with Peer(port) as peer:
            assert peer.associate() == ACCEPTED
            for number in range(1000 * (sender + 1), 1000 * (sender + 1) + each):
                assert peer.store(uid(number), data_of(number)) == 0x0000

    threads = [threading.Thread(target=push, args=(sender,)) for sender in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_no_success_leaves_before_its_sync(tmp_path: Path, strace: tuple[str, ...]) -> None:
    """Under strace: header and bytes are written in one call, a sync of that file begins after it and ends before 0x0000."""
    process = ReceiverProcess(settings_for(tmp_path), wrapper=strace)
    push_all(process.port, senders=3, each=12)
    process.stop()
    calls = traced(tmp_path / "strace")
    syncs = [call for call in calls if call.name == "fdatasync" and call.text.rstrip().endswith("= 0")]
    checked = 0
    for number in (1000 * (sender + 1) + n for sender in range(3) for n in range(12)):
        name = re.escape(uid(number)) + r"(?!\d)"
        (write,) = [call for call in calls if call.name.startswith("pwrite") and re.search(name, call.text)]
        (answer,) = [call for call in calls if call.name == "sendto" and re.search(name, call.text)]
        file = re.search(r"<([^>]+)>", write.text)
        assert file
        assert f"{number}" not in file[1]
        covering = [s for s in syncs if file[1] in s.text and write.ended < s.began and s.ended < answer.began]
        assert covering, f"the answer to instance {number} left before a sync that covers it"
        checked += 1
    assert checked == 36


def test_new_segments_are_durable_before_use(tmp_path: Path, strace: tuple[str, ...]) -> None:
    """Under strace: a segment gets its name, and the folder is synced, before anything is acknowledged from it."""
    process = ReceiverProcess(settings_for(tmp_path), wrapper=strace)
    push_all(process.port, senders=1, each=40)
    process.stop()
    calls = traced(tmp_path / "strace")
    renames = [call for call in calls if call.name.startswith("rename") and ".segment" in call.text]
    assert len(renames) >= 2
    for rename in renames:
        segment = re.search(r"(\d{16}\.segment)", rename.text)
        assert segment
        folder_syncs = [c for c in calls if c.name == "fsync" and "spool>" in c.text and c.began > rename.ended]
        records = [c for c in calls if c.name.startswith("pwrite") and segment[1] in c.text and c.began > rename.ended]
        assert folder_syncs
        if records:
            assert folder_syncs[0].ended < records[0].began


def test_an_injected_sync_error_is_out_of_resources(tmp_path: Path, strace: tuple[str, ...]) -> None:
    """When the kernel fails the third fdatasync of a sender, that instance gets 0xA700, the others 0x0000 and are kept."""
    inject = ("-e", "inject=fdatasync:error=EIO:when=3")
    process = ReceiverProcess(settings_for(tmp_path), wrapper=(*strace, *inject))
    with Peer(process.port) as peer:
        assert peer.associate() == ACCEPTED
        statuses = [peer.store(uid(number), data_of(number)) for number in range(5)]
    process.stop()
    assert statuses == [0x0000, 0x0000, 0xA700, 0x0000, 0x0000]
    assert found_in(tmp_path / "spool").keys() == {uid(number) for number in (0, 1, 3, 4)}


def test_a_stop_ends_the_process_cleanly(tmp_path: Path) -> None:
    """Told to stop, or left alone by its parent, the receiver ends with status 0 and its spool opens again."""
    settings = settings_for(tmp_path)
    process = ReceiverProcess(settings)
    with Peer(process.port) as peer:
        assert peer.associate() == ACCEPTED
        assert peer.store(uid(1), data_of(1)) == 0x0000
    assert process.leave() == 0
    process = ReceiverProcess(settings)
    assert process.stop() == 0
    assert found_in(tmp_path / "spool") == {uid(1): data_of(1)}


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    """The main process hears what cannot be used and what to do, and the receiver ends."""
    first = ReceiverProcess(settings_for(tmp_path / "one"))
    busy = settings_for(tmp_path / "two")
    object.__setattr__(busy.dicom, "port", first.port)
    second = ReceiverProcess(busy)
    assert second.listening["kind"] == "failed"
    assert str(first.port) in second.listening["text"]
    assert second.process.wait(30) == 0
    first.stop()
