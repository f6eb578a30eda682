"""Real heads: read where they lie, with the automatic labels that came with them turned into grey and white matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.words import Volume
from training.anatomy import GREY_IDS, WHITE_IDS
from training.evaluation.plan import CLEAN_STEP, Anatomy, Job, Step, independent_steps

MUSE_GREY = (23, 30, 31, 32, 36, 37, 38, 39, 47, 48, *range(55, 63), 71, 72, 73, 75, 76, *range(100, 208))
"""MUSE ids of cortex, deep nuclei (accumbens to ventral diencephalon) and cerebellar cortex with the vermis."""

MUSE_WHITE = (40, 41, *range(81, 96))

OWN_LEVELS = 4
"""Each artefact of a head has one own severity, which turns from head to head and from artefact to artefact; so does the
severity of the independent simulator."""


def real_jobs(shared: Path, severities: dict[str, Any]) -> list[Job]:
    """The 12 heads at 2 mm, the head at 1 mm and the Philips MPRAGE, clean and with both simulators.

    Args:
        shared: folder with `t1_2mm`, `t1_1mm_truncated_fov` and `dicom/philips_mprage`.
        severities: the severity file.

    Raises:
        ValueError: none of them is there.
    """
    readers: list[tuple[str, Callable[[], Anatomy]]] = []
    for path in sorted((shared / "t1_2mm" / "t1").glob("*.nii.gz")):
        name = path.name.removesuffix("_T1.nii.gz").lower()
        readers.append((name, partial(_read_2mm, path, name)))
    whole = shared / "t1_1mm_truncated_fov"
    if (whole / "orig.mgz").exists():
        readers.append(("head1mm", partial(_read_1mm, whole)))
    philips = shared / "dicom" / "philips_mprage"
    if philips.is_dir():
        readers.append(("philips", partial(_read_philips, philips)))
    if not readers:
        raise ValueError(f"--shared {shared}: no real head found; leave the real set out or give the right folder")
    return [Job("real", name, reader, _steps(severities, i)) for i, (name, reader) in enumerate(readers)]


def _steps(severities: dict[str, Any], number: int) -> tuple[Step, ...]:
    seed = int(severities["seed"])
    own = []
    for a, kind in enumerate(("noise", "spike", "blur", ("fold", "lines")[number % 2], "motion")):
        artefact = "wrap" if a == 3 else kind
        level = 1 + (number + a) % OWN_LEVELS
        strength = float(severities["levels"][kind][level - 1])
        own.append(Step(artefact, kind, level, strength, "own", (seed, 41, number, a, level)))
    other = independent_steps(severities, (seed, 42, number), (1 + number % 3,))
    return (CLEAN_STEP, *own, *other)


def read_nifti(path: Path) -> Volume:
    """A NIfTI or MGZ file as a volume.

    Raises:
        ValueError: not readable; the message names the file.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        voxels = np.asarray(image.dataobj, dtype=np.float32).squeeze()
    except (OSError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path.name}: cannot be read ({error})") from error
    return Volume(np.ascontiguousarray(voxels), np.asarray(image.affine, dtype=np.float64))


def _mask(labels: Volume, ids: tuple[int, ...]) -> Volume:
    found: NDArray[np.bool_] = np.isin(np.round(labels.voxels).astype(np.int32), ids)
    return replace(labels, voxels=found.astype(np.float32))


def _read_2mm(path: Path, name: str) -> Anatomy:
    labels = read_nifti(path.parent.parent / "dlmuse_seg" / path.name.replace("_T1.", "_T1_DLMUSE."))
    return Anatomy(name, name, read_nifti(path), _mask(labels, MUSE_GREY), _mask(labels, MUSE_WHITE))


def _read_1mm(folder: Path) -> Anatomy:
    labels = read_nifti(folder / "aparc+aseg.mgz")
    # aparc names the cortex by region: 1000 to 1035 left, 2000 to 2035 right.
    cortex = tuple(i for i in (*range(1000, 1036), *range(2000, 2036)) if i not in (1000, 2000, 1004, 2004))
    grey = _mask(labels, (*GREY_IDS, *cortex))
    return Anatomy("head1mm", "head1mm", read_nifti(folder / "orig.mgz"), grey, _mask(labels, WHITE_IDS))


def _read_philips(folder: Path) -> Anatomy:
    """No labels came with it: its reference is the student's own clean segmentation, filled in when it is scored."""
    from training.evaluation.blank import read_stacks

    (volume,) = read_stacks(folder)
    return Anatomy("philips", "philips", volume, None, None)
