"""The daemon opens no connection to anywhere: shown in a network namespace that counts every attempt."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pushing import head
from tests.serving import ROOT, Serving, patience

SETUP = 'ip link set lo up && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
"""A world with loopback alone and a name server outside it: whatever is tried towards the outside finds no route."""

COUNT = "from tests.acceptance.test_no_network import attempts; print(attempts())"


def attempts() -> int:
    """Attempts to send to somewhere without a route, in the network namespace of this process."""
    heads, values = (line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines()[:2])
    six = dict(line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines())
    return int(values[heads.index("OutNoRoutes")]) + int(six.get("Ip6OutNoRoutes", 0))


def world(tmp_path: Path) -> tuple[str, ...]:
    """The words before a command that put it into that world; skips where that is not permitted."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 192.0.2.1\n")
    prefix = ("unshare", "-n", "-m", "sh", "-c", SETUP, "sh", str(resolver))
    if not all(shutil.which(name) for name in ("unshare", "ip", "nsenter", "mount")):
        pytest.skip("unshare, nsenter, ip or mount is not installed")
    done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces are not permitted here ({done.stderr.strip()[:80]})")
    return prefix


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_attempt_is_counted(tmp_path: Path) -> None:
    """A connection and a name look-up towards the outside both show."""
    code = (
        "import socket\n"
        "from tests.acceptance.test_no_network import attempts\n"
        "print(attempts())\n"
        "for call in (lambda: socket.create_connection(('192.0.2.9', 80)), lambda: socket.gethostbyname('example.org')):\n"
        "    try: call()\n"
        "    except OSError: print(attempts())\n"
    )
    counts = [int(word) for word in run(*world(tmp_path), sys.executable, "-c", code).split()]
    assert counts[0] == 0 < counts[1] < counts[2]


@pytest.mark.slow
def test_nothing_is_tried_towards_the_outside_while_a_series_is_judged(tmp_path: Path, student: Path) -> None:
    """Start, model check, reception, scoring, page and stop: not one attempt towards the outside."""
    folder = tmp_path / "series"
    folder.mkdir()
    for number, ds in enumerate(head("quiet")):
        ds.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)
    daemon = Serving(tmp_path / "state", model=student)
    daemon.prefix = world(tmp_path)
    with daemon.start():
        assert daemon.process is not None
        inside = ("nsenter", "-t", str(daemon.process.pid), "-n")
        push = "from pathlib import Path; from pydicom import dcmread; from tests.pushing import push; import sys\n"
        push += "print(push(int(sys.argv[1]), [dcmread(f) for f in sorted(Path(sys.argv[2]).iterdir())]))"
        assert "0" in run(*inside, sys.executable, "-c", push, str(daemon.ports["dicom"]), str(folder))
        assert daemon.wait_result()["verdict"]
        assert run(*inside, sys.executable, "-c", COUNT) == "0"
