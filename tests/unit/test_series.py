"""The table of completeness: which evidence makes a stack provisional or final, and what late images do."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from daemon.completeness import TABLE, Complete, Effect, Event, State
from daemon.config import CompletenessSettings, ScannerSettings, Settings
from daemon.header import Header
from daemon.reasons import COMPLETENESS
from daemon.series import Assembly
from daemon.simulate import conflicting
from daemon.stack import Judge, Refuse
from daemon.words import Reason, Refusal
from tests.builders import Feed, build_enhanced, every, head_phantom, instance_of, little_stack


def said(feed: Feed) -> list[tuple[str, bool, int, int]]:
    """(evidence, final, revision, images) of each action since the last call."""
    return [(str(a.evidence.completeness), a.final, a.revision, a.evidence.instances) for a in feed.take()]


def test_the_table_names_every_state_and_event() -> None:
    """No pair of state and event falls through, and only telling leads to a told state."""
    assert set(TABLE) == set(itertools.product(State, Event))
    for (state, _), (effect, then) in TABLE.items():
        if effect is Effect.NOTHING:
            assert then is state
        if effect is Effect.CONFIRM:
            assert then is State.FINAL
        if effect is Effect.TELL:
            assert then is State.PROVISIONAL


def test_every_evidence_code_is_documented() -> None:
    """Each code of completeness has its sentence in the one list."""
    assert set(COMPLETENESS) == set(Complete)


def test_counted_images_are_judged_after_half_a_second_and_confirmed_after_a_minute() -> None:
    """ImagesInAcquisition met and the geometry closed: provisional at 0.5 s, final at 60 s."""
    feed = Feed().send(little_stack(ImagesInAcquisition="12"))
    last = feed.now
    feed.wait(0.49)
    assert not feed.actions
    feed.wait(0.02)
    assert said(feed) == [("counted", False, 1, 12)]
    feed.wait(60)
    assert said(feed) == [("quiet_final", True, 1, 12)]
    assert feed.now == pytest.approx(last + 60.51)


def test_a_clean_release_counts_after_two_seconds() -> None:
    """Association released, geometry regular: provisional two seconds after the last image."""
    feed = Feed().send(little_stack()).end().wait(1.9)
    assert not feed.actions
    assert said(feed.wait(0.2)) == [("released", False, 1, 12)]


def test_an_abort_is_no_evidence() -> None:
    """After an abort or a lost connection only silence counts, and what came is kept."""
    feed = Feed().send(little_stack()).end(released=False).wait(4.9)
    assert not feed.actions
    assert said(feed.wait(0.2)) == [("quiet", False, 1, 12)]


def test_silence_on_an_open_association_is_evidence_after_five_seconds() -> None:
    """A scanner that keeps its association open does not hold back the verdict."""
    assert said(Feed().send(little_stack()).wait(5.1)) == [("quiet", False, 1, 12)]


def test_release_with_a_gap_inside_waits_for_silence() -> None:
    """An irregular geometry makes a release worthless: the rest may come on the next association."""
    images = little_stack()
    del images[5]
    feed = Feed().send(images).end().wait(4.0)
    assert not feed.actions
    (action,) = feed.wait(1.1).take()
    assert isinstance(action.stack.geometry, Reason)
    assert action.stack.geometry.code == "missing_slices"


def test_one_association_per_image_gives_one_provisional_and_one_final() -> None:
    """A sender that opens an association for every image, half a second apart, is judged once."""
    feed = Feed()
    for number, ds in enumerate(little_stack(24), 1):
        feed.send([ds], association=number, every_s=0.5).end(number)
    assert not feed.actions
    feed.wait(120)
    assert [(final, images) for _, final, _, images in said(feed)] == [(False, 24), (True, 24)]


def test_a_pause_of_the_sender_lengthens_the_wait() -> None:
    """Silence means something only when it is three times the longest pause within the stack."""
    images = little_stack(20)
    feed = Feed().send(images[:10]).send(images[10:11], every_s=4.0).send(images[11:]).end().wait(11.9)
    assert not feed.actions
    assert said(feed.wait(0.2)) == [("released", False, 1, 20)]


def test_a_scanner_that_came_late_before_is_given_more_time() -> None:
    """An image after the provisional verdict makes the daemon wait longer for this scanner, and less again in time."""
    assembly_base = 5.0
    images = little_stack(20)
    feed = Feed().send(images[:19]).wait(8.0).send(images[19:])
    assert feed.assembly.quiet_s("mr1") == pytest.approx(12.0, abs=0.1)
    assert feed.assembly.quiet_s("mr2") == assembly_base
    for number in range(2, 8):
        feed.send(little_stack(12, seed=f"later {number}")).wait(200)
    assert feed.assembly.quiet_s("mr1") == assembly_base


def test_a_scanner_has_its_own_quiet_time() -> None:
    """`quiet_provisional_s` of a scanner replaces the general one."""
    settings = Settings(scanners=(ScannerSettings("mr1", "MR1", "10.0.0.1", quiet_provisional_s=1.0),))
    assert said(Feed(settings).send(little_stack()).wait(1.1)) == [("quiet", False, 1, 12)]


def test_a_late_image_before_the_final_verdict_renews_the_provisional_one() -> None:
    """Nothing is final yet, so the revision stays; the renewed verdict holds the late image."""
    images = little_stack()
    feed = Feed().send(images[:11]).wait(6)
    assert said(feed) == [("quiet", False, 1, 11)]
    feed.send(images[11:]).wait(200)
    assert [(final, revision, n) for _, final, revision, n in said(feed)] == [(False, 1, 12), (True, 1, 12)]


def test_a_late_image_after_the_final_verdict_opens_the_next_revision() -> None:
    """Revision 2 gets its own provisional and final verdict."""
    images = little_stack()
    feed = Feed().send(images[:11]).wait(100)
    feed.take()
    feed.send(images[11:]).wait(200)
    assert [(final, revision, n) for _, final, revision, n in said(feed)] == [(False, 2, 12), (True, 2, 12)]


def test_the_same_bytes_again_change_nothing() -> None:
    """Duplicates, even of the whole series hours later, make no verdict and no revision."""
    images = little_stack()
    feed = Feed().send(images + images[:3]).wait(100)
    assert len(said(feed)) == 2
    feed.wait(3600).send(images, association=2).end(2).wait(500)
    assert not feed.actions
    assert feed.assembly.duplicates == 15


def test_other_bytes_under_a_known_uid_replace_the_image_in_the_next_revision() -> None:
    """The newest counts, the conflict is counted."""
    images = little_stack()
    feed = Feed().send(images).wait(100)
    feed.take()
    feed.send([conflicting(images[4])]).wait(100)
    final = feed.take()[-1]
    assert (final.final, final.revision, final.evidence.instances) == (True, 2, 12)
    assert feed.assembly.conflicts == 1
    assert feed.volume(final).voxels.size == 12 * 64


def test_fewer_images_than_announced_never_count_as_complete() -> None:
    """ImagesInAcquisition says 12 and 9 came: provisional by silence alone, with both numbers told."""
    feed = Feed().send(little_stack(ImagesInAcquisition="12")[:9]).wait(5.1)
    (action,) = feed.take()
    assert action.evidence.completeness == "quiet"
    assert (action.evidence.instances, action.evidence.expected, action.evidence.rule) == (9, 12, "ImagesInAcquisition")
    assert not action.stack.is_whole


def test_an_announced_count_spans_the_stacks_of_its_series() -> None:
    """Echoes of one acquisition share its ImagesInAcquisition; each echo misses nothing once all have come."""
    echoes = [
        little_stack(
            EchoTime=str(time),
            EchoNumbers=str(n),
            ImagesInAcquisition="24",
            SOPInstanceUID=lambda i, n=n: f"1.2.{n}.{i}",
        )
        for n, time in ((1, 2.5), (2, 5.0))
    ]
    feed = Feed().send([ds for pair in zip(*echoes, strict=True) for ds in pair]).wait(0.6)
    actions = feed.take()
    assert [a.evidence.completeness for a in actions] == ["counted", "counted"]
    assert [(a.evidence.instances, a.evidence.expected) for a in actions] == [(12, 12), (12, 12)]


def test_an_enhanced_image_is_complete_on_arrival() -> None:
    """NumberOfFrames are all in the one instance."""
    feed = Feed().send([build_enhanced(head_phantom((16, 16, 16)))]).wait(0.6)
    (action,) = feed.take()
    assert (action.evidence.completeness, action.evidence.instances, action.evidence.rule) == (
        "counted",
        16,
        "NumberOfFrames",
    )


def test_score_now_judges_at_once_and_only_once() -> None:
    """A waiting technologist gets a provisional verdict of what is there."""
    images = little_stack()
    feed = Feed().send(images[:10])
    series = str(images[0].SeriesInstanceUID)
    (action,) = feed.assembly.on_score_now(series, feed.now)
    assert (action.evidence.completeness, action.final, action.evidence.instances) == ("score_now", False, 10)
    assert feed.assembly.on_score_now(action.stack.key, feed.now) == []
    feed.send(images[10:]).wait(100)
    assert [n for *_, n in said(feed)] == [12, 12]


def test_a_stack_that_never_falls_silent_is_final_after_the_longest_time() -> None:
    """A series that drips for 15 minutes is judged finally, incomplete or not, and goes on as the next revision."""
    settings = Settings(completeness=CompletenessSettings(max_open_s=100.0))
    feed = Feed(settings).send(little_stack(40), every_s=3.0)
    first = said(feed)
    assert first[0][:3] == ("timeout", True, 1)
    assert said(feed.wait(200))[-1] == ("quiet_final", True, 2, 40)


def test_interleaved_series_are_told_apart() -> None:
    """Two series on one association, image by image, each get their verdicts."""
    first, second = little_stack(seed="one"), little_stack(seed="two")
    feed = Feed().send([ds for pair in zip(first, second, strict=True) for ds in pair]).end().wait(2.1)
    assert [n for *_, n in said(feed)] == [12, 12]


def test_order_of_arrival_does_not_matter() -> None:
    """Shuffled images give the same stack, key and order by position."""
    images = little_stack()
    shuffled = list(images)
    random.Random(5).shuffle(shuffled)
    (one,), (two,) = (Feed().send(order).end().wait(2.1).take() for order in (images, shuffled))
    assert one.stack.key == two.stack.key
    assert [p.facts.position_mm for p in one.stack.planes] == [p.facts.position_mm for p in two.stack.planes]
    assert [s.sha256 for s in one.stack.instances] == [s.sha256 for s in two.stack.instances]


def test_the_same_records_give_the_same_actions() -> None:
    """A restart replays the spool: every verdict, revision and key is the same."""

    def story() -> list[tuple[str, bool, int, str]]:
        feed = Feed().send(little_stack()[:9]).end().wait(100).send(little_stack()[9:], association=2).end(2).wait(100)
        return [(a.stack.key, a.final, a.revision, str(a.evidence.completeness)) for a in feed.take()]

    assert story() == story()
    assert len(story()) == 4


def test_scanners_do_not_share_stacks() -> None:
    """The same UIDs from two callers make two stacks, so that one cannot disturb the other."""
    images = little_stack()
    feed = Feed().send(images).send(images, scanner="mr2").wait(6)
    assert [a.stack.scanner for a in feed.take()] == ["mr1", "mr2"]


def test_other_storage_classes_are_refused_in_their_own_stack() -> None:
    """A report or raw data in the same series is refused and does not disturb the images."""
    images = little_stack()
    report = every(little_stack(1, seed="report"), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    report[0].SeriesInstanceUID = images[0].SeriesInstanceUID
    report[0].file_meta.MediaStorageSOPClassUID = report[0].SOPClassUID
    actions = Feed().send([*images, *report]).wait(6).take()
    assert [type(a) for a in actions] == [Judge, Refuse]
    assert isinstance(actions[1], Refuse)
    assert actions[1].reason.code == "unsupported_sop"


def test_images_without_a_readable_header_are_refused_together() -> None:
    """They end as one refusal of their association, not in silence."""
    feed = Feed()
    for number, ds in enumerate(little_stack(3)):
        stored, _ = instance_of(ds, position=number)
        feed.assembly.on_instance(stored, Refusal("bad_header", "x"), feed.now)
    actions = feed.wait(6).take()
    assert [(type(a), a.evidence.instances) for a in actions] == [(Refuse, 3)]


def test_an_enhanced_image_with_other_bytes_is_the_next_revision_of_its_stack() -> None:
    """The only instance of a stack is replaced: the stack stays, its revision rises."""
    one, other = (build_enhanced(np.full((16, 16, 16), value, np.uint16)) for value in (5, 6))
    feed = Feed().send([one]).wait(100)
    feed.take()
    final = feed.send([other]).wait(100).take()[-1]
    assert (final.final, final.revision, final.evidence.instances) == (True, 2, 16)


def test_a_conflict_that_moves_an_image_leaves_no_trace_of_the_old_one() -> None:
    """The newer bytes have another orientation: the old stack loses the image, a new one holds it."""
    images = little_stack()
    feed = Feed().send(images)
    moved = every(little_stack()[3:4], ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])
    actions = feed.send(moved).wait(6).take()
    assert sorted(a.evidence.instances for a in actions) == [1, 11]


def test_a_stack_is_forgotten_a_day_after_its_last_image() -> None:
    """The table does not grow for ever."""
    feed = Feed().send(little_stack()).end().wait(3 * 86400)
    assert feed.assembly.next_deadline() is None
    assert feed.assembly.open_stacks() == []
    assert feed.assembly._of_instance == {}
    assert feed.assembly._exact == {}
    assert feed.assembly._groups == {}


def test_the_cost_of_an_image_does_not_grow_with_its_stack() -> None:
    """A flood of thousands costs no more per image at its end than at its beginning: the heap and the tables stay small."""
    assembly = Assembly(Settings())
    stored, header = instance_of(little_stack(1)[0])
    frame = header.frames[0]
    for number in range(3000):
        position = (float(number % 30), 0.0, 0.0)
        facts = type(frame)(**{**{n: getattr(frame, n) for n in frame.__slots__}, "position_mm": position})
        fields = {n: getattr(header, n) for n in Header.__slots__}
        image = Header(**{**fields, "sop_instance_uid": f"1.2.{number}", "frames": (facts,)})
        copy = type(stored)(**{**stored.__dict__, "sha256": f"{number}", "sop_instance_uid": f"1.2.{number}"})
        assembly.on_instance(copy, image, number * 0.001)
    assert len(assembly._heap) < 10
    assert len(assembly._exact) == 1
