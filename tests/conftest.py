"""What holds for every test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking import store

ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


@pytest.fixture(scope="module", autouse=True)
def no_address_of_mlflow() -> None:
    """MLflow puts the address that one test file sets into the environment, where the next would find it."""
    for name in ADDRESSES:
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def stores_from_one_mould(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow makes an empty store by all its migrations, seconds of processor time: made once, and copied after that.

    Processes that tests start make theirs as users' do.
    """
    make, mould = store._create, tmp_path_factory.mktemp("mould") / "mlflow.db"

    def copied(file: Path) -> None:
        if not file.exists():
            make(mould)
            with store.locked(file.with_name(f".{file.name}.lock")):
                if not file.exists():
                    shutil.copy(mould, file.with_name(f".{file.name}.new")).replace(file)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "_create", copied)
        yield
