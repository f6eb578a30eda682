"""Small heads and a sender, for tests that push."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, DEFAULT_TRANSFER_SYNTAXES
from pynetdicom.association import Association
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from daemon.send import keep_answers
from tests.builders import build_classic_series, head_phantom
from tests.serving import patience


def head(seed: str = "head", **overrides: object) -> list[Dataset]:
    """A classic sagittal series of a made-up head at 2 mm, with UIDs of its own for each seed."""
    return build_classic_series(head_phantom(), seed=seed, **overrides)


def associate(
    port: int,
    classes: Iterable[str],
    *,
    calling: str = "SCANNER",
    limit_s: float = 60.0,
    syntaxes: list[UID] | None = None,
) -> Association:
    """An association that loses no answer on a busy machine; every test that calls with pynetdicom uses it.

    Args:
        port: of the receiver, on loopback.
        classes: SOP classes to propose.
        calling: AE title of the caller.
        limit_s: longest wait for an answer on an idle machine.
        syntaxes: to propose for each class; None for pynetdicom's own.

    Returns:
        The association; look at `is_established` before using it.
    """
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = patience(limit_s)
    ae.requested_contexts = [build_context(c, syntaxes or DEFAULT_TRANSFER_SYNTAXES) for c in sorted(set(classes))]
    association = ae.associate("127.0.0.1", port, ae_title="RESCAN")
    if association.is_established:
        keep_answers(association)
    return association


def push(port: int, datasets: Iterable[Dataset], *, calling: str = "SCANNER", release: bool = True) -> list[int]:
    """Send on one association; the statuses."""
    datasets = list(datasets)
    association = associate(port, (ds.SOPClassUID for ds in datasets), calling=calling)
    assert association.is_established, "the association was refused"
    statuses = [association.send_c_store(ds).Status for ds in datasets]
    if release:
        association.release()
    else:
        association.abort()
    return statuses


def echo(port: int, *, calling: str = "ECHO") -> int:
    """The status of a C-ECHO."""
    association = associate(port, [Verification], calling=calling, limit_s=30)
    assert association.is_established
    status = int(association.send_c_echo().Status)
    association.release()
    return status
