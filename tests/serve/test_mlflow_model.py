"""An artifact kept by MLflow scores as the artifact itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.rollout.registry import Registry
from pipeline.serve.artifact import ArtifactInfo
from pipeline.serve.mlflow_model import example_rows, log_artifact_model
from pipeline.serve.scorer import Scorer
from pipeline.tracking import Tracker, tracking_uri


def test_logged_registered_loaded(
    artifact: Callable[[str, str], ArtifactInfo], scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = artifact("sr", "fp32")
    with Tracker.start("export", run_dir=tmp_path / "run", root=tmp_path) as tracker:
        uri = log_artifact_model(tracker, info.path)
    version = Registry(tmp_path).register("sr", uri)
    assert version.run_id == uri.split("/")[1]
    import mlflow

    mlflow.set_tracking_uri(tracking_uri(tmp_path))
    model = mlflow.pyfunc.load_model(f"models:/trefoil-sr/{version.version}")
    rows = example_rows(info.signature)
    rows["device"] = [1.0, 1.0, np.nan]  # absent, as pandas says it
    expected = scorer.score(rows).to_pandas()
    np.testing.assert_array_equal(model.predict(rows).to_numpy(), expected.to_numpy())
    assert list(expected.columns) == ["click", "save"]
    assert model.metadata.metadata["digest"] == info.digest
    files = [p.name for p in tmp_path.rglob("artifacts/model/*")]
    assert "mlflow_code.py" in files
    assert not [name for name in files if name.endswith(".pkl")]


def test_a_damaged_artifact_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact folder"):
        log_artifact_model(Tracker.start("x", run_dir=tmp_path, root=tmp_path, enabled=False), tmp_path / "none")
