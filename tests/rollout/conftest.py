"""A registry of its own for each test file, with a model to register."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollout.models import log_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def model_uri(root: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RANK", raising=False)
        return log_model(root)
