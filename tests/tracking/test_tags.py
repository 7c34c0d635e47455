"""What every run says of itself in MLflow."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pipeline import job
from pipeline.config import config_from_json
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.recipes import find
from pipeline.tracking import connect
from pipeline.train.sharding import Ranks


def test_runs_are_found_by_recipe_seed_surface_wave_data_set_and_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREFOIL_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHX_JOB_ID", "slurm://torchx/7")
    simulate(tmp_path / "log", SimulationConfig.tiny())
    dataset, client = Dataset.open(tmp_path / "log"), connect(tmp_path)
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"), host_group=None)  # type: ignore[arg-type]
    for name, surfaces in (("whole", ("hf", "sr", "rp")), ("alone", ("sr",))):
        config = replace(find("demo")(), seed=3, surfaces=surfaces)
        assert job.start_tracker(config, dataset, tmp_path / name, ranks, tags={"wave": "1"}).finish()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.surface = 'sr'")
    assert run.data.tags["mlflow.source.git.commit"] == run.data.tags["code"] == job.code_version()
    read = {
        f.path: Path(client.download_artifacts(run.info.run_id, f.path)) for f in client.list_artifacts(run.info.run_id)
    }
    assert config_from_json(read["config.json"].read_bytes(), source="MLflow").surfaces == ("sr",)
    environment = json.loads(read["environment.json"].read_text())
    assert environment["packages"]["mlflow"] == version("mlflow")
    assert environment["python"] == platform.python_version()
    for wanted, names in (
        ("tags.recipe = 'demo' and tags.seed = '3' and tags.wave = '1'", {"whole", "alone"}),
        ("tags.surface = 'sr'", {"alone"}),
        ("tags.surfaces LIKE '%sr%'", {"whole", "alone"}),
        ("tags.torchx_job = 'slurm://torchx/7'", {"whole", "alone"}),
        (f"dataset.digest = '{dataset.fingerprint}'", {"whole", "alone"}),
        ("tags.seed = '4'", set()),
    ):
        assert {run.info.run_name for run in client.search_runs(experiments, wanted)} == names, wanted
