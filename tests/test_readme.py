"""The README's commands run as written."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import polars as pl
import pytest

from pipeline.cli import main
from pipeline.data.logs import Dataset
from pipeline.rollout.registry import Registry
from pipeline.tracking import connect
from pipeline.tracking.runs import find_runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(heading: str) -> list[str]:
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def test_step_by_step_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TREFOIL_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    lines = commands("Step by step")
    assert len(lines) > 5
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "trefoil"
        assert main(argv) == 0, line
    # The registry was asked without making its address this process's.
    assert "MLFLOW_TRACKING_URI" not in os.environ
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.height > 0
    assert scores["p_click"].explode().is_between(0, 1).all()
    _mlflow_shows_what_compare_shows(capsys)
    _a_registered_model_leads_back_to_what_it_came_from()


def _mlflow_shows_what_compare_shows(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["compare", "runs/first", "runs/merged", "--resamples", "20", "--json", "--quiet"]) == 0
    compared = json.loads(capsys.readouterr().out)["runs"]
    recorded = {run.name: run for run in find_runs("runs", {"data": str(Path("logs").absolute())})}
    assert recorded.keys() == {"first", "merged"}
    for name, run in recorded.items():
        shown = {
            f"test/{surface}/{task}/{metric}": of[0]
            for surface, tasks in compared[name].items()
            if surface in ("hf", "sr", "rp")
            for task, metrics in tasks.items()
            for metric, of in metrics.items()
            if metric in ("auc", "ne", "log_loss", "calibration") and of[0] is not None
        }
        assert len(shown) > 20
        assert {metric: run.metrics[metric] for metric in shown} == shown


def _a_registered_model_leads_back_to_what_it_came_from() -> None:
    version = Registry("runs").get("hf", "challenger")
    assert version is not None
    (run,) = find_runs("runs", {"recipe": "demo", "seed": "0", "surface": "several"})
    assert version.tags["checkpoint"] == "epoch-1-step-00000000"
    assert (run.folder / "checkpoints" / version.tags["checkpoint"] / "state.json").is_file()
    assert version.tags["dataset"] == run.tags["dataset"] == Dataset.open("logs").fingerprint
    (export,) = find_runs("runs", {"kind": "export", "surface": "hf", "dataset": version.tags["dataset"]})
    assert export.tags["digest"] == version.tags["digest"]
    (used,) = connect("runs").get_run(run.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("logs", version.tags["dataset"])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert named <= targets


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:components|pipeline|tests|benchmarks|docs|requirements)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
