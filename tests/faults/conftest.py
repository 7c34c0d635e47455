"""Fixtures of the fault tests."""

from tests.tracking.conftest import store
from tests.train.conftest import log

__all__ = ["log", "store"]
