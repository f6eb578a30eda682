"""Fixtures of these tests."""

from __future__ import annotations

from tests.small_student import strict_student, student

__all__ = ["strict_student", "student"]
