"""The simulated sender: what happens in which order, and the verdicts that each habit leads to."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pytest

from daemon.dicom_write import Plan, dataset_bytes
from daemon.simulate import (
    ENCODINGS,
    MAKERS,
    Do,
    Habit,
    PerAssociation,
    Step,
    add_parser,
    habit_of,
    make_series,
    schedule,
)
from tests.builders import Feed, little_stack, volume_of

ONE = little_stack(seed="one")
TWO = little_stack(seed="two")


def did(steps: list[Step]) -> str:
    """The steps as letters: o(pen) s(tore) w(ait) r(elease) a(bort)."""
    return "".join(step.do.value[0] for step in steps)


def played(steps: list[Step]) -> Feed:
    """The steps played into an assembly, without a network."""
    feed, association = Feed(), 0
    for step in steps:
        if step.do is Do.OPEN:
            association += 1
        elif step.do is Do.WAIT:
            feed.wait(step.seconds)
        elif step.dataset is not None:
            feed.send([step.dataset], association=association)
        else:
            feed.end(association, released=step.do is Do.RELEASE)
    return feed.wait(200)


def finals(feed: Feed) -> list[tuple[int, int]]:
    """(revision, images) of each final verdict."""
    return [(a.revision, a.evidence.instances) for a in feed.take() if a.final]


@pytest.mark.parametrize(
    ("association", "expected"),
    [("image", "osr" * 24), ("series", ("o" + "s" * 12 + "r") * 2), ("study", "o" + "s" * 24 + "r")],
)
def test_associations(association: str, expected: str) -> None:
    """One for each image, series or study; each is opened and released."""
    assert did(schedule([ONE, TWO], Habit(PerAssociation(association)))) == expected


@pytest.mark.parametrize(
    ("habit", "expected"),
    [
        (Habit(), [(1, 12), (1, 12)]),
        (Habit(PerAssociation.IMAGE), [(1, 12), (1, 12)]),
        (Habit(PerAssociation.STUDY), [(1, 12), (1, 12)]),
        (Habit(interleave=True), [(1, 12), (1, 12)]),
        (Habit(shuffle=True), [(1, 12), (1, 12)]),
        (Habit(duplicates=5), [(1, 12), (1, 12)]),
        (Habit(abort=True), [(1, 12), (1, 12)]),
        (Habit(stall_s=20.0), [(1, 12), (1, 12)]),
        (Habit(late_s=100.0), [(1, 12), (1, 11), (2, 12)]),
        (Habit(missing=2), [(1, 10), (1, 10)]),
        (Habit(cut=0.75), [(1, 9), (1, 9)]),
    ],
    ids=repr,
)
def test_every_habit_ends_in_one_final_verdict_per_revision(habit: Habit, expected: list[tuple[int, int]]) -> None:
    """Whatever the habit, each series is judged with what came."""
    assert sorted(finals(played(schedule([ONE, TWO], habit)))) == sorted(expected)


def test_the_same_seed_gives_the_same_schedule() -> None:
    """A set-up can be tried again."""
    habit = Habit(shuffle=True, duplicates=3, seed=5)

    def order(h: Habit) -> list[str]:
        return [str(s.dataset.SOPInstanceUID) for s in schedule([ONE], h) if s.dataset is not None]

    assert order(habit) == order(habit)
    assert order(habit) != order(replace(habit, seed=6))
    assert len(order(habit)) == 15


@pytest.mark.parametrize("maker", list(MAKERS))
def test_makers_write_valid_images_that_are_the_same_each_time(maker: str) -> None:
    """The same volume and plan give the same bytes."""
    volume = volume_of(np.arange(8 * 8 * 8, dtype=np.uint16).reshape(8, 8, 8), (2.0, 2.0, 2.0))
    one, two = (make_series(volume, Plan(seed="x"), maker) for _ in range(2))
    assert [dataset_bytes(ds) for ds in one] == [dataset_bytes(ds) for ds in two]
    assert len(one) == 8


def test_an_unknown_maker_is_named() -> None:
    """With what can be used instead."""
    with pytest.raises(ValueError, match="got 'acme'; use one of siemens"):
        make_series(volume_of(np.ones((8, 8, 8)), (2.0, 2.0, 2.0)), Plan(), "acme")


def test_the_command_line_describes_a_habit() -> None:
    """Every option reaches the habit; wrong values name themselves."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    line = "simulate 127.0.0.1:1 --association image --shuffle --duplicates 2 --missing 3 --cut 0.5 --stall 1 --late 2 --abort --interleave --seed 9"
    assert habit_of(parser.parse_args(line.split())) == Habit(
        PerAssociation.IMAGE, True, 2, 3, 0.5, 1.0, 2.0, True, True, 9
    )
    assert parser.parse_args(["simulate", "x:1", "--encoding", "rle"]).encoding in ENCODINGS


@pytest.mark.parametrize("option", ["--cut=1.5", "--cut=x", "--duplicates=-1", "--late=-2"])
def test_impossible_habits_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the value and the range."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["simulate", "x:1", option])
    assert ended.value.code == 2
    assert option.split("=")[1] in capsys.readouterr().err
