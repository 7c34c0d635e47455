"""A log, and the runs on both devices that the tests compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate

NO_GPU = "needs a GPU: torch.cuda.is_available() is False here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate(tmp_path_factory.mktemp("log") / "log", SimulationConfig.tiny(history=16))
