"""The result object: the one shape of a verdict in events, in `rescan score --json`, in the ledger and on the page.

Keys stand in `INTERFACES` of the documentation. What is unknown is absent from `scores`, `artefacts` and `timing_s`; it is
never NaN or -1.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon import NOTICE
from daemon.words import ARTEFACTS, Reason, Verdict

SCORES = (
    "predicted_dice",
    "predicted_dice_low",
    "predicted_dice_high",
    "artefact_uncertainty",
    "artefact_uncertainty_gm",
    "task_uncertainty",
    "gm_volume_ml",
    "gm_volume_error_ml",
    "snr",
    "cnr",
)
"""The keys that every reader may rely on, each absent when unknown; a score may add more."""

TIMINGS = ("receive", "assemble", "prepare", "infer", "score", "last_instance_to_verdict")

_KEY_BYTES = 32
_REF_LENGTH = 32


@dataclass(frozen=True)
class Identity:
    """Which stack a result is about, without telling who.

    Attributes:
        series_ref: keyed hash of the SeriesInstanceUID; the same at one site, whatever is asked about it.
        stack_ref: keyed hash of the stack, for series that hold several.
        exam_ref: keyed hash of the StudyInstanceUID.
        scanner: configured slug, else "unknown".
    """

    series_ref: str
    stack_ref: str
    exam_ref: str
    scanner: str


class SiteKey:
    """The secret of a site that turns a UID into a reference."""

    def __init__(self, key: bytes) -> None:
        """Hold the key; `load` reads or makes one."""
        if len(key) != _KEY_BYTES:
            raise ValueError(
                f"site key: expected {_KEY_BYTES} bytes, got {len(key)}; remove site.key to make a new one"
            )
        self._key = key

    @classmethod
    def load(cls, state: Path) -> SiteKey:
        """Read STATE/site.key, or make it readable by its owner alone.

        Raises:
            ValueError: the file holds something else.
            OSError: it can be neither read nor made.
        """
        path, fresh = state / "site.key", state / f".site.key.{os.getpid()}"
        if not path.exists():
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_bytes(_KEY_BYTES).hex() + "\n")
                file.flush()
                os.fsync(descriptor)
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        try:
            return cls(bytes.fromhex(path.read_text(encoding="ascii").strip()))
        except ValueError:
            raise ValueError(f"{path}: expected {_KEY_BYTES} bytes in hexadecimal; restore it from a backup") from None

    def ref(self, text: str) -> str:
        """HMAC-SHA256 of a UID: 32 hexadecimal digits."""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:_REF_LENGTH]

    def identity(self, series_uid: str, study_uid: str, stack_key: str, scanner: str) -> Identity:
        """The references of one stack."""
        return Identity(self.ref(series_uid), self.ref(f"stack {stack_key}"), self.ref(study_uid), scanner)


@dataclass(frozen=True)
class Said:
    """What the judge, or a refusal, says of a stack."""

    verdict: Verdict
    reasons: tuple[Reason, ...]
    advice: tuple[Reason, ...] = ()
    dominant_artefact: str | None = None
    required_dice: float | None = None


def result_id(identity: Identity, revision: int, final: bool, content: str) -> str:
    """The id of a result: the same stack, revision, state and content give the same id, so that a repeat is recognised."""
    text = f"{identity.stack_ref} {revision} {'final' if final else 'provisional'} {content}"
    return hashlib.sha256(text.encode()).hexdigest()[:_REF_LENGTH]


def build_result(
    identity: Identity,
    said: Said,
    *,
    result_id: str,
    final: bool,
    revision: int,
    supersedes: str | None,
    shadow: bool,
    evidence: Mapping[str, Any],
    model: Mapping[str, Any],
    engine: Mapping[str, Any],
    policy: Mapping[str, Any],
    scores: Mapping[str, float | None] | None = None,
    artefacts: Mapping[str, Mapping[str, float | None]] | None = None,
    timing_s: Mapping[str, float | None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """THE result object.

    Args:
        identity: of the stack.
        said: verdict, reasons, advice.
        result_id: from the function of that name.
        final: False while provisional.
        revision: 1, 2, ...
        supersedes: id of the result that this one replaces.
        shadow: scored, and no alert raised.
        evidence: completeness, instances, expected, rule.
        model: name, version, sha256; empty where none was loaded.
        engine: provider, precision, device; empty where none was loaded.
        policy: rule, calibration.
        scores: numbers; None and what is not finite are left out.
        artefacts: per artefact score and uncertainty.
        timing_s: seconds per stage.
        extra: further keys, such as the worst slices; they may not replace one of the above.

    Returns:
        A dictionary of plain JSON values.
    """
    body: dict[str, Any] = {
        "id": result_id,
        "verdict": str(said.verdict),
        "final": final,
        "revision": revision,
        "supersedes": supersedes,
        "series_ref": identity.series_ref,
        "stack_ref": identity.stack_ref,
        "exam_ref": identity.exam_ref,
        "scanner": identity.scanner,
        "shadow": shadow,
        "reasons": _told(said.reasons),
        "advice": _told(said.advice),
        "dominant_artefact": said.dominant_artefact,
        "scores": _known(scores or {}),
        "artefacts": {name: _known(artefacts[name]) for name in ARTEFACTS if name in artefacts} if artefacts else {},
        "evidence": dict(evidence),
        "model": dict(model),
        "engine": dict(engine),
        "policy": dict(policy),
        "timing_s": _known(timing_s or {}),
        "notice": NOTICE,
    }
    if said.required_dice is not None:
        body["required_dice"] = said.required_dice
    return body | {name: value for name, value in (extra or {}).items() if name not in body}


def _told(reasons: Sequence[Reason]) -> list[dict[str, str]]:
    return [{"code": reason.code, "text": reason.text} for reason in reasons]


def _known(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """Only what is known and finite, rounded to six significant digits."""
    return {
        name: float(f"{value:.6g}") for name, value in numbers.items() if value is not None and math.isfinite(value)
    }
