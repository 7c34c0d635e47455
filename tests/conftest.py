"""What holds for every test."""

from __future__ import annotations

import os

import pytest

ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


@pytest.fixture(scope="module", autouse=True)
def no_address_of_mlflow() -> None:
    """MLflow puts the address that one test file sets into the environment, where the next would find it."""
    for name in ADDRESSES:
        os.environ.pop(name, None)
