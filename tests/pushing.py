"""Small heads and a sender, for tests that push."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts

from daemon.send import keep_answers
from tests.builders import build_classic_series, head_phantom
from tests.serving import patience


def head(seed: str = "head", **overrides: object) -> list[Dataset]:
    """A classic sagittal series of a made-up head at 2 mm, with UIDs of its own for each seed."""
    return build_classic_series(head_phantom(), seed=seed, **overrides)


def push(port: int, datasets: Iterable[Dataset], *, calling: str = "SCANNER", release: bool = True) -> list[int]:
    """Send on one association; the statuses."""
    datasets = list(datasets)
    classes = {ds.SOPClassUID for ds in datasets}
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = patience(60)
    ae.requested_contexts = [c for c in AllStoragePresentationContexts if c.abstract_syntax in classes]
    association = ae.associate("127.0.0.1", port, ae_title="RESCAN")
    assert association.is_established, "the association was refused"
    keep_answers(association)
    statuses = [association.send_c_store(ds).Status for ds in datasets]
    if release:
        association.release()
    else:
        association.abort()
    return statuses


def echo(port: int) -> int:
    """The status of a C-ECHO."""
    ae = AE("ECHO")
    ae.acse_timeout = ae.dimse_timeout = patience(30)
    ae.add_requested_context("1.2.840.10008.1.1")
    association = ae.associate("127.0.0.1", port, ae_title="RESCAN")
    assert association.is_established
    status = int(association.send_c_echo().Status)
    association.release()
    return status
