from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.tracking import connect


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an embedded store that is made once; tests take experiments of their own."""
    root = tmp_path_factory.mktemp("store")
    connect(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    return root
