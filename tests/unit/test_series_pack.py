"""What is judged takes little room, and is known again when something comes late."""

from __future__ import annotations

import pickle

import pytest
from pydicom.dataset import Dataset

from daemon.series import FORGET_S, PACK_AGAIN_S
from daemon.series_pack import pack, unpack
from daemon.stack import Judge
from tests.builders import Feed, every, instance_of, little_stack


def series(number: int, slices: int = 12) -> list[Dataset]:
    return little_stack(slices, seed=f"series {number}")


def test_planes_come_out_as_they_went_in() -> None:
    """The same instances, frames and counted UIDs, in the same order."""
    planes = []
    for number, ds in enumerate(little_stack(5), 1):
        stored, header = instance_of(ds, position=number)
        planes.append((stored.sop_instance_uid, 0, stored, header.frames[0]))
    packed = pack(planes, {"1.2", "1.1"})
    assert packed.planes == 5
    assert unpack(packed) == (planes, ["1.1", "1.2"])
    assert len(packed.data) < len(pickle.dumps(planes))


def test_a_judged_series_is_put_away_and_a_copy_of_it_changes_nothing() -> None:
    """After the final verdict nothing of its images is at hand; all of them sent again are duplicates, and no action follows."""
    feed = Feed()
    images = series(1)
    feed.send(images).end().wait(120)
    assert any(action.final for action in feed.take())
    (stack,) = feed.assembly._stacks.values()
    assert (stack.held, stack.planes) == ({}, 12)
    assert not feed.assembly._of_instance
    feed.send(images, association=2).end(2).wait(120)
    assert feed.take() == []
    assert feed.assembly.duplicates == 12
    feed.wait(PACK_AGAIN_S + 1)
    assert stack.held == {}


@pytest.mark.parametrize("announced", [None, 12])
def test_a_late_image_reopens_what_was_put_away(announced: int | None) -> None:
    """Ten images judged, two more an hour later: revision 2 holds all twelve, in the order of position."""
    images = every(series(1), ImagesInAcquisition=announced) if announced else series(1)
    feed = Feed()
    feed.send(images[:10]).end().wait(3600)
    assert feed.take()[-1].revision == 1
    feed.send(images[10:], association=2).end(2).wait(120)
    last = feed.take()[-1]
    assert isinstance(last, Judge)
    assert (last.revision, last.final, last.evidence.instances) == (2, True, 12)
    assert last.evidence.expected == announced
    assert sorted(feed.volume(last).voxels.shape) == [8, 8, 12]


def test_another_image_under_a_known_uid_replaces_the_one_put_away() -> None:
    """A conflict long after the verdict: revision 2 with the newer bytes."""
    images = series(1)
    feed = Feed()
    feed.send(images).end().wait(3600)
    feed.take()
    changed = series(1)[4]
    changed.PixelData = bytes(len(changed.PixelData))
    feed.send([changed], association=2).end(2).wait(120)
    last = feed.take()[-1]
    assert (last.revision, last.evidence.instances, feed.assembly.conflicts) == (2, 12, 1)
    assert instance_of(changed)[0].sha256 in {stored.sha256 for stored in last.stack.instances}


def test_what_was_put_away_is_forgotten_in_time() -> None:
    """A day after its last image no trace is left."""
    feed = Feed()
    feed.send(series(1)).end().wait(FORGET_S + 200)
    assert not feed.assembly._stacks
    assert not feed.assembly._groups
    assert not feed.assembly._of_instance
    assert not feed.assembly._exact


def test_a_judged_series_takes_little_memory() -> None:
    """170 images: about 80 bytes each, of which 32 are their hashes; as objects they take 1.4 kB each."""
    feed = Feed()
    feed.send(series(1, 170)).end().wait(120)
    (stack,) = feed.assembly._stacks.values()
    assert stack.packed is not None
    assert len(stack.packed.data) < 170 * 110
