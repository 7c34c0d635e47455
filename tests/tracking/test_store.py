from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.sync import main
from pipeline.tracking import connect, tracking_uri
from pipeline.tracking.store import experiment_id

MAKE = """
import sys
from pipeline.tracking import connect
from pipeline.tracking.store import experiment_id
client = connect(sys.argv[1])
run = client.create_run(experiment_id(client, "shared"))
client.log_metric(run.info.run_id, "one", 1.0)
"""


def test_the_server_of_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(tmp_path) == "http://mlflow:5000"


def test_telemetry_is_off_and_the_users_word_stands(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    connect(store)
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_artifacts_lie_beside_the_embedded_store(store: Path) -> None:
    client = connect(store)
    made = client.get_experiment(experiment_id(client, "beside"))
    assert made.artifact_location == str(store / "mlartifacts" / "beside")
    assert made.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment_id(client, "beside") == made.experiment_id


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, pipeline.tracking, pipeline.rollout.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_main_says_what_it_could_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no run was journalled" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_may_race_for_a_fresh_store(tmp_path: Path) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path)]) for _ in range(4)]
    assert [racer.wait() for racer in racers] == [0] * 4
    client = connect(tmp_path)
    assert len(client.search_runs([experiment_id(client, "shared")])) == 4
