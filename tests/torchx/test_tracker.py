"""TorchX's tracker reads what runs recorded, and writes where they record."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.cli.main import main as torchx
from torchx.runner import get_runner
from torchx.tracker.api import AppRun, TrackerArtifact, TrackerSource

from pipeline.errors import DataError
from pipeline.torchx_tracker import JobTracker
from pipeline.tracking import Tracker, connect, sync, tracking_uri

ROOT = Path(__file__).parents[2]
SWEEP, TRAIN = "slurm://torchx/3", "slurm://torchx/7"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an embedded store that is made once; jobs take handles of their own."""
    root = tmp_path_factory.mktemp("store")
    connect(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    return root


@pytest.fixture(autouse=True)
def job(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A job of TorchX with a parent, launched from this repository."""
    monkeypatch.chdir(ROOT)
    for name in ("MLFLOW_TRACKING_URI", "RANK", "TORCHX_TRACKER_TREFOIL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Tracker, "_living", [])
    monkeypatch.setenv("TREFOIL_HOME", str(store))
    monkeypatch.setenv("TORCHX_TRACKERS", "trefoil")
    AppRun.run_from_env.cache_clear()
    yield monkeypatch
    AppRun.run_from_env.cache_clear()


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The rows that `torchx tracker list ARGUMENTS` prints, less its head."""
    torchx(["tracker", "list", *arguments])
    return [re.split(r" {2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:]]


def test_jobs_are_listed_with_what_their_runs_recorded(
    store: Path, tmp_path: Path, job: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.setenv("TORCHX_JOB_ID", SWEEP)
    parent = Tracker.start("sweep", run_dir=tmp_path / "sweep", root=store)
    assert parent.finish()
    job.setenv("TORCHX_JOB_ID", TRAIN)
    job.setenv("TORCHX_PARENT_RUN_ID", SWEEP)
    run = Tracker.start("r1", run_dir=tmp_path / "r1", root=store, params={"model": {"deep": [16]}}, tags={"seed": "1"})
    run.log_metrics({"val/hf/click/auc": 0.75}, step=9)
    run.log_text("{}", "plan.json")
    run.set_tags({"checkpoint": "/runs/r1/checkpoints/9"})
    export = Tracker.start("export-hf", run_dir=tmp_path / "hf", root=store, parent=run, tags={"checkpoint": "9"})
    export.log_text("model", "MLmodel", to="model")
    assert run.finish()
    assert export.finish()
    sync(tmp_path / "hf")

    assert listed(capsys, "jobs") == [[TRAIN], [SWEEP]]
    assert listed(capsys, "jobs", "--parent-run-id", SWEEP) == [[TRAIN]]
    assert dict(listed(capsys, "metadata", TRAIN)) == {
        "mlflow_run_id": run.run_id,
        "mlflow_experiment_id": connect(store).get_run(str(run.run_id)).info.experiment_id,
        "mlflow_parent_run_id": parent.run_id,
        "name": "r1",
        "status": "FINISHED",
        "torchx_job": TRAIN,
        "torchx_parent": SWEEP,
        "seed": "1",
        "checkpoint": "/runs/r1/checkpoints/9",
        "model.deep": "[16]",
        "val/hf/click/auc": "0.75",
        "run export-hf": export.run_id,
    }
    found = JobTracker().artifacts(TRAIN)
    place = connect(store).get_run(str(run.run_id)).info.artifact_uri
    assert found["plan.json"] == TrackerArtifact("plan.json", f"{place}/plan.json", {"bytes": 2})
    assert Path(found["plan.json"].path).read_text() == "{}"
    assert found["checkpoint"].path == "/runs/r1/checkpoints/9"
    assert found.keys() == {"plan.json", "checkpoint", "export-hf/model"}
    assert listed(capsys, "artifacts", "--artifact", "checkpoint", TRAIN)[0][1] == "/runs/r1/checkpoints/9"
    assert JobTracker().sources(TRAIN) == [TrackerSource(SWEEP, None)]


def test_what_a_job_tells_reaches_the_run_that_it_trains(store: Path, tmp_path: Path, job: pytest.MonkeyPatch) -> None:
    handle = "local_cwd://torchx/told"
    job.setenv("TORCHX_JOB_ID", handle)
    job.setenv("TORCHX_PARENT_RUN_ID", "a parent that is no job")
    run = Tracker.start("told", run_dir=tmp_path / "told", root=store)
    told = AppRun.run_from_env()
    told.add_metadata(tokens=3, schedule={"kind": "linear"})
    told.add_artifact("a name, with ?signs", "s3://models/1", {"bytes": 4})
    told.add_source(TRAIN, "teacher")
    assert run.finish()
    tracker = JobTracker()
    data = connect(store).get_run(str(run.run_id)).data
    assert data.params == {"tokens": "3", "schedule.kind": "linear"}
    assert tracker.metadata(handle)["tokens"] == "3"
    assert tracker.artifacts(handle) == {
        "a name, with ?signs": TrackerArtifact("a name, with ?signs", "s3://models/1", {"bytes": 4})
    }
    assert tracker.sources(handle) == [TrackerSource("a parent that is no job", None), TrackerSource(TRAIN, "teacher")]
    assert tracker.sources(handle, "teacher") == [TrackerSource(TRAIN, "teacher")]
    assert list(tracker.run_ids(parent_run_id=TRAIN)) == [handle]


def test_a_job_without_a_run_of_ours_gets_one(store: Path, job: pytest.MonkeyPatch) -> None:
    handle = "local_cwd://torchx/script"
    job.setenv("TORCHX_JOB_ID", handle)
    told = AppRun.run_from_env()
    (backend,) = told.backends
    assert isinstance(backend, JobTracker)
    with pytest.raises(DataError, match=r"no run in MLflow is of the job .*`torchx tracker list jobs` names those"):
        backend.metadata(handle)
    at_exit: list[object] = []
    with job.context() as patched:
        patched.setattr("pipeline.torchx_tracker.atexit.register", at_exit.append)
        told.add_metadata(rows=5)
        backend.add_metadata("slurm://torchx/another", rows=6)
    assert at_exit == [backend.close]  # once, however many jobs tell
    backend.close()
    assert (backend.metadata(handle)["rows"], backend.metadata(handle)["status"]) == ("5", "FINISHED")
    assert backend.metadata("slurm://torchx/another")["torchx_job"] == "slurm://torchx/another"
    # As TorchX calls it in every rank: the first alone records.
    job.setenv("RANK", "1")
    backend.add_metadata("slurm://torchx/rank-1", rows=7)
    backend.close()
    assert "slurm://torchx/rank-1" not in backend.run_ids()


def test_the_address_of_torchx_configuration_reaches_launcher_and_job(
    store: Path, tmp_path: Path, job: pytest.MonkeyPatch
) -> None:
    job.delenv("TORCHX_TRACKERS")
    address = f"sqlite:///{store / 'mlflow.db'}"
    (tmp_path / ".torchxconfig").write_text(
        f"[torchx:tracker]\ntrefoil =\n[tracker:trefoil]\nconfig = {address}\n[component:train]\npython = python\n"
    )
    job.setenv("TORCHXCONFIG", str(tmp_path / ".torchxconfig"))
    job.setenv("TREFOIL_HOME", str(tmp_path / "nowhere"))
    job.setenv("TORCHX_PARENT_RUN_ID", SWEEP)
    with get_runner() as runner:
        asked = runner.dryrun_component("train", ["--recipe", "demo", "--data", "logs"], "local_cwd")
    (role,) = asked.app.roles
    assert {name: role.env[f"TORCHX_{name}"] for name in ("TRACKERS", "TRACKER_TREFOIL_CONFIG", "PARENT_RUN_ID")} == {
        "TRACKERS": "trefoil",
        "TRACKER_TREFOIL_CONFIG": address,
        "PARENT_RUN_ID": SWEEP,
    }
    with pytest.raises(DataError, match="no MLflow store"):
        JobTracker().run_ids()
    list(JobTracker(address).run_ids())
    job.setenv("TORCHX_TRACKER_TREFOIL_CONFIG", role.env["TORCHX_TRACKER_TREFOIL_CONFIG"])
    assert tracking_uri(tmp_path) == address
    job.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(tmp_path) == "http://mlflow:5000"
