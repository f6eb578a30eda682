"""Sending over a real network: what arrives is what was planned, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pynetdicom import AE, AllStoragePresentationContexts, evt

from daemon.__main__ import main
from daemon.decode import TRANSFER_SYNTAXES, decode
from daemon.dicom_write import Plan
from daemon.send import Caller, SendError, Sent, contexts_for
from daemon.simulate import ENCODINGS, Habit, PerAssociation, make_series, play, schedule
from tests.builders import head_phantom, little_stack, part10, volume_of


class Receiver:
    """A small storage provider that keeps what it gets."""

    def __init__(self) -> None:
        self.images: list[tuple[str, str, bytes]] = []
        self.associations = 0
        self.answers: list[int] = []
        ae = AE("RESCAN")
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(context.abstract_syntax, list(TRANSFER_SYNTAXES))
        handlers: Any = [(evt.EVT_C_STORE, self._store), (evt.EVT_ACCEPTED, self._accepted)]
        self.server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = self.server.socket.getsockname()[1]

    def _accepted(self, event: Any) -> None:
        self.associations += 1

    def _store(self, event: Any) -> int:
        data = event.encoded_dataset(include_meta=False)
        self.images.append((str(event.request.AffectedSOPInstanceUID), str(event.context.transfer_syntax), data))
        return self.answers.pop(0) if self.answers else 0x0000


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver on a free port."""
    made = Receiver()
    yield made
    made.server.shutdown()


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_every_encoding_arrives_as_it_was_made(receiver: Receiver, encoding: str) -> None:
    """The transfer syntax is negotiated and the pixels are the same."""
    volume = volume_of(head_phantom((64, 64, 3)), (2.0, 2.0, 2.0))
    plan = Plan(transfer_syntax_uid=ENCODINGS[encoding])
    images = make_series(volume, plan, "siemens")
    sent = play(schedule([images], Habit()), Caller("127.0.0.1", receiver.port))
    assert sent.statuses == {0: 3}
    plain = make_series(volume, Plan(), "siemens")
    for (_, syntax, data), ds in zip(receiver.images, plain, strict=True):
        assert syntax == ENCODINGS[encoding]
        np.testing.assert_array_equal(decode(data, syntax).stored[0], ds.pixel_array)


def test_one_association_per_image(receiver: Receiver) -> None:
    """As many associations as images."""
    play(schedule([little_stack(4)], Habit(PerAssociation.IMAGE)), Caller("127.0.0.1", receiver.port))
    assert (receiver.associations, len(receiver.images)) == (4, 4)


def test_a_folder_is_sent_and_the_answers_are_told(
    receiver: Receiver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Success is exit status 0; any other answer is counted by its code and is 1."""
    for number, ds in enumerate(little_stack(5)):
        (tmp_path / f"{number}.dcm").write_bytes(part10(ds))
    (tmp_path / "notes.txt").write_text("not DICOM")
    assert main(["send", str(tmp_path), f"127.0.0.1:{receiver.port}"]) == 0
    assert "sent 5 images" in capsys.readouterr().err
    receiver.answers = [0xA700]
    assert main(["send", str(tmp_path), f"127.0.0.1:{receiver.port}"]) == 1
    assert "1 answered 0xA700" in capsys.readouterr().err


# pynetdicom leaves the socket of a refused connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mistakes_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], free_port: Any) -> None:
    """Nobody there, nothing to send, no such folder, no port."""
    address = f"127.0.0.1:{free_port()}"
    assert main(["send", str(tmp_path), address]) == 1
    assert "no DICOM image found" in capsys.readouterr().err
    (tmp_path / "a.dcm").write_bytes(part10(little_stack(1)[0]))
    assert main(["send", str(tmp_path), address]) == 1
    assert "nobody answers there" in capsys.readouterr().err
    assert main(["send", str(tmp_path / "no"), address]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["send", str(tmp_path), "nowhere"]) == 2
    assert "write it as HOST:PORT" in capsys.readouterr().err
    assert main(["simulate", "127.0.0.1:99", "--head", str(tmp_path / "a.dcm")]) == 1
    assert "no volume found" in capsys.readouterr().err


def test_contexts_fit_into_one_association() -> None:
    """No more than 128, each class with an uncompressed encoding beside its own."""
    contexts = contexts_for(little_stack(3))
    assert len(contexts) == 2
    assert len({c.abstract_syntax for c in contexts}) == 1


def test_a_refused_association_is_told(receiver: Receiver) -> None:
    """With who called whom."""
    receiver.server.ae.require_called_aet = True
    with pytest.raises(SendError, match="refused the association of 'SIMULATOR' to 'OTHER'"):
        Caller("127.0.0.1", receiver.port, called="OTHER").associate(little_stack(1))
    assert Sent().ok
