"""DICOM over TLS: the shipped stunnel configuration before a real daemon, with a caller that says nothing."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.association import Association

from daemon.send import keep_answers
from tests.conftest import ROOT
from tests.deploy.watching import until
from tests.pushing import head
from tests.serving import QUICK, Serving, patience

CONFIG = ROOT / "deploy" / "stunnel" / "rescan.conf"
SILENT = 12


def openssl(*arguments: str | Path, cwd: Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], cwd=cwd, check=True, capture_output=True, timeout=patience(60))


def authority(folder: Path, name: str) -> None:
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", cwd=folder)


def certificate(folder: Path, name: str, by: str) -> None:
    """A key and a certificate for localhost, signed by an authority."""
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}")
    openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=folder)
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    sign = ("x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.crt", "-CAkey", f"{by}.key", "-CAcreateserial")
    openssl(*sign, "-days", "2", "-extfile", "names", "-out", f"{name}.crt", cwd=folder)


@dataclass(frozen=True)
class Front:
    """A daemon behind stunnel, and the folder with keys."""

    daemon: Serving
    port: int
    keys: Path

    def context(self, name: str | None) -> ssl.SSLContext:
        """What a scanner with this certificate, or with none, brings."""
        context = ssl.create_default_context(cafile=str(self.keys / "hospital.crt"))
        if name is not None:
            context.load_cert_chain(self.keys / f"{name}.crt", self.keys / f"{name}.key")
        return context

    def associate(self, name: str | None) -> Association:
        ae = AE("SCANNER")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = patience(30)
        ae.add_requested_context(head("tls")[0].SOPClassUID, "1.2.840.10008.1.2.1")
        return ae.associate("127.0.0.1", self.port, ae_title="RESCAN", tls_args=(self.context(name), "localhost"))


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Iterator[Front]:
    """The configuration as it ships; only paths, ports and the user are this machine's."""
    if shutil.which("stunnel4") is None or shutil.which("openssl") is None:
        pytest.skip("stunnel4 or openssl is not installed (Debian packages stunnel4, openssl)")
    keys = tmp_path_factory.mktemp("tls")
    for name in ("hospital", "stranger"):
        authority(keys, name)
    for name, by in (("rescan", "hospital"), ("scanner", "hospital"), ("intruder", "stranger")):
        certificate(keys, name, by)
    shutil.copy(keys / "hospital.crt", keys / "scanners-ca.crt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with Serving(tmp_path_factory.mktemp("tls-daemon") / "state", model=student, config=QUICK) as daemon:
        text = CONFIG.read_text(encoding="utf-8").replace("/etc/stunnel/", f"{keys}/")
        for old, new in (
            (r"^accept = .*$", f"accept = 127.0.0.1:{port}"),
            (r"^connect = .*$", f"connect = 127.0.0.1:{daemon.ports['dicom']}"),
            (r"^set[ug]id = .*$", ""),
        ):
            text, count = re.subn(old, new, text, flags=re.MULTILINE)
            assert count
        (keys / "rescan.conf").write_text(text, encoding="utf-8")
        with (keys / "log").open("w") as log:
            process = subprocess.Popen(["stunnel4", str(keys / "rescan.conf")], stdout=log, stderr=log)
            try:
                until(lambda: listening(port), (keys / "log").read_text)
                yield Front(daemon, port, keys)
            finally:
                process.terminate()
                process.wait(20)


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def silent(front: Front) -> Iterator[Callable[[], list[socket.socket]]]:
    """Callers that connect and say nothing."""
    opened: list[socket.socket] = []

    def connect() -> list[socket.socket]:
        opened.extend(socket.create_connection(("127.0.0.1", front.port), timeout=patience(10)) for _ in range(SILENT))
        return opened

    yield connect
    for each in opened:
        each.close()


def test_a_push_passes_beside_callers_that_say_nothing(front: Front, silent: Callable[[], list[socket.socket]]) -> None:
    """Twelve silent callers stand in the door; a scanner with a certificate sends a whole series past them, to a verdict."""
    silent()
    series = head("tls")
    association = front.associate("scanner")
    assert association.is_established
    keep_answers(association)
    assert {association.send_c_store(ds).Status for ds in series} == {0x0000}
    association.release()
    assert front.daemon.wait_result()["instances"] == str(len(series))


def speak(front: Front, context: ssl.SSLContext) -> None:
    """Shake hands and say something; the front's refusal of a certificate is heard with the first answer alone."""
    with (
        socket.create_connection(("127.0.0.1", front.port), timeout=patience(10)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        encrypted.sendall(b"\1\0")
        if not encrypted.recv(1):
            raise ConnectionError("closed")


@pytest.mark.parametrize("name", [None, "intruder"])
def test_without_a_certificate_of_the_hospital_nobody_gets_in(front: Front, name: str | None) -> None:
    """Neither none nor one that another authority signed: stunnel ends the connection, and Rescan never hears of it."""
    context = front.context(name)
    with pytest.raises(OSError):
        speak(front, context)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused(front: Front) -> None:
    """TLS 1.1 is not spoken, though the caller would."""
    context = front.context("scanner")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"(?i)version"):
        speak(front, context)
