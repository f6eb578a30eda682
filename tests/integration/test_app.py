"""The running daemon: real processes, real sockets, a small student."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from referencing import Registry, Resource

from daemon.watchdog import notify
from tests.pushing import echo, head, push
from tests.serving import QUICK, ROOT, Listener, Serving, patience

SCANNERS = """
[[scanners]]
slug = "mr1"
ae_title = "SCANNER"
address = "127.0.0.1"
[[scanners]]
slug = "mr2"
ae_title = "SHADOW"
address = "127.0.0.1"
alerts = "shadow"
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, strict_student: Path) -> Iterator[Serving]:
    state = tmp_path_factory.mktemp("daemon") / "state"
    with Serving(state, model=strict_student, config=QUICK + SCANNERS) as serving:
        yield serving


def test_it_answers_at_once_and_is_ready_when_checked(daemon: Serving) -> None:
    """C-ECHO, livez and readyz."""
    assert echo(daemon.ports["dicom"], calling="SCANNER") == 0x0000
    assert daemon.get("/livez") == (200, "ok\n")
    assert daemon.get("/readyz") == (200, '{"ready":true,"reasons":[]}')
    assert daemon.get("/")[0] == 200


def test_the_ports_stand_in_the_file_and_in_the_log(daemon: Serving) -> None:
    """Both tell the same, and the state folder is the owner's alone."""
    started = daemon.log.wait(lambda f: f.get("event") == "started")
    for name in ("dicom", "events", "replay", "http"):
        assert int(started[name]) == daemon.ports[name] > 0
    assert stat.S_IMODE((daemon.state / "site.key").stat().st_mode) == 0o600


def test_a_pushed_series_becomes_results_an_alert_pictures_and_metrics(daemon: Serving) -> None:
    """Provisional, then final, both with the same scores; everything shows the same."""
    before = daemon.metrics()
    with Listener(daemon.ports["events"]).connected() as listener:
        assert set(push(daemon.ports["dicom"], head("a"))) == {0x0000}
        final = listener.wait(lambda t, b: t == "v1/score/mr1/" and b["data"]["final"])["data"]
        alert = listener.wait(lambda t, _: t == "v1/alert/mr1/")["data"]
        sequences = [b["sequence"] for t, b in listener.messages if t.startswith("v1/score/")]
    assert final["verdict"] == "RESCAN"
    assert final["scanner"] == "mr1"
    assert final["engine"]["provider"] in {"cpu", "openvino"}
    assert set(final["timing_s"]) == {"receive", "assemble", "prepare", "infer", "score", "last_instance_to_verdict"}
    assert alert["series_ref"] == final["series_ref"]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
    line = daemon.wait_result()
    assert (line["verdict"], line["series_ref"]) == ("RESCAN", final["series_ref"])
    assert daemon.picture(final["id"], "axial.png").startswith(b"\x89PNG")
    names = (
        "rescan_instances_received_total{scanner=mr1,status=stored}",
        "rescan_series_total{outcome=scored,scanner=mr1}",
        "rescan_verdicts_total{rule=t1_head_3d,scanner=mr1,verdict=RESCAN}",
        "rescan_quality_score_count{rule=t1_head_3d,scanner=mr1}",
        "rescan_artefact_score_count{artefact=motion,scanner=mr1}",
        "rescan_last_slice_to_alert_seconds_count{scanner=mr1}",
        "rescan_last_slice_to_verdict_seconds_count{scanner=mr1}",
        "rescan_stage_duration_seconds_count{stage=infer}",
        "rescan_alerts_open{scanner=mr1}",
        "rescan_associations_total{result=released,scanner=mr1}",
        "rescan_receive_bytes_total{scanner=mr1}",
    )

    def still() -> list[str]:
        after = daemon.metrics()
        return [name for name in names if after.get(name, 0) <= before.get(name, 0)]

    daemon.log.until(lambda: not still())


def test_a_shadow_scanner_raises_nothing(daemon: Serving) -> None:
    """Scored and recorded; no alert."""
    with Listener(daemon.ports["events"]).connected() as listener:
        push(daemon.ports["dicom"], head("shadow"), calling="SHADOW")
        final = listener.wait(lambda t, b: t == "v1/score/mr2/" and b["data"]["final"])["data"]
        assert not [t for t, _ in listener.messages if t == "v1/alert/mr2/"]
    assert final["shadow"] is True


def test_a_caller_that_is_not_on_the_list_is_refused(daemon: Serving) -> None:
    """The list names AE title and address; nobody else may send."""
    with pytest.raises(AssertionError, match="refused"):
        push(daemon.ports["dicom"], head("stranger")[:1], calling="STRANGER")


def test_a_series_without_a_rule_cannot_be_judged(daemon: Serving) -> None:
    """A spin echo: refused by the header, without inference."""
    start = len(daemon.log.all)
    push(daemon.ports["dicom"], head("spin", ScanningSequence="SE"))
    line = daemon.wait_result(start=start)
    assert (line["verdict"], line["reasons"]) == ("CANNOT_JUDGE", "no_rule")


def test_a_second_daemon_on_the_same_state_is_refused(daemon: Serving) -> None:
    """One line that says what to do, status 2."""
    command = [sys.executable, "-m", "daemon", "serve", "--state", str(daemon.state), "--http", "127.0.0.1:0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 2
    assert "is in use by another rescan serve" in done.stderr


def test_a_reload_is_all_or_nothing(daemon: Serving) -> None:
    """SIGHUP: a broken file changes nothing, a port asks for a restart, a live setting is taken."""
    assert daemon.process is not None
    text = daemon.config.read_text()
    for content, expected in (
        (text + "\n[dicom]\nprot = 1\n", "reload_refused"),
        (text + "\n[dicom]\nmax_pdu_bytes = 65536\n", "reload_refused"),
        (text + "\n[spool]\nretention_s = 100000.0\n", "reloaded"),
    ):
        daemon.config.write_text(content)
        start = len(daemon.log.all)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.log.wait(lambda f: f.get("event", "").startswith("reload"), start=start)
        assert f"event={expected}" in "\n".join(daemon.log.all[start:])
    assert daemon.get("/readyz")[0] == 200


def test_it_stops_cleanly_on_sigterm(tmp_path: Path, student: Path) -> None:
    """Status 0, no child left, the ports file gone; what was received is judged after the next start."""
    daemon = Serving(tmp_path / "state", model=student).start()
    push(daemon.ports["dicom"], head("later"))
    children = daemon.children()
    assert set(children) == {"receiver", "reader", "scorer"}
    assert daemon.stop() == 0
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children.values())
    assert not (tmp_path / "state" / "ports.json").exists()
    start = len(daemon.log.all)
    with daemon.start():
        assert daemon.wait_result(start=start)["instances"] == str(len(head("later")))


def test_a_missing_model_is_told_and_mended_while_it_runs(tmp_path: Path, student: Path) -> None:
    """The daemon stays up, receives, is not ready and says why; a good file makes it ready."""
    model = tmp_path / "model.onnx"
    with Serving(tmp_path / "state", model=model).start(ready=False) as daemon:
        line = daemon.log.wait(lambda f: f.get("event") == "not_ready")
        assert "model.onnx" in line["reason"]
        daemon.log.wait(lambda f: f.get("event") == "restored")
        status, body = daemon.get("/readyz")
        assert (status, len(json.loads(body)["reasons"])) == (503, 1)
        assert echo(daemon.ports["dicom"]) == 0x0000
        push(daemon.ports["dicom"], head("early"))
        shutil.copy(student, tmp_path / "copy")
        (tmp_path / "copy").rename(model)
        daemon.log.wait(lambda f: f.get("event") == "ready")
        assert daemon.wait_result()["verdict"] != "CANNOT_JUDGE"


def test_a_taken_port_ends_the_start_with_one_line(tmp_path: Path, student: Path) -> None:
    """Each door: status 2, the port is named, no traceback."""
    from daemon.web import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        free = {
            "--dicom": "127.0.0.1:0",
            "--http": "127.0.0.1:0",
            "--events": "tcp://127.0.0.1:0",
            "--replay": "tcp://127.0.0.1:0",
        }
        for flag in ("--dicom", "--http", "--events"):
            value = f"tcp://127.0.0.1:{port}" if flag == "--events" else f"127.0.0.1:{port}"
            arguments = [word for pair in {**free, flag: value}.items() for word in pair]
            command = [sys.executable, "-m", "daemon", "serve", "--state", str(tmp_path / "s"), *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
            assert done.returncode in {1, 2}, done.stderr
            assert f"{port}" in done.stderr
            assert "Traceback" not in done.stderr


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datagrams to NOTIFY_SOCKET."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_results_satisfy_the_published_schema(daemon: Serving) -> None:
    """Every event in the log of this module."""
    folder = ROOT / "daemon" / "schemas"
    if not folder.is_dir():
        pytest.skip("no schemas are in this checkout")
    import sqlite3

    found = sqlite3.connect(f"file:{daemon.state / 'ledger.db'}?mode=ro", uri=True)
    bodies = [json.loads(row[0]) for row in found.execute("SELECT body FROM event WHERE stream = 'score'")]
    found.close()
    schemas = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    registry = Registry().with_resources((each["$id"], Resource.from_contents(each)) for each in schemas.values())
    validator = jsonschema.Draft202012Validator(schemas["score"], registry=registry)
    assert bodies
    for body in bodies:
        validator.validate(body)


def test_it_answers_within_five_seconds_of_its_start(tmp_path: Path, student: Path) -> None:
    """C-ECHO and livez; a machine that is busy with other things gets more time."""
    began = time.monotonic()
    with Serving(tmp_path / "state", model=student).start(ready=False) as daemon:
        assert echo(daemon.ports["dicom"]) == 0x0000
        assert daemon.get("/livez")[0] == 200
        took_s = time.monotonic() - began
    assert took_s < patience(5.0)
