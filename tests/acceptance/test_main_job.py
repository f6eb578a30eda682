"""The main job: a scanner pushes a series, a subscriber receives a verdict. Real senders, real student, real sockets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pynetdicom.sop_class import MRImageStorage

from daemon.config import SHIPPED_MODEL
from tests.pushing import associate
from tests.serving import Listener, Serving, storescu

pytestmark = [
    pytest.mark.skipif(
        shutil.which("storescu") is None, reason="DCMTK's storescu is not installed (Debian package dcmtk)"
    ),
    pytest.mark.skipif(
        not SHIPPED_MODEL.is_file(), reason="no student is in this checkout (daemon/models/student.onnx)"
    ),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("daemon") / "state") as serving:
        yield serving


def philips(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "dicom" / "philips_mprage").glob("*.dcm"))


def by_position(files: list[Path]) -> list[Path]:
    return sorted(files, key=lambda f: float(dcmread(f, stop_before_pixels=True).ImagePositionPatient[0]))


def with_new_uids(files: list[Path], folder: Path, suffix: str) -> Path:
    """Copies under a series of their own."""
    folder.mkdir()
    for number, file in enumerate(files):
        ds = dcmread(file)
        ds.SeriesInstanceUID = f"{ds.SeriesInstanceUID[:50]}.{suffix}"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{suffix}.{number}"
        ds.save_as(folder / f"{number:04d}.dcm")
    return folder


def test_a_pushed_head_ends_in_a_final_pass_at_a_plain_subscriber(daemon: Serving, shared_data: Path) -> None:
    """DCMTK pushes a real MPRAGE; pyzmq receives PASS; the metrics moved."""
    before = daemon.metrics()
    with Listener(daemon.ports["events"]).connected() as listener:
        assert storescu(shared_data / "dicom" / "philips_mprage", daemon.ports["dicom"]).returncode == 0
        event = listener.wait(lambda topic, body: topic.startswith("v1/score/") and body["data"]["final"])
    result = event["data"]
    assert (result["verdict"], result["revision"], result["evidence"]["instances"]) == ("PASS", 1, 170)
    assert (
        result["scores"]["predicted_dice_low"]
        <= result["scores"]["predicted_dice"]
        <= result["scores"]["predicted_dice_high"]
    )
    assert result["scanner"] == "unknown"
    after = daemon.metrics()
    for name in (
        "rescan_instances_received_total{scanner=unknown,status=stored}",
        "rescan_series_total{outcome=scored,scanner=unknown}",
        "rescan_stage_duration_seconds_count{stage=infer}",
        "rescan_last_slice_to_verdict_seconds_count{scanner=unknown}",
    ):
        assert after.get(name, 0) > before.get(name, 0), name


@pytest.mark.parametrize("name", ["ge_mprage_grid_phantom", "philips_1901"])
def test_what_is_no_head_cannot_be_judged(daemon: Serving, shared_data: Path, name: str) -> None:
    """A phantom with a head's header, and an ASL series: CANNOT_JUDGE with a reason code, never an alert."""
    with Listener(daemon.ports["events"]).connected() as listener:
        storescu(shared_data / "dicom" / name, daemon.ports["dicom"])
        event = listener.wait(lambda topic, body: topic.startswith("v1/score/") and body["data"]["final"])
        assert event["data"]["verdict"] == "CANNOT_JUDGE"
        assert event["data"]["reasons"][0]["code"]
        assert not [topic for topic, _ in listener.messages if topic.startswith("v1/alert/")]


@pytest.mark.parametrize("share", [0.6, 0.77])
def test_a_head_that_is_cut_off_never_passes(daemon: Serving, shared_data: Path, tmp_path: Path, share: float) -> None:
    """60 and 77 % of the slices, released cleanly, no count announced: no result, provisional or final, is PASS."""
    files = by_position(philips(shared_data))
    folder = with_new_uids(files[: int(share * len(files))], tmp_path / "cut", f"60.{round(100 * share)}")
    with Listener(daemon.ports["events"]).connected() as listener:
        assert storescu(folder, daemon.ports["dicom"]).returncode == 0
        listener.wait(lambda topic, body: topic.startswith("v1/score/") and body["data"]["final"])
        verdicts = [r["verdict"] for r in listener.scores()]
    assert verdicts
    assert "PASS" not in verdicts


def test_one_association_per_image_gives_one_final_verdict(daemon: Serving, shared_data: Path, tmp_path: Path) -> None:
    """Some senders open an association for every image: one final result, at most one provisional."""
    folder = with_new_uids(philips(shared_data), tmp_path / "single", "61")
    with Listener(daemon.ports["events"]).connected() as listener:
        for file in sorted(folder.iterdir()):
            association = associate(daemon.ports["dicom"], [MRImageStorage], calling="SINGLES")
            assert association.send_c_store(str(file)).Status == 0x0000
            association.release()
        listener.wait(lambda topic, body: topic.startswith("v1/score/") and body["data"]["final"])
        finals, provisionals = listener.scores(final=True), listener.scores(final=False)
    assert len(finals) == 1
    assert len(provisionals) <= 1
    assert finals[0]["evidence"]["instances"] == 170
