"""`rescan simulate`: send a head as a given vendor and habit would, to try a set-up or to test one.

Two steps: a plan of what happens in which order (`schedule`, pure and repeatable), and playing it over the network
(`play`). The habits are those of section "Sending behaviour" in `docs/dicom-conformance.md`.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from daemon.config import split_address
from daemon.dicom_write import PLANES, Plan, classic_series, enhanced_image
from daemon.send import Caller, SendError, Sent, report, store
from daemon.volume import volumes_from_path
from daemon.words import Volume

Number = TypeVar("Number", int, float)

ENCODINGS: dict[str, str] = {
    "implicit": str(ImplicitVRLittleEndian),
    "explicit": str(ExplicitVRLittleEndian),
    "big-endian": str(ExplicitVRBigEndian),
    "rle": str(RLELossless),
    "jpeg-ls": str(JPEGLSLossless),
    "jpeg2000": str(JPEG2000Lossless),
}
"""Name -> transfer syntax in which a simulated series can be sent."""


class PerAssociation(StrEnum):
    """How much a scanner sends on one association."""

    IMAGE = "image"
    SERIES = "series"
    STUDY = "study"


@dataclass(frozen=True)
class Habit:
    """How a scanner sends.

    Attributes:
        association: one for each image, series or study.
        shuffle: images in random order.
        duplicates: so many images come twice, with the same bytes.
        missing: so many images never come, from the middle.
        cut: share of the images, by position, after which nothing more comes; 1 sends all.
        stall_s: one pause of so many seconds in the middle.
        late_s: the last image comes so many seconds after all others, on an association of its own.
        abort: the association is aborted after the last image instead of released.
        interleave: several series come in turns, image by image, on one association.
        seed: of everything random.
    """

    association: PerAssociation = PerAssociation.SERIES
    shuffle: bool = False
    duplicates: int = 0
    missing: int = 0
    cut: float = 1.0
    stall_s: float = 0.0
    late_s: float = 0.0
    abort: bool = False
    interleave: bool = False
    seed: int = 0


class Do(StrEnum):
    """What can happen."""

    OPEN = "open"
    STORE = "store"
    WAIT = "wait"
    RELEASE = "release"
    ABORT = "abort"


@dataclass(frozen=True)
class Step:
    """One thing that happens: an association opens or ends, an image is sent, time passes."""

    do: Do
    dataset: Dataset | None = None
    seconds: float = 0.0


def schedule(series: Sequence[Sequence[Dataset]], habit: Habit) -> list[Step]:
    """What a scanner of this habit does with some series.

    Args:
        series: images of each series, in the order of position.
        habit: how they are sent.

    Returns:
        Steps in their order; each association is opened and ended.
    """
    rng = random.Random(habit.seed)  # noqa: S311  (a repeatable order, no secret)
    chosen = [_chosen(list(images), habit, rng) for images in series]
    if habit.interleave:
        chosen = [[ds for turn in _in_turns(chosen) for ds in turn]]
    late = chosen[-1].pop() if habit.late_s > 0 else None
    steps = list(_associations(chosen, habit))
    if habit.stall_s > 0:
        stores = [i for i, step in enumerate(steps) if step.do is Do.STORE]
        steps.insert(stores[len(stores) // 2], Step(Do.WAIT, seconds=habit.stall_s))
    if late is not None:
        steps += [Step(Do.WAIT, seconds=habit.late_s), Step(Do.OPEN), Step(Do.STORE, late), Step(Do.RELEASE)]
    return steps


def _chosen(images: list[Dataset], habit: Habit, rng: random.Random) -> list[Dataset]:
    """The images that are sent of one series, in the order in which they are sent."""
    images = images[: max(1, round(habit.cut * len(images)))]
    if habit.missing:
        start = max((len(images) - habit.missing) // 2, 0)
        del images[start : start + habit.missing]
    if habit.shuffle:
        rng.shuffle(images)
    for _ in range(min(habit.duplicates, len(images))):
        images.insert(rng.randrange(len(images) + 1), rng.choice(images))
    return images


def _in_turns(series: Sequence[Sequence[Dataset]]) -> Iterator[list[Dataset]]:
    for turn in range(max(map(len, series))):
        yield [images[turn] for images in series if turn < len(images)]


def _associations(series: Sequence[Sequence[Dataset]], habit: Habit) -> Iterator[Step]:
    end = Step(Do.ABORT if habit.abort else Do.RELEASE)
    batches: list[list[Dataset]]
    if habit.association is PerAssociation.IMAGE:
        batches = [[ds] for images in series for ds in images]
    elif habit.association is PerAssociation.STUDY:
        batches = [[ds for images in series for ds in images]]
    else:
        batches = [list(images) for images in series]
    for number, batch in enumerate(batches):
        yield Step(Do.OPEN)
        yield from (Step(Do.STORE, ds) for ds in batch)
        yield end if number == len(batches) - 1 else Step(Do.RELEASE)


# --- Makers -----------------------------------------------------------------------------------------------------------


def _as_siemens(images: list[Dataset]) -> None:
    for ds in images:
        ds.Manufacturer, ds.ManufacturerModelName, ds.SequenceName = "SIEMENS", "Prisma_fit", "*tfl3d1_16ns"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "NORM"]
        if "SpacingBetweenSlices" in ds:
            del ds.SpacingBetweenSlices


def _as_ge(images: list[Dataset]) -> None:
    for ds in images:
        ds.Manufacturer, ds.ManufacturerModelName = "GE MEDICAL SYSTEMS", "SIGNA Premier"
        ds.ImageType, ds.ScanningSequence, ds.SequenceVariant = ["ORIGINAL", "PRIMARY", "OTHER"], ["RM", "IR"], "NONE"
        ds.ImagesInAcquisition = str(len(images))
        ds.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", 0)


def _as_philips(images: list[Dataset]) -> None:
    for ds in images:
        ds.Manufacturer, ds.ManufacturerModelName = "Philips", "Ingenia Elition X"
        ds.ImageType, ds.ScanningSequence, ds.SequenceVariant = ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"], "GR", "MP"
        ds.RepetitionTime, ds.InversionTime = "6.5", None
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "2.36166056166056", "normalized"
        ds.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x18, "SL", len(images))


def _as_canon(images: list[Dataset]) -> None:
    """Classic Canon images carry a SeriesInstanceUID for each slice."""
    for number, ds in enumerate(images, 1):
        ds.Manufacturer, ds.ManufacturerModelName = "CANON_MEC", "MRT-3020"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
        ds.SeriesInstanceUID = f"{str(ds.SeriesInstanceUID)[:58]}.{number}"


def _as_uih(images: list[Dataset]) -> None:
    for ds in images:
        ds.Manufacturer, ds.ManufacturerModelName = "UIH", "uMR 780"
        ds.ImageType, ds.ScanningSequence, ds.SequenceVariant = ["ORIGINAL", "PRIMARY", "M", "NONE"], ["GR", "IR"], "MP"


MAKERS: dict[str, Callable[[list[Dataset]], None]] = {
    "siemens": _as_siemens,
    "ge": _as_ge,
    "philips": _as_philips,
    "canon": _as_canon,
    "uih": _as_uih,
}
"""Maker -> what its classic headers look like."""


def make_series(volume: Volume, plan: Plan, maker: str, *, enhanced: bool = False) -> list[Dataset]:
    """A series of one head.

    Args:
        volume: in patient space.
        plan: plane, encoding, numbers.
        maker: a key of `MAKERS`.
        enhanced: one Enhanced image instead of classic slices.

    Raises:
        ValueError: an unknown maker; the message shows it.
    """
    if maker not in MAKERS:
        raise ValueError(f"maker: got {maker!r}; use one of {', '.join(MAKERS)}")
    if enhanced:
        return [enhanced_image(volume, plan)]
    images = classic_series(volume, plan)
    MAKERS[maker](images)
    return images


def simple_head(spacing_mm: float = 1.0) -> Volume:
    """A head of nested ellipsoids: scalp, skull, fluid, grey and white matter, ventricles, neck. No real anatomy.

    Args:
        spacing_mm: of cubic voxels.

    Returns:
        A volume of 170 x 220 x 240 mm with intensities up to about 1000.
    """
    size_mm = np.array([176.0, 224.0, 256.0])
    shape = tuple(int(n) for n in np.round(size_mm / spacing_mm))
    axes = [(np.arange(n) - (n - 1) / 2) * spacing_mm for n in shape]
    x, y, z = (a.reshape([-1 if i == axis else 1 for i in range(3)]) for axis, a in enumerate(axes))
    z = z - 20.0

    def inside(a: float, b: float, c: float) -> NDArray[np.bool_]:
        return np.asarray((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1.0)

    voxels = np.zeros(shape, dtype=np.float32)
    voxels[np.broadcast_to(((x / 52) ** 2 + ((y + 10) / 58) ** 2 < 1) & (z < -40), shape)] = 400.0
    folds = 4.0 * np.sin(x / 5.0) * np.sin(y / 6.0) * np.cos(z / 5.5)
    for radii, value in (((76, 96, 92), 850.0), ((71, 91, 87), 60.0), ((67, 87, 83), 180.0)):
        voxels[inside(*radii)] = value
    grey = ((x / 65) ** 2 + (y / 85) ** 2 + (z / 81) ** 2) ** 0.5 + folds / 80.0
    voxels[grey < 1.0] = 480.0
    voxels[grey < 0.93] = 780.0
    voxels[inside(14, 26, 18)] = 180.0
    noise = np.random.default_rng(0).normal(0.0, 12.0, (2, *shape)).astype(np.float32)
    measured = np.hypot(voxels + noise[0], noise[1])
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [float(axis[0]) for axis in axes]
    return Volume(measured.astype(np.float32), affine)


# --- Playing ----------------------------------------------------------------------------------------------------------


def play(steps: Iterable[Step], caller: Caller, sleep: Callable[[float], None] = time.sleep) -> Sent:
    """Do what a schedule says, over the network.

    Args:
        steps: from `schedule`.
        caller: who sends to whom.
        sleep: waits for so many seconds.

    Returns:
        What the receiver answered.

    Raises:
        SendError: the receiver cannot be reached or refuses.
    """
    steps, sent, assoc = list(steps), Sent(), None
    images = [step.dataset for step in steps if step.dataset is not None]
    started = time.monotonic()
    for step in steps:
        if step.do is Do.OPEN:
            assoc = caller.associate(images)
        elif step.do is Do.WAIT:
            sleep(step.seconds)
        elif assoc is not None and step.dataset is not None:
            store(assoc, step.dataset, sent)
        elif assoc is not None:
            assoc.abort() if step.do is Do.ABORT else assoc.release()
            assoc = None
    sent.seconds = time.monotonic() - started
    return sent


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """`rescan simulate`."""
    parser = subparsers.add_parser(
        "simulate",
        help="send a head as a given vendor and habit would",
        description="Send a made-up head, or the volume in a file, as a given vendor and habit would.",
        epilog="examples:\n  rescan simulate 127.0.0.1:11112\n  rescan simulate 127.0.0.1:11112 --maker canon --association image\n"
        "  rescan simulate 127.0.0.1:11112 --head t1.nii.gz --shuffle --late 10 --series 2 --interleave",
    )
    parser.add_argument("address", metavar="HOST:PORT", help="of the receiver")
    parser.add_argument(
        "--head", type=Path, metavar="FILE", help="NIfTI, MGZ or DICOM volume (default: a made-up head)"
    )
    parser.add_argument("--maker", choices=[*MAKERS], default="siemens", help="whose headers (default: siemens)")
    parser.add_argument("--plane", choices=[*PLANES], default="sagittal", help="how the slices lie (default: sagittal)")
    parser.add_argument("--enhanced", action="store_true", help="one Enhanced MR image for each series")
    parser.add_argument(
        "--encoding", choices=[*ENCODINGS], default="explicit", help="transfer syntax (default: explicit)"
    )
    parser.add_argument("--series", type=_count, default=1, metavar="N", help="how many series (default: 1)")
    _add_habits(parser)
    parser.add_argument("--called", default="RESCAN", help="AE title of the receiver (default: RESCAN)")
    parser.add_argument("--calling", default="SIMULATOR", help="AE title to call with (default: SIMULATOR)")
    parser.set_defaults(func=run)


def _add_habits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--association",
        choices=[*PerAssociation],
        type=PerAssociation,
        default=PerAssociation.SERIES,
        help="one for each",
    )
    parser.add_argument("--shuffle", action="store_true", help="images in random order")
    parser.add_argument("--interleave", action="store_true", help="the series in turns, image by image")
    parser.add_argument("--duplicates", type=_count, default=0, metavar="N", help="so many images come twice")
    parser.add_argument("--missing", type=_count, default=0, metavar="N", help="so many images never come")
    parser.add_argument("--cut", type=_share, default=1.0, metavar="SHARE", help="stop after this share of the images")
    parser.add_argument("--stall", type=_seconds, default=0.0, metavar="SECONDS", help="pause in the middle")
    parser.add_argument(
        "--late", type=_seconds, default=0.0, metavar="SECONDS", help="the last image comes so much later"
    )
    parser.add_argument("--abort", action="store_true", help="abort the last association instead of releasing it")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of every UID (default: 0)")


def _count(text: str) -> int:
    return _number(text, int, 0, 100_000)


def _seconds(text: str) -> float:
    return _number(text, float, 0.0, 86_400.0)


def _share(text: str) -> float:
    return _number(text, float, 0.0, 1.0)


def _number(text: str, kind: Callable[[str], Number], low: float, high: float) -> Number:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; write a number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"got {text}; it must lie between {low:g} and {high:g}")
    return value


def run(args: argparse.Namespace) -> int:
    """Make, send, report."""
    host, port = split_address(args.address, "HOST:PORT")
    volume = simple_head() if args.head is None else head_from(args.head)
    if volume is None:
        print(f"rescan simulate: {args.head}: no volume found; name a NIfTI, MGZ or DICOM volume", file=sys.stderr)
        return 1
    base = Plan(seed=f"simulate {args.seed}", plane=args.plane, transfer_syntax_uid=ENCODINGS[args.encoding])
    plans = [replace(base, series_number=number) for number in range(2, 2 + max(args.series, 1))]
    series = [make_series(volume, plan, args.maker, enhanced=args.enhanced) for plan in plans]
    steps = schedule(series, habit_of(args))
    try:
        return report("simulate", args.address, play(steps, Caller(host, port, args.called, args.calling)))
    except SendError as error:
        print(f"rescan simulate: {error}", file=sys.stderr)
        return 1


def head_from(path: Path) -> Volume | None:
    """The first volume in a file or folder, None where there is none."""
    return next((found for _, found, _ in volumes_from_path(path) if isinstance(found, Volume)), None)


def habit_of(args: argparse.Namespace) -> Habit:
    """The habit that the command line describes."""
    return Habit(
        association=args.association,
        shuffle=args.shuffle,
        duplicates=args.duplicates,
        missing=args.missing,
        cut=args.cut,
        stall_s=args.stall,
        late_s=args.late,
        abort=args.abort,
        interleave=args.interleave,
        seed=args.seed,
    )


def conflicting(ds: Dataset) -> Dataset:
    """The same SOP instance with other pixels: what a sender must never do, and some do."""
    other = copy.deepcopy(ds)
    pixels = np.frombuffer(other.PixelData, dtype="<u2") + 1
    other.PixelData = pixels.astype("<u2").tobytes()
    return other
