"""A canary patient goes through success and failure, and appears in nothing that leaves the spool."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts
from pynetdicom.sop_class import MRImageStorage

from tests.builders import build_classic_series, head_phantom
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


def push(port: int, datasets: list[Dataset]) -> list[int]:
    ae = AE("ZZZCANARY")
    ae.requested_contexts = [c for c in AllStoragePresentationContexts if c.abstract_syntax == MRImageStorage]
    association = ae.associate("127.0.0.1", port, ae_title="RESCAN")
    assert association.is_established
    statuses = [association.send_c_store(ds).Status for ds in datasets]
    association.release()
    return statuses


def series(number: int) -> list[Dataset]:
    return mark(build_classic_series(head_phantom()), number)


@pytest.mark.slow
def test_a_patient_appears_in_no_log_metric_event_or_file_name(tmp_path: Path, student: Path) -> None:
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
                assert set(push(daemon.ports["dicom"], part)) == {0x0000}
            listener.wait(lambda _t, _b: len({r["series_ref"] for r in listener.scores(final=True)}) == 4)
            events = b"\n".join(listener.raw).decode()
        metrics = daemon.get("/metrics")[1] + daemon.get("/readyz")[1]
        names = "\n".join(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        ledger = b"".join(path.read_bytes() for path in (tmp_path / "state").glob("ledger*"))
    output = {"log": "\n".join(daemon.log.all), "metrics": metrics, "events": events, "names": names}
    for where, text in output.items():
        assert text, where
        for word in (*WORDS, UID_ROOT):
            assert word not in text, f"{word} in {where}"
    for word in (*WORDS, UID_ROOT):
        assert word.encode() not in ledger, f"{word} in the ledger"
