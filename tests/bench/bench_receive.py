"""Durable reception against DCMTK storescp and a naive pynetdicom handler: same sender, side by side, interleaved.

Absolute rates depend on the machine and on what else runs; read the ratios, which are taken within each round.
storescp and the naive handler answer before their file is on stable storage; Rescan answers after its sync.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from daemon.config import SpoolSettings
from tests.receiving import MR, Peer, ReceiverProcess, make_dataset, pack_request, pack_store, settings_for

ROUNDS = int(os.environ.get("RESCAN_BENCH_ROUNDS", "5"))
INSTANCES = 192
"""Per run; four associations share them."""

SIDE = 256
"""Rows and columns of an image: 256 x 256 x 2 bytes make instances of 131 kB."""

PDU_BYTES = 131072
ROOT = "1.2.826.0.1.3680043.10.2"
RESCAN, STORESCP, NAIVE = "Rescan, durable", "DCMTK storescp", "pynetdicom, naive"
BLAST_1, BLAST_4, STORESCU, UNTUNED = "1 association", "4 associations", "storescu", "storescu, Nagle on"
SENDERS = {
    BLAST_1: (RESCAN, STORESCP, NAIVE),
    BLAST_4: (RESCAN, STORESCP, NAIVE),
    STORESCU: (RESCAN, STORESCP, NAIVE),
    UNTUNED: (RESCAN,),  # the others stall 44 ms an instance with it, which would only flatter Rescan
}


@dataclass(frozen=True)
class Target:
    """A running receiver: its port, its process, and the folder that may be emptied after a run (None: leave it)."""

    port: int
    process: int
    folder: Path | None

    def cpu_s(self) -> float:
        """Processor seconds of it and its children, those that ended and those that still run."""
        children = Path(f"/proc/{self.process}/task/{self.process}/children").read_text(encoding="ascii").split()
        return sum(cpu_s(int(process)) for process in [self.process, *children])


def cpu_s(process: int) -> float:
    """Processor seconds that a process and the children it waited for have used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# --- receivers --------------------------------------------------------------------------------------------------------


@contextmanager
def rescan(folder: Path) -> Iterator[Target]:
    """The receiver process as the daemon runs it."""
    process = ReceiverProcess(settings_for(folder, SpoolSettings(quota_bytes=32 << 30, reserve_bytes=1 << 30)))
    try:
        yield Target(process.port, process.process.pid, None)
    finally:
        process.stop()


@contextmanager
def storescp(folder: Path) -> Iterator[Target]:
    """DCMTK's receiver as fast as it goes: no Nagle, large PDUs, bytes unchanged, a process for each association."""
    port = unused_port()
    arguments = ["--fork", "+B", "-pdu", str(PDU_BYTES), "--output-directory", str(folder), str(port)]
    yield from _child(["storescp", *arguments], port, folder, {"TCP_NODELAY": "1"})


@contextmanager
def naive(folder: Path) -> Iterator[Target]:
    """What a pynetdicom tutorial shows: decode, `save_as`, success."""
    port = unused_port()
    yield from _child([sys.executable, "-m", "tests.bench.bench_receive", str(port), str(folder)], port, folder, {})


def _child(command: list[str], port: int, folder: Path, environment: dict[str, str]) -> Iterator[Target]:
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield Target(port, process.pid, folder)
    finally:
        process.terminate()
        process.wait()


def serve_naive(port: int, folder: Path) -> None:
    """Be the naive receiver."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import MRImageStorage

    def store(event: evt.Event) -> int:
        ds = event.dataset
        ds.file_meta = event.file_meta
        ds.save_as(folder / f"{ds.SOPInstanceUID}.dcm", enforce_file_format=True)
        return 0x0000

    ae = AE()
    ae.add_supported_context(MRImageStorage, ExplicitVRLittleEndian)
    ae.start_server(("127.0.0.1", port), block=True, evt_handlers=[(evt.EVT_C_STORE, store)])


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Until an association is accepted."""
    for _ in range(600):
        try:
            with Peer(port) as peer:
                if peer.associate() == 2:
                    peer.release()
                    return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing accepts associations on port {port} after 60 s")


# --- senders ----------------------------------------------------------------------------------------------------------


def blast(port: int, run: int, associations: int) -> float:
    """Framed beforehand, one instance at a time on each association; returns instances per second."""
    each = INSTANCES // associations
    batches = [
        [framed(run, association * each + number) for number in range(each)] for association in range(associations)
    ]
    ready = threading.Barrier(associations + 1)
    failures: list[str] = []

    def push(batch: list[bytes]) -> None:
        ready.wait()
        with Peer(port) as peer:
            peer.send(pack_request())
            if peer.pdu()[0] != 2:
                failures.append("not accepted")
                return
            for message in batch:
                peer.send(message)
                status = peer.response()[0x0900]
                if status != b"\0\0":
                    failures.append(status.hex())
            peer.release()

    threads = [threading.Thread(target=push, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failures:
        raise RuntimeError(f"expected success for each instance, got {failures[:3]}; see the receiver's log")
    return INSTANCES / seconds


def framed(run: int, number: int) -> bytes:
    """One C-STORE request, with a UID that no other run uses."""
    instance = f"{ROOT}.{run}.{number}"
    return pack_store(instance, make_dataset(instance, size_bytes=2 * SIDE * SIDE, fill=number), pdu_bytes=PDU_BYTES)


def storescu(port: int, series: Path, nagle: bool) -> float:
    """DCMTK's sender, with a new UID for every image; returns instances per second, its start-up included."""
    command = ["storescu", "-R", "+sd", "+II", "127.0.0.1", str(port), str(series)]
    tuned = {} if nagle else {"TCP_NODELAY": "1"}
    began = time.perf_counter()
    subprocess.run(command, env=os.environ | tuned, check=True, stderr=subprocess.DEVNULL)
    return INSTANCES / (time.perf_counter() - began)


def write_series(folder: Path) -> Path:
    """The same kind of series as files, for storescu."""
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 4096, (SIDE, SIDE), dtype=np.uint16)
    for number in range(INSTANCES):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = MR, f"{ROOT}.0.{number}", f"{ROOT}.1"
        ds.StudyInstanceUID, ds.PatientName, ds.PatientID = f"{ROOT}.2", "BENCH", "BENCH"
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = SIDE, SIDE, 16, 12, 11
        ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 0, 1, "MONOCHROME2"
        ds.PixelData = np.roll(pixels, number).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        pydicom.dcmwrite(folder / f"{number}.dcm", ds, enforce_file_format=True)
    return folder


# --- the ceiling ------------------------------------------------------------------------------------------------------


def syncs_per_s(folder: Path) -> float:
    """Appends of one instance with fdatasync each, into a file written beforehand: what the disk gives one writer."""
    data, count = bytes(2 * SIDE * SIDE), 64
    path = folder / "ceiling"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, bytes(count * len(data)), 0)
        os.fsync(fd)
        began = time.perf_counter()
        for number in range(count):
            os.pwrite(fd, data, number * len(data))
            os.fdatasync(fd)
        return count / (time.perf_counter() - began)
    finally:
        os.close(fd)
        path.unlink()


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Of each pair of sender and receiver: instances per second and CPU milliseconds per instance, round by round."""

    rates: dict[tuple[str, str], list[float]]
    cpu_ms: dict[tuple[str, str], list[float]]
    syncs_per_s: list[float]


def measure(folder: Path) -> Measured:
    """Every sender into every receiver, in turns, round by round; the first round warms up."""
    series = write_series(folder / "series")
    pairs = [(sender, receiver) for sender, names in SENDERS.items() for receiver in names]
    found = Measured({pair: [] for pair in pairs}, {pair: [] for pair in pairs}, [])
    receivers = {RESCAN: rescan, STORESCP: storescp, NAIVE: naive}
    with ExitStack() as stack:
        targets = {}
        for number, (name, start) in enumerate(receivers.items()):
            (folder / str(number)).mkdir()
            targets[name] = stack.enter_context(start(folder / str(number)))
        for turn in range(ROUNDS + 1):
            ceiling = syncs_per_s(folder)
            for number, (sender, name) in enumerate(pairs if turn % 2 else pairs[::-1]):
                target, run = targets[name], 100 * (turn + 1) + number
                cpu_s = target.cpu_s()
                rate = send(sender, target, run, series)
                if turn:
                    found.rates[sender, name].append(rate)
                    found.cpu_ms[sender, name].append((target.cpu_s() - cpu_s) * 1000 / INSTANCES)
                empty(target)
            found.syncs_per_s.extend([ceiling] if turn else [])
    return found


def send(sender: str, target: Target, run: int, series: Path) -> float:
    actions: dict[str, Callable[[], float]] = {
        BLAST_1: lambda: blast(target.port, run, 1),
        BLAST_4: lambda: blast(target.port, run, 4),
        STORESCU: lambda: storescu(target.port, series, nagle=False),
        UNTUNED: lambda: storescu(target.port, series, nagle=True),
    }
    return actions[sender]()


def empty(target: Target) -> None:
    for path in target.folder.iterdir() if target.folder else ():
        path.unlink()


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the ratios within each round, with the least and the most."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, {model}; load {load:.1f} before, nice {os.nice(0)}"


def main() -> None:
    """Print the table."""
    for program in ("storescp", "storescu"):
        if shutil.which(program) is None:
            print(f"reception: not measured, {program} is not installed (Debian package dcmtk)")
            return
    print(f"Reception, instances per second: {INSTANCES} MR images of {2 * SIDE * SIDE // 1000} kB, {ROUNDS} rounds")
    print(f"Machine: {machine()}")
    with tempfile.TemporaryDirectory(prefix="rescan-bench-") as folder:
        found = measure(Path(folder))
    print(f"Disk: {statistics.median(found.syncs_per_s):.0f} single appends with fdatasync per second\n")
    print(f"{'sender':<20}{'receiver':<19}{'per s':>6}{'CPU ms each':>13}{'Rescan / it, median (range)':>30}")
    for (sender, receiver), rates in found.rates.items():
        ours = "" if receiver == RESCAN else ratio(found.rates[sender, RESCAN], rates)
        cpu_ms = statistics.median(found.cpu_ms[sender, receiver])
        print(f"{sender:<20}{receiver:<19}{statistics.median(rates):>6.0f}{cpu_ms:>13.2f}{ours:>30}")
    stall = ratio(found.rates[UNTUNED, RESCAN], found.rates[STORESCU, RESCAN])
    print(f"\nRescan, untuned sender / tuned sender: {stall}; 1 means no stall\n")


if __name__ == "__main__":
    serve_naive(int(sys.argv[1]), Path(sys.argv[2]))
