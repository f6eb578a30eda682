"""Whatever bytes a peer sends, an association ends in one of the known ways, and keeps no memory."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.association import Answer, Association, Ended, Limits, Rejection, StoreRequest
from daemon.receive import supported_contexts
from tests.receiving import make_dataset, pack_request, pack_store, uid

LIMITS = Limits(max_pdu_bytes=16384, max_instance_bytes=1 << 20, association_timeout_s=5.0, network_timeout_s=5.0)
CONTEXTS = supported_contexts()
VALID = pack_request() + pack_store(uid(1), make_dataset(uid(1), size_bytes=40_000)) + b"\5\0\0\0\0\4\0\0\0\0"


@dataclass
class Keeper:
    """Accepts everything and remembers it; counts the memory taken."""

    stored: list[StoreRequest] = field(default_factory=list)
    taken_bytes: int = 0

    def admit(self, calling_ae_title: str, called_ae_title: str) -> Rejection | None:
        return None

    def store(self, request: StoreRequest) -> Answer:
        self.stored.append(request)
        return Answer(0x0000)

    def take(self, size_bytes: int) -> bool:
        self.taken_bytes += size_bytes
        return True

    def give(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes


def converse(data: bytes) -> tuple[Ended, Keeper]:
    """Send all of it, hang up, and see how the association ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
    keeper, ends = Keeper(), []

    def run() -> None:
        ends.append(Association(connection, LIMITS, CONTEXTS, keeper, keeper).run())
        connection.close()

    thread = threading.Thread(target=run)
    with peer:
        thread.start()
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it hung up first, as it may
        thread.join(20)
    assert not thread.is_alive()
    (ended,) = ends
    return ended, keeper


def test_a_whole_conversation_is_released() -> None:
    """The conversation that the other tests damage is right as it is."""
    ended, keeper = converse(VALID)
    assert ended is Ended.RELEASED
    assert bytes(keeper.stored[0].dataset) == make_dataset(uid(1), size_bytes=40_000)
    assert keeper.taken_bytes == 0


@settings(deadline=None, max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True, allow_subnormal=False), noise=st.binary(min_size=1, max_size=12))
def test_damaged_conversations_end(where: float, noise: bytes) -> None:
    """A few wrong bytes anywhere: no error escapes, nothing hangs, nothing leaks."""
    at = int(where * len(VALID))
    ended, keeper = converse(VALID[:at] + noise + VALID[at + len(noise) :])
    assert ended in set(Ended)
    assert keeper.taken_bytes == 0


@settings(deadline=None, max_examples=30)
@given(where=st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_conversations_cut_short_end(where: float) -> None:
    """A peer that hangs up anywhere leaves no half instance."""
    ended, keeper = converse(VALID[: int(where * len(VALID))])
    assert ended in {Ended.LOST, Ended.REFUSED}
    assert keeper.taken_bytes == 0
    assert all(request.size_bytes == len(request.dataset) for request in keeper.stored)


@settings(deadline=None, max_examples=30)
@given(data=st.binary(max_size=300))
def test_noise_is_no_association(data: bytes) -> None:
    """Random bytes never become an association."""
    ended, keeper = converse(data)
    assert ended in {Ended.ABORTED, Ended.REFUSED}
    assert keeper.stored == []
