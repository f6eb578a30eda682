"""Make all evaluation scans, by one or several processes, each resumable."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path
from typing import Any

from training.anatomy import Source
from training.evaluation.plan import (
    Job,
    calibration_jobs,
    clean_jobs,
    independent_jobs,
    ladder_jobs,
    make,
    simulated_jobs,
)
from training.evaluation.real import real_jobs
from training.evaluation.refusal import make_refusal

log = logging.getLogger("rescan.training")

SETS = ("simulated", "calibration", "negatives", "real", "refusal", "ladder", "independent", "clean")

ORDER = (*SETS, "simulated")
"""In which they are made: what the calibration waits for comes early, the third head of each subject last."""

NEGATIVE_DRAWS = 6
"""Images of each kind that must be refused, per calibration subject: the gates are fitted to them."""


def jobs_of(
    group: str, groups: dict[str, list[Source]], shared: Path | None, severities: dict[str, Any], small: bool
) -> list[Job]:
    """The jobs of one set; `small` makes one head of each kind, to rehearse."""
    counts = {k: 1 if small else int(v) for k, v in severities["heads"].items()}
    test = groups["test"]
    if group == "simulated":
        return simulated_jobs(test, severities, counts[group])
    if group == "calibration":
        return calibration_jobs(groups["calibrate"], severities, counts[group])
    if group == "independent":
        return independent_jobs(test, severities, counts[group])
    if group == "clean":
        return clean_jobs(test, severities, counts[group])
    if group == "ladder":
        return ladder_jobs(test, severities)
    if group == "real" and shared is not None:
        return real_jobs(shared, severities)
    return []


def make_sets(
    root: Path,
    sets: tuple[str, ...],
    groups: dict[str, list[Source]],
    shared: Path | None,
    severities: dict[str, Any],
    small: bool = False,
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Make what is missing; worker k of n takes every n-th head."""
    import torch

    torch.set_num_threads(1)
    begun: set[str] = set()
    for group in (s for s in ORDER if s in sets):
        if worker == workers - 1 and group in ("refusal", "negatives"):
            log.info("%s: made %d images", group, _make_refused(root, group, groups, shared, severities, small))
        jobs = jobs_of(group, groups, shared, severities, small)
        if group == "simulated" and "simulated" not in begun:
            jobs = jobs[: 2 * len(groups["test"])]  # two heads of each subject are enough to begin with
        begun.add(group)
        for number, job in enumerate(jobs):
            if number % workers == worker:
                count = make(root, job)
                if count:
                    log.info("%s %d/%d %s: made %d scans", group, number + 1, len(jobs), job.head, count)


def make_sets_side_by_side(workers: int, *args: Any) -> None:
    """`make_sets` in several processes.

    Raises:
        RuntimeError: a process ended badly.
    """
    if workers <= 1:
        make_sets(*args)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=make_sets, args=(*args, k, workers)) for k in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("making the evaluation scans failed in a worker process; its traceback stands above")


def _make_refused(
    root: Path,
    group: str,
    groups: dict[str, list[Source]],
    shared: Path | None,
    severities: dict[str, Any],
    small: bool,
) -> int:
    seed = int(severities["seed"])
    if group == "negatives":
        return make_refusal(root, group, groups["calibrate"], None, seed + 1, 1 if small else NEGATIVE_DRAWS)
    return make_refusal(root, group, groups["test"], shared, seed, 1)
