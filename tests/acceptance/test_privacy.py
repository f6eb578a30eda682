"""A canary patient goes through success and failure, and appears in nothing that leaves the spool."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from tests.builders import build_classic_series, head_phantom
from tests.pushing import push
from tests.serving import Listener, Serving

NAME = "ZZZ^CANARY"
WORDS = ("CANARY", "ZZZ", "CNRY-ID-4711", "CNRYSTUDY", "CNRYDESC", "CNRYINST", "19010203")
UID_ROOT = "1.2.826.0.1.77777777"


def mark(datasets: list[Dataset], series: int) -> list[Dataset]:
    """Write the canary into every place where a patient can stand."""
    for number, ds in enumerate(datasets):
        ds.PatientName, ds.PatientID, ds.PatientBirthDate = NAME, "CNRY-ID-4711", "19010203"
        ds.AccessionNumber, ds.StudyID, ds.InstitutionName = "CNRYSTUDY", "CNRYSTUDY", "CNRYINST"
        ds.SeriesDescription = ds.ProtocolName = "CNRYDESC"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{UID_ROOT}.1", f"{UID_ROOT}.1.{series}"
        ds.FrameOfReferenceUID = f"{UID_ROOT}.2"
        ds.SOPInstanceUID = f"{UID_ROOT}.1.{series}.{number}"
        if hasattr(ds, "file_meta"):
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return datasets


def series(number: int) -> list[Dataset]:
    return mark(build_classic_series(head_phantom()), number)


PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
"""What a picture is made of; none of these can hold text (W3C PNG, 11.3)."""


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and data of every chunk of a PNG, read with nothing but the standard's layout."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at = 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def page_of(daemon: Serving, results: list[dict[str, Any]]) -> dict[str, bytes]:
    """Everything the page shows of some results: documents, what its script fetches, and every picture, packed and unpacked."""
    paths = ["/", "/physicist", "/api/state", "/api/history", "/api/trends"]
    paths += [f"/api/results/{result['id']}" for result in results]
    found = {}
    for path in paths:
        status, found[path] = daemon.get_bytes(path)
        assert status == 200, path
    for result in results:
        if "pictures" not in result:
            continue
        daemon.picture(result["id"], "axial.png")
        manifest = json.loads(daemon.get(f"/api/results/{result['id']}")[1])["pictures"]
        names = [f"{p['plane']}{layer}.png" for p in manifest["planes"] for layer in ("", "-total", "-outline")]
        for name in names:
            png = daemon.picture(result["id"], name)
            inside = list(chunks(png))
            assert {kind for kind, _ in inside} <= PNG_CHUNKS, name
            found[f"{result['id']}/{name}"] = png
            found[f"{result['id']}/{name} unpacked"] = zlib.decompress(b"".join(d for k, d in inside if k == b"IDAT"))
    return found


@pytest.mark.slow
def test_a_patient_appears_in_no_log_metric_event_picture_page_or_file_name(tmp_path: Path, student: Path) -> None:
    """A good series, a short one, a broken header, broken pixels and a conflict: grep everything that came out."""
    good, short, broken, pixels = series(1), series(2)[:4], series(3), series(4)
    for ds in broken:
        ds.ImagePositionPatient = None
        ds.add_new(0x00280030, "DS", ["1", "1"])
    for ds in pixels:
        ds.PixelData = ds.PixelData[:100]
    conflict = series(1)[:1]
    conflict[0].PatientComments = NAME
    with Serving(tmp_path / "state", model=student) as daemon:
        with Listener(daemon.ports["events"]).connected() as listener:
            for part in (good, short, broken, pixels, conflict):
                assert set(push(daemon.ports["dicom"], part, calling="ZZZCANARY")) == {0x0000}
            listener.wait(lambda _t, _b: len({r["series_ref"] for r in listener.scores(final=True)}) == 4)
            events = b"\n".join(listener.raw)
            page = page_of(daemon, listener.scores(final=True))
        metrics = daemon.get_bytes("/metrics")[1] + daemon.get_bytes("/readyz")[1]
        names = "\n".join(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")).encode()
        folders = {str(p): p.read_bytes() for p in (tmp_path / "state" / "pictures").rglob("*") if p.is_file()}
        ledger = b"".join(path.read_bytes() for path in (tmp_path / "state").glob("ledger*"))
    log = "\n".join(daemon.log.all).encode()
    output = {"log": log, "metrics": metrics, "events": events, "names": names, "ledger": ledger, **page, **folders}
    assert [where for where in page if where.endswith("axial.png")], "no picture was looked at"
    for where, data in output.items():
        assert data, where
        for word in (*WORDS, UID_ROOT):
            # Three letters may stand in compressed bytes by chance; whole words do not.
            if word != "ZZZ" or not where.endswith(".png"):
                assert word.encode() not in data, f"{word} in {where}"
