"""Builders of synthetic series: a simple head, and the DICOM that scanners would make of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from daemon.config import Settings
from daemon.dicom_write import Plan, classic_series, enhanced_image, part10
from daemon.header import Header, read_header
from daemon.series import Assembly, stacks_of
from daemon.spool import AssociationEnded, StoredInstance
from daemon.stack import Action, Stack
from daemon.volume import build_volume
from daemon.words import Volume

SMALL_SHAPE = (128, 112, 96)
"""(z, y, x) of a head at 2 mm: inferior to superior, posterior to anterior, left to right."""


def head_phantom(shape: tuple[int, int, int] = SMALL_SHAPE, spacing: float = 2.0) -> NDArray[np.uint16]:
    """A bright ellipsoid of scalp, skull and brain with a neck, (z, y, x) uint16, off centre in every axis."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n / 2 + 0.5) * spacing for n in shape], indexing="ij")
    z = z - 0.06 * shape[0] * spacing
    y = y - 4.0

    def inside(a: float, b: float, c: float) -> NDArray[np.bool_]:
        return (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1.0

    head = np.zeros(shape, dtype=np.float64)
    neck = ((x / 52) ** 2 + ((y + 10) / 58) ** 2 < 1) & (z < -40)
    head[neck] = 380  # below half of the bright tissue: no grey matter to a student that goes by brightness
    head[inside(76, 96, 92) & (z > -80)] = 900  # no scalp between head and neck
    head[inside(71, 91, 87)] = 60
    head[inside(67, 87, 83)] = 560
    head[inside(58, 78, 74)] = 820
    head[inside(14, 26, 18)] = 150
    head[(x > 20) & inside(58, 78, 74)] += 40
    texture = np.random.default_rng(7).normal(0.0, 8.0, shape)
    return np.clip(head + texture + 10, 0, 4095).astype(np.uint16)


def volume_of(volume_zyx: NDArray[Any], spacing: tuple[float, float, float]) -> Volume:
    """A (z, y, x) array with its spacing in the same order as a volume in RAS+, centred on the origin."""
    voxels = np.ascontiguousarray(np.transpose(volume_zyx, (2, 1, 0))).astype(np.float32)
    steps = np.array(spacing[::-1], dtype=np.float64)
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(voxels.shape) - 1) / 2
    return Volume(voxels, affine)


def build_classic_series(
    volume_zyx: NDArray[Any],
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    orientation: str = "sagittal",
    *,
    plan: Plan | None = None,
    affine: NDArray[np.float64] | None = None,
    **overrides: Any,
) -> list[Dataset]:
    """Classic MR slices of a head.

    Args:
        volume_zyx: uint16, inferior to superior, posterior to anterior, left to right.
        spacing: millimetres along z, y, x.
        orientation: sagittal, coronal or axial.
        plan: further choices; its plane and overrides are replaced.
        affine: RAS+ millimetres of the (x, y, z) voxels instead of an upright head.
        **overrides: DICOM keyword -> value or function of the slice's number; `seed` names the series.
    """
    return classic_series(*_volume_and_plan(volume_zyx, spacing, orientation, plan, affine, overrides))


def build_enhanced(
    volume_zyx: NDArray[Any],
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    orientation: str = "sagittal",
    *,
    plan: Plan | None = None,
    affine: NDArray[np.float64] | None = None,
    legacy: bool = False,
    **overrides: Any,
) -> Dataset:
    """One Enhanced MR image of a head; arguments as for `build_classic_series`."""
    return enhanced_image(*_volume_and_plan(volume_zyx, spacing, orientation, plan, affine, overrides), legacy=legacy)


def _volume_and_plan(
    volume_zyx: NDArray[Any],
    spacing: tuple[float, float, float],
    orientation: str,
    plan: Plan | None,
    affine: NDArray[np.float64] | None,
    overrides: dict[str, Any],
) -> tuple[Volume, Plan]:
    base = plan or Plan()
    seed = str(overrides.pop("seed", base.seed))
    volume = volume_of(volume_zyx, spacing)
    if affine is not None:
        volume = Volume(volume.voxels, affine)
    fields = {name: getattr(base, name) for name in Plan.__dataclass_fields__}
    changed = {"seed": seed, "plane": orientation, "overrides": {**base.overrides, **overrides}}
    return volume, Plan(**{**fields, **changed})


def every(datasets: Iterable[Dataset], **values: Any) -> list[Dataset]:
    """The same datasets, each with these attributes set (None removes one)."""
    changed = list(datasets)
    for ds in changed:
        for keyword, value in values.items():
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)
    return changed


# --- Feeding an assembly without a network, a spool or a clock ---------------------------------------------------------


def little_stack(slices: int = 12, side: int = 8, **overrides: Any) -> list[Dataset]:
    """A few small sagittal slices, 2.5 mm apart: enough for a geometry, cheap to make."""
    rng = np.random.default_rng(3)
    volume = rng.integers(1, 2000, (side, side, slices)).astype(np.uint16)
    return build_classic_series(volume, (2.5, 2.5, 2.5), **overrides)


def instance_of(
    ds: Dataset, *, position: int = 1, association: int = 1, at: float = 0.0, scanner: str = "mr1"
) -> tuple[StoredInstance, Header]:
    """What the spool and the reader would make of an image."""
    data = part10(ds)
    stored = StoredInstance(
        position=position,
        segment=0,
        offset=0,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
        scanner=scanner,
        association=association,
        received_at=at,
    )
    return stored, read_header(data)


class Feed:
    """An assembly with a clock that the test turns."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.assembly = Assembly(settings or Settings())
        self.now = 1000.0
        self.actions: list[Action] = []
        self.data: dict[str, bytes] = {}
        self._position = 0

    def send(
        self, datasets: Iterable[Dataset], *, association: int = 1, every_s: float = 0.01, scanner: str = "mr1"
    ) -> Feed:
        """Images arrive one after the other."""
        for ds in datasets:
            self.wait(every_s)
            self._position += 1
            stored, header = instance_of(
                ds, position=self._position, association=association, at=self.now, scanner=scanner
            )
            self.data[stored.sha256] = part10(ds)
            self.actions += self.assembly.on_instance(stored, header, self.now)
        return self

    def end(self, association: int = 1, *, released: bool = True) -> Feed:
        """The association ends."""
        self._position += 1
        ended = AssociationEnded(self._position, association, "mr1", self.now, released)
        self.actions += self.assembly.on_association_ended(ended, self.now)
        return self

    def wait(self, seconds: float) -> Feed:
        """Time passes; deadlines on the way are met when they come."""
        until = self.now + seconds
        while (due := self.assembly.next_deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.actions += self.assembly.on_time(self.now)
        self.now = until
        return self

    def take(self) -> list[Action]:
        """The actions since the last call."""
        actions, self.actions = self.actions, []
        return actions

    def volume(self, action: Action) -> Volume:
        """Decode the stack of an action."""
        return build_volume(action.stack, lambda stored: self.data[stored.sha256])


def stacks_in(datasets: Iterable[Dataset]) -> list[Stack]:
    """The stacks in some images, as in a folder."""
    return stacks_of(instance_of(ds, position=n) for n, ds in enumerate(datasets, 1))


def build(stack: Stack, datasets: Iterable[Dataset]) -> Volume:
    """Decode a stack of some images."""
    data = {instance_of(ds)[0].sha256: part10(ds) for ds in datasets}
    return build_volume(stack, lambda stored: data[stored.sha256])
