"""The sender's answers and its table of files."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from daemon.send import NOT_SENT, Sent, batches, keep_answers
from tests.builders import little_stack, part10


def test_an_answer_reaches_the_request_that_waits_for_it() -> None:
    """The reactor's look at the queue takes nothing; the waiting request takes the answer."""
    answers: queue.Queue[Any] = queue.Queue()
    answers.put((1, "answer"))
    assoc = SimpleNamespace(dimse=SimpleNamespace(get_msg=lambda block=False: answers.get(block=block)))
    keep_answers(assoc)  # type: ignore[arg-type]
    assert assoc.dimse.get_msg(block=False) == (None, None)
    assert assoc.dimse.get_msg(block=True) == (1, "answer")


def test_files_are_put_together_by_image_series_or_study(tmp_path: Path) -> None:
    """One batch for each; what is no DICOM is left out."""
    for name in ("a", "b"):
        for number, ds in enumerate(little_stack(3, seed=name, StudyInstanceUID="1.2.3")):
            (tmp_path / f"{name}{number}.dcm").write_bytes(part10(ds))
    (tmp_path / "c.txt").write_text("no")
    assert [len(b) for b in batches(tmp_path, "series")] == [3, 3]
    assert [len(b) for b in batches(tmp_path, "study")] == [6]
    assert [len(b) for b in batches(tmp_path, "image")] == [1] * 6


def test_only_success_is_success() -> None:
    """A warning, a failure and an image that could not be sent all count as such."""
    for status in (0xB000, 0xA700, NOT_SENT):
        sent = Sent()
        sent.note(0)
        assert sent.ok
        sent.note(status)
        assert not sent.ok
