"""Damaged headers and pixels: every case ends as a volume that agrees with its header, or as a refusal."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.decode import decode
from daemon.header import read_header
from daemon.reasons import REFUSALS
from daemon.words import Refusal
from tests.fuzzing import run_case


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_damaged_series_end_as_a_volume_or_a_refusal(seed: int) -> None:
    """500 series with cut, shifted, overwritten and flipped bytes in classic, Enhanced and compressed images."""
    assert set(run_case(seed)) <= {"volume", *REFUSALS}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    """Behind a valid preamble or not, as a header and as pixels."""
    for given_bytes in (data, b"\0" * 128 + b"DICM" + data):
        for act in (
            read_header,
            lambda d: decode(d, "1.2.840.10008.1.2"),
            lambda d: decode(d, "1.2.840.10008.1.2.4.90"),
        ):
            try:
                act(given_bytes)
            except Refusal:
                continue
            raise AssertionError("arbitrary bytes were taken for an image")
