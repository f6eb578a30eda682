"""The words of the house: plain data that flow from one part to the next.

Everything here is immutable and free of sockets, disks, clocks and engines, so every part can be tested alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

ARTEFACTS = ("noise", "spike", "blur", "wrap", "motion")
"""The k-space artefacts, in this order everywhere: channels, tables, metrics."""

MAX_SPACING_MM = 2.6
"""Longest admitted edge of a voxel: what a rule admits unless a site says less. No rule can admit more."""


class Verdict(StrEnum):
    """What Rescan says of one stack."""

    PASS = "PASS"  # noqa: S105 - a verdict, no password
    REVIEW = "REVIEW"
    RESCAN = "RESCAN"
    CANNOT_JUDGE = "CANNOT_JUDGE"


@dataclass(frozen=True)
class Reason:
    """One machine-readable code with its plain sentence (no patient data, no UIDs)."""

    code: str
    text: str


class Refusal(Exception):
    """A stack that cannot be judged: becomes `CANNOT_JUDGE` with this reason, never an alert.

    Codes and their default sentences stand in `daemon/reasons.py`, once.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.reason = Reason(code, text)


@dataclass(frozen=True)
class Volume:
    """A volume in patient space.

    Attributes:
        voxels: (I, J, K) float32, finite, in the stored order; magnitude intensities after rescale.
        affine: (4, 4) float64, voxel index (i, j, k, 1) to millimetres in RAS+ (NIfTI) world axes. Not LPS.
        provenance: facts worth keeping with the result (never identifying): manufacturer, field strength, ...
    """

    voxels: Array
    affine: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Maps:
    """What the student returns, on the prepared grid.

    Attributes:
        gm_probability: (D, H, W) float32 in [0, 1], temperature-scaled by the card.
        task_variance: (D, H, W) float32, sigma_t^2, >= 0.
        artefact_variance: (5, D, H, W) float32, sigma_i^2 in the order of `ARTEFACTS`, >= 0.
    """

    gm_probability: Array
    task_variance: Array
    artefact_variance: Array
