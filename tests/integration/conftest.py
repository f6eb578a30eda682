"""Fixtures of these tests."""

from __future__ import annotations

from tests.network_student import network_student
from tests.small_student import strict_student, student

__all__ = ["network_student", "strict_student", "student"]
