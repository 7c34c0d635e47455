"""A registered model that needs no training, and evidence for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.rollout.audit import Evidence
from pipeline.rollout.registry import Registry, Version
from pipeline.tracking import Tracker

TAGS = {"digest": "d" * 64, "dataset": "0123456789abcdef"}

MODEL = """
import mlflow
import pandas as pd
class Constant(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pd.DataFrame):
        return [0.5] * len(model_input)
mlflow.models.set_model(Constant())
"""


def log_model(root: Path) -> str:
    """Address of a pyfunc model, written as code, among the artifacts of a run."""
    tracker = Tracker.start("export", run_dir=root / "run", root=root)
    import mlflow.pyfunc

    (root / "model.py").write_text(MODEL)
    mlflow.pyfunc.save_model(root / "pyfunc", python_model=str(root / "model.py"), pip_requirements=[])
    tracker.log_artifact(root / "pyfunc", to="model")
    assert tracker.finish()
    return f"runs:/{tracker.run_id}/model"


def evidence(surface: str, **changes: Any) -> Evidence:
    """Evidence that passes, for versions with `TAGS`."""
    whole = Evidence(
        surface=surface,
        artifact=TAGS["digest"],
        dataset=TAGS["dataset"],
        plan="p",
        wave=1,
        champion=None,
        passed=True,
        run="r",
        sha256="s",
    )
    return replace(whole, **changes)


def promote(registry: Registry, surface: str, model_uri: str) -> Version:
    """A new version, all the way to champion."""
    made = registry.register(surface, model_uri, tags=TAGS, challenger=False)
    champion = registry.aliases(surface).get("champion")
    registry.nominate(surface, made.version, evidence(surface, champion=champion))
    return registry.promote(surface)
