"""Fixtures of the fault tests."""

from tests.tracking.conftest import store

__all__ = ["store"]
