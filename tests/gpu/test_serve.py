"""`rescan serve --engine cuda`: the GPU is named where it ran, and nothing else runs where it cannot."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from daemon.config import SHIPPED_MODEL
from daemon.scorer import has_gpu
from tests.pushing import head, push
from tests.serving import Listener, Serving

CUDA = ("--engine", "cuda")

pytestmark = pytest.mark.skipif(
    not SHIPPED_MODEL.is_file(), reason="no student is in this checkout (daemon/models/student.onnx)"
)


def cuda_libraries() -> Path | None:
    """The folder of the CUDA libraries that come with onnxruntime-gpu; None where they are not installed."""
    found = find_spec("nvidia")
    places = list(found.submodule_search_locations or []) if found is not None else []
    return Path(places[0]) if places else None


@pytest.mark.gpu
def test_a_push_is_judged_on_the_gpu(tmp_path: Path) -> None:
    """The event, the log line and the metric say cuda."""
    if not has_gpu() or cuda_libraries() is None:
        pytest.skip("no NVIDIA GPU with onnxruntime-gpu here")
    with Serving(tmp_path / "state", arguments=CUDA) as daemon, Listener(daemon.ports["events"]).connected() as heard:
        push(daemon.ports["dicom"], head("gpu"))
        event = heard.wait(lambda topic, body: topic.startswith("v1/score/") and body["data"]["final"])
        assert event["data"]["engine"]["provider"] == "cuda"
        assert daemon.wait_result()["engine"] == "cuda"
        assert any(name.startswith("rescan_build_info") and "provider=cuda" in name for name in daemon.metrics())


def test_without_the_library_it_is_not_ready_and_nothing_else_runs(tmp_path: Path) -> None:
    """Alive, not ready for a reason that names CUDA, receiving, and no verdict from another engine."""
    daemon = Serving(tmp_path / "state", arguments=CUDA)
    if (libraries := cuda_libraries()) is not None:
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("hiding the CUDA libraries from one process needs root and unshare")
        hide = f'mount -t tmpfs none {libraries} && exec "$@"'
        daemon.prefix = ("unshare", "--mount", "sh", "-c", hide, "sh")
    with daemon.start(ready=False):
        reason = daemon.log.wait(lambda f: f.get("event") == "not_ready")["reason"]
        assert "cuda" in reason.lower()
        daemon.log.wait(lambda f: f.get("event") == "restored")
        assert set(push(daemon.ports["dicom"], head("hidden"))) == {0x0000}
        status, body = daemon.get("/readyz")
        assert status == 503
        assert "cuda" in " ".join(json.loads(body)["reasons"]).lower()
        assert daemon.get("/livez")[0] == 200
        with pytest.raises(TimeoutError):
            daemon.wait_result(final=False, limit_s=6.0)  # a verdict of another engine would come after 2 s of quiet
        running = [name for name in daemon.metrics() if name.startswith("rescan_build_info")]
        assert not any(f"provider={other}" in name for name in running for other in ("cpu", "openvino"))
