"""Runs found again by their tags."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.tracking import Tracker, connect
from pipeline.tracking.runs import find_runs, metric_history, newest_by_seed, read_artifact


def record(root: Path, name: str, status: str = "FINISHED", **tags: str) -> None:
    tracker = Tracker.start(name, run_dir=root / name, root=root, experiment=tags["recipe"], tags=tags, rank=0)
    for step, value in ((2, 0.4), (1, 0.5)):
        tracker.log_metrics({"train/click/loss": value}, step=step)
    tracker.log_text(f"plan of {name}", "plan.json")
    assert tracker.finish(status)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    connect(root)  # making the store may take a busy machine longer than a run waits at its end
    record(root, "first", recipe="demo", seed="1", run_dir=str(root / "first"))
    record(root, "again", recipe="demo", seed="1")
    record(root, "zero", recipe="demo", seed="0", run_dir=str(root / "nowhere"))
    record(root, "failed", recipe="demo", seed="2", status="FAILED")
    record(root, "other", recipe="it's", seed="0")
    return root


def test_finished_runs_that_bear_the_tags_newest_first(root: Path) -> None:
    assert [r.name for r in find_runs(root, {"recipe": "demo"})] == ["zero", "again", "first"]
    assert [r.name for r in find_runs(root, {"recipe": "demo", "seed": "1"})] == ["again", "first"]
    assert [r.name for r in find_runs(root, {"recipe": "it's"})] == ["other"]
    assert len(find_runs(root, {})) == 4
    assert find_runs(root, {"recipe": "none"}) == []


def test_the_newest_of_each_seed(root: Path) -> None:
    found = newest_by_seed(find_runs(root, {"recipe": "demo"}))
    assert {seed: run.name for seed, run in found.items()} == {0: "zero", 1: "again"}
    assert list(found) == [0, 1]


def test_history_and_artifacts(root: Path) -> None:
    (run,) = find_runs(root, {"recipe": "it's"})
    assert metric_history(root, run, "train/click/loss") == ([1, 2], [0.5, 0.4])
    assert metric_history(root, run, "train/save/loss") == ([], [])
    assert run.metrics == {"train/click/loss": 0.4}
    assert read_artifact(root, run, "plan.json") == "plan of other"
    with pytest.raises(DataError, match=r"run other has no artifact 'plan\.yaml'; it has plan\.json"):
        read_artifact(root, run, "plan.yaml")


def test_a_run_says_where_its_files_lie(root: Path) -> None:
    by_name = {run.name: run for run in find_runs(root, {})}
    assert by_name["first"].folder == root / "first"
    with pytest.raises(DataError, match="does not say where its files lie"):
        _ = by_name["again"].folder
    with pytest.raises(DataError, match="gone or on another machine"):
        _ = by_name["zero"].folder


def test_reading_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no MLflow store; set TREFOIL_HOME"):
        find_runs(tmp_path / "typo", {})
    assert not (tmp_path / "typo").exists()


def test_a_value_that_cannot_be_searched_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="both kinds of quotes"):
        find_runs(root, {"recipe": "'\""})
