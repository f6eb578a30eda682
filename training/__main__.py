"""The `rescan-train` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from daemon import NOTICE

SPLITS = Path(__file__).with_name("splits.json")
"""Which label map is in which split, by name."""


def main() -> int:
    """Parse the command line and run one command.

    Returns:
        Exit status: 0 done, 1 failed, 2 misuse.
    """
    parser = argparse.ArgumentParser(
        prog="rescan-train",
        description="Train, evaluate and calibrate the networks that Rescan serves.",
        epilog="Try it: rescan-train cascade --out run --profile smoke (under three minutes on two cores). " + NOTICE,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pack(commands)
    _add_bank(commands)
    _add_cascade(commands)
    _add_bench(commands)
    _add_pictures(commands)
    _add_optional(commands)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        return int(args.func(args))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"rescan-train: {error}", file=sys.stderr)
        return 1


def _add_optional(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from training import calibrate, evaluate

    evaluate.add_parser(commands)
    calibrate.add_parser(commands)


def _add_pack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("pack", help="pack a folder of label maps into one small file")
    p.add_argument("folder", type=Path, help="folder of *.nii.gz label maps with FreeSurfer ids")
    p.add_argument("-o", "--out", type=Path, required=True, help="file to write, e.g. labels.xz")
    p.set_defaults(func=pack_command)


def pack_command(args: argparse.Namespace) -> int:
    """`rescan-train pack FOLDER -o FILE`."""
    from training.anatomy import pack

    count = pack(args.folder, args.out)
    print(f"packed {count} label maps, {args.out.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _add_data(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data",
        default="builtin",
        help="a packed file, a folder of label maps, a CSV manifest of real scans, or builtin (the default); "
        "several joined by +, as in labels.xz+builtin",
    )


def _add_bank(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("bank", help="synthesise the heads that training reads; continues where it stopped")
    _add_data(p)
    p.add_argument("--out", type=Path, required=True, help="folder of the bank")
    p.add_argument("--profile", default="cpu", help="smoke, cpu, gpu or paper: how many heads, which severities")
    p.add_argument("--worker", default="0/1", help="k/n: this process makes every n-th head from k on")
    p.set_defaults(func=bank_command)


def bank_command(args: argparse.Namespace) -> int:
    """`rescan-train bank`."""
    worker, workers = (int(v) for v in args.worker.split("/"))
    grow_bank(args.data, args.out, args.profile, worker, workers)
    return 0


def grow_bank(data: str, out: Path, profile_name: str, worker: int = 0, workers: int = 1) -> None:
    """Fill the training and validation banks of a profile."""
    from tqdm import tqdm

    from training import kspace
    from training.bank import grow
    from training.cascade import find_profile

    profile = find_profile(profile_name)
    ranges = kspace.PAPER if profile.ranges == "paper" else kspace.PRODUCT
    groups = split_data(data)
    for number, (split, cases) in enumerate((("train", profile.train_cases), ("val", profile.validation_cases))):
        grow(
            out / split,
            groups[split],
            cases,
            number,
            ranges,
            profile.free_contrast,
            worker,
            workers,
            progress=lambda items, name=split: tqdm(items, desc=f"bank {name}", unit="head"),
        )


def split_data(data: str) -> dict[str, list]:  # type: ignore[type-arg]
    """Subjects by split of what `--data` names; of several sources joined by + each is split by itself."""
    from training.anatomy import load_subjects

    groups = [split_subjects(load_subjects(source)) for source in data.split("+")]
    return {split: [subject for group in groups for subject in group[split]] for split in groups[0]}


def split_subjects(subjects: list) -> dict[str, list]:  # type: ignore[type-arg]
    """Subjects by split: as fixed in `splits.json`; a set it does not know is cut 60:10:10:20 in order of name."""
    fixed = json.loads(SPLITS.read_text())
    known = {name: split for split, names in fixed.items() for name in names}
    if all(s.name in known for s in subjects):
        return {split: [s for s in subjects if known[s.name] == split] for split in fixed}
    n = len(subjects)
    if n < 4:
        raise ValueError(
            f"--data: {n} heads cannot be split into training, validation, calibration and test; give at least 4"
        )
    cuts = [0, max(1, round(0.6 * n)), max(2, round(0.7 * n)), max(3, round(0.8 * n)), n]
    return {split: subjects[a:b] for split, a, b in zip(fixed, cuts[:-1], cuts[1:], strict=True)}


def _add_cascade(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("cascade", help="train task, teachers and student; resumes after an interruption")
    _add_data(p)
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and pictures")
    p.add_argument("--profile", default="cpu", help="smoke (3 minutes), cpu (hours), gpu, paper; tune, with --start")
    p.add_argument("--start", type=Path, metavar="STUDENT", help="go on from this student (rescan-export checkpoint)")
    p.add_argument("--bank", type=Path, help="folder of the bank (default: OUT/bank); made first where it is missing")
    p.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="train these stages only, e.g. teacher_noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--likelihood", help="paper, exact or faithful, instead of the profile's")
    p.set_defaults(func=cascade_command)


def cascade_command(args: argparse.Namespace) -> int:
    """`rescan-train cascade`; exit status 1 when a stage did not converge by its own criterion (smoke excepted)."""
    from dataclasses import replace

    from training.cascade import find_profile, run
    from training.loop import processes, rank, wait_for_all

    profile = find_profile(args.profile)
    first = start_student(args.start, profile.widths, profile.steps[0])
    if args.likelihood:
        profile = replace(profile, likelihood=args.likelihood)
    bank = args.bank or args.out / "bank"
    device = choose_device(args.device)
    start_processes(device)
    grow_bank(args.data, bank, args.profile, rank(), processes())
    wait_for_all()
    facts = {"profile": args.profile, "data": Path(args.data).name, "commit": commit(), "device": str(device)}
    weak = run(bank, args.out, profile, device, facts, args.only, first)
    for name in weak:
        print(f"not converged by its own criterion: {name} (see {name}.curve.jsonl)", file=sys.stderr)
    return 1 if weak and args.profile != "smoke" else 0


def start_student(path: Path | None, widths: tuple[int, ...], task_steps: int):  # type: ignore[no-untyped-def]
    """The student to go on from, or None.

    Raises:
        ValueError: none where the profile needs one, or one of another size.
    """
    from training.network import load_network

    if path is None:
        if not task_steps:
            raise ValueError("--profile tune: goes on from a trained student; give it with --start STUDENT.pt")
        return None
    if not path.is_file():
        raise ValueError(f"--start {path}: no such file; make one with rescan-export checkpoint")
    student = load_network(path)[0]
    if student.config.widths != widths or student.config.variances != 6:
        raise ValueError(f"--start {path}: a student of widths {widths} is needed, this has {student.config.widths}")
    return student


def choose_device(name: str):  # type: ignore[no-untyped-def]
    """The torch device of this process; with `torchrun` each process takes its own GPU."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; install a CUDA build of torch or use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_processes(device) -> None:  # type: ignore[no-untyped-def]
    """Join the group that `torchrun` started, if any."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def commit() -> str:
    """The commit that trains, or `unknown` outside a checkout."""
    try:
        here = Path(__file__).parent
        out = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("bench", help="iterations per second, share of data generation, FLOP/s beside the ceiling")
    p.add_argument("--profile", default="cpu")
    p.add_argument("--bank", type=Path, required=True)
    p.add_argument("--device", default="auto")
    p.set_defaults(func=bench_command)


def bench_command(args: argparse.Namespace) -> int:
    """`rescan-train bench`."""
    from training.bench import bench

    bench(args.bank, args.profile, choose_device(args.device))
    return 0


def _add_pictures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("pictures", help="pictures of synthetic heads, and of each artefact at four severities")
    _add_data(p)
    p.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    p.set_defaults(func=pictures_command)


def pictures_command(args: argparse.Namespace) -> int:
    """`rescan-train pictures`."""
    from training.anatomy import load_subjects
    from training.pictures import artefact_sheet, head_sheet

    args.out.mkdir(parents=True, exist_ok=True)
    subjects = load_subjects(args.data)
    head_sheet(subjects, args.out / "heads.png")
    artefact_sheet(subjects[0], args.out / "artefacts.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
