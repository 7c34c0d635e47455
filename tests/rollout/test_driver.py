"""The driver on a tiny log: two waves of nothing much, then what must hold of whatever they decide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.errors import ConfigError, RegistryError
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout.driver.context import Context, open_context, wave_folder
from pipeline.rollout.driver.publication import artifact_of
from pipeline.rollout.driver.replay import replay
from pipeline.rollout.driver.wave import run_wave
from pipeline.rollout.faults import Fault
from pipeline.rollout.gates import Verdict
from pipeline.rollout.plan import RolloutPlan, Wave
from pipeline.rollout.quality import score_days
from pipeline.rollout.registry import Registry
from pipeline.rollout.results import WaveResult
from tests.rollout.plans import CANARY, THRESHOLDS, plan

# Two waves are trained, exported and timed: a minute alone.
pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parent / "tiny_recipe.py"
# The log is too small to tell good from bad: these bounds let everything through but what is broken.
LAX = replace(
    THRESHOLDS,
    auc_margin=1.0,
    ne_margin=9.0,
    calibration=(0.01, 99.0),
    slice_calibration=(0.001, 999.0),
    cost_growth=50.0,
    p99_ms={"hf": 1e5, "sr": 1e5},
    unique_users=8,
    coverage_drop=1.0,
    drift=99.0,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rollout")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RANK", raising=False)
        patch.setenv("TREFOIL_HOME", str(folder / "runs"))
        # No bound can be lax enough for a model that has learned nothing: it must be better in something.
        fine = Verdict(gate="gain", subject="", passed=True, reason="not asked of a tiny log")
        patch.setattr("pipeline.rollout.gates._gain", lambda *measured: fine)
        yield folder


@pytest.fixture(scope="module")
def log(home: Path) -> Dataset:
    config = SimulationConfig.tiny(days=4, requests=1500, users=90, history=8)
    return simulate(home / "log", config)


@pytest.fixture(scope="module")
def small_plan(log: Dataset) -> RolloutPlan:
    whole = plan()
    return replace(
        whole,
        recipe=f"{RECIPE}:tiny",
        dataset=log.fingerprint,
        evaluation_days=log.days[2:3],
        replay_days=log.days[3:],
        surfaces={s: whole.surfaces[s] for s in ("hf", "sr")},
        waves=(Wave(surfaces=("hf", "sr"), steps=("merged", "int8", "multi_task"), predicted_ms={}, why="cheap"),),
        thresholds=LAX,
        canary=replace(CANARY, share=1.0, loss_margin=1.0, calibration=(0.01, 99.0)),
    )


def context(small_plan: RolloutPlan, log: Dataset, home: Path, wave: int) -> Context:
    return open_context(small_plan, wave, log.root, home / "out", resamples=20, console=Console(quiet=True))


@pytest.fixture(scope="module")
def separate(small_plan: RolloutPlan, log: Dataset, home: Path) -> WaveResult:
    """Wave 0, promoted."""
    result = run_wave(context(small_plan, log, home, 0))
    for surface in result.versions:
        Registry(home / "runs").promote(surface, dataset=log.fingerprint)
    return result


@pytest.fixture(scope="module")
def unified(separate: WaveResult, small_plan: RolloutPlan, log: Dataset, home: Path) -> WaveResult:
    return run_wave(context(small_plan, log, home, 1))


def test_wave_0_makes_champions_with_evidence(separate: WaveResult, home: Path) -> None:
    assert {s: [v.gate for v in d.failures] for s, d in separate.decisions.items()} == {"hf": [], "sr": []}
    assert separate.measurements["hf"].cost.over_separate == 1.0
    registry = Registry(home / "runs")
    for surface in ("hf", "sr"):
        champion = registry.get(surface, "champion")
        assert champion is not None
        evidence = json.loads((wave_folder(home / "out", 0) / "evidence" / surface / "evidence.json").read_text())
        assert evidence["artifact"] == champion.tags["digest"]
        assert [r.action for r in registry.history(surface)] == ["nominate", "promote"][
            : len(registry.history(surface))
        ]


def test_wave_1_climbs_its_ladder(unified: WaveResult, home: Path) -> None:
    assert [r.step for r in unified.rungs] == ["merged", "int8", "multi_task"]
    first, int8, last = unified.rungs
    # Serving steps train nothing; the rest do.
    assert (int8.checkpoint, int8.serving.dtype) == (first.checkpoint, "int8")
    assert last.checkpoint != first.checkpoint
    assert (first.config.tasks, last.config.tasks) == (("click",), ("click", "save"))
    assert all(set(r.cost) == {"hf", "sr"} for r in unified.rungs)
    # What the last step came to is what the gates saw; values, times and rates have intervals.
    hf = unified.measurements["hf"]
    for task, of in last.auc["hf"].items():
        seen = hf.tasks[task].auc
        assert seen is not None
        assert seen.value == of.value
        assert of.value is not None
        assert of.low is not None
        assert of.high is not None
        assert of.low < of.value < of.high
    assert last.cost["hf"].ms_interval is not None
    assert last.cost["hf"].ms is not None
    assert last.cost["hf"].ms_interval[0] <= last.cost["hf"].ms <= last.cost["hf"].ms_interval[1]
    curve = unified.curves["hf"]["click"]["challenger"]
    assert all(low <= rate <= high for low, rate, high in zip(curve.low, curve.mean_label, curve.high, strict=True))
    assert unified.champions == {"hf": 1, "sr": 1}
    assert unified.measurements["hf"].tasks["save"].auc_difference is not None
    assert (wave_folder(home / "out", 1) / "report.html").stat().st_size > 10_000


def test_a_wave_that_has_ended_decides_nothing_anew(
    unified: WaveResult, small_plan: RolloutPlan, log: Dataset, home: Path
) -> None:
    before = Registry(home / "runs").history("hf")
    again = run_wave(context(small_plan, log, home, 1))
    assert again.decisions == unified.decisions
    assert Registry(home / "runs").history("hf") == before


def test_every_decision_is_a_run(unified: WaveResult, home: Path) -> None:
    from pipeline.tracking import connect

    client = connect(home / "runs")
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.kind = 'gates'")
    assert sorted((r.data.tags["surface"], r.data.tags["wave"]) for r in runs) == [
        ("hf", "0"),
        ("hf", "1"),
        ("sr", "0"),
        ("sr", "1"),
    ]
    waves = {r.data.tags["wave"]: r.info.run_id for r in client.search_runs(experiments, "tags.kind = 'wave'")}
    assert {r.data.tags["mlflow.parentRunId"] for r in runs} == set(waves.values())
    trained = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{waves['1']}'")
    assert {"merged", "multi_task"} <= {r.info.run_name for r in trained}
    for run in runs:
        assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["evidence.json"]


def test_a_champion_is_found_in_mlflow_alone(unified: WaveResult, home: Path, tmp_path: Path) -> None:
    champion = Registry(home / "runs").get("hf", "champion")
    assert champion is not None
    here, there = (artifact_of(champion, out) for out in (home / "out", tmp_path))
    assert str(home / "out") in str(here)
    assert str(home / "out") not in str(there)
    assert (here / "manifest.json").read_bytes() == (there / "manifest.json").read_bytes()


def test_a_planted_fault_is_rolled_back_and_others_stay(
    unified: WaveResult, small_plan: RolloutPlan, log: Dataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Challengers are promoted; then what sr's candidate says is wrong wherever a fault is planted."""
    registry = Registry(home / "runs")
    for surface in unified.versions:
        registry.promote(surface, dataset=log.fingerprint)
    assert set(unified.versions) == {"hf", "sr"}
    before = registry.aliases("hf")
    where = context(small_plan, log, home, 0)

    def broken(*args: Any, alter: Any = None) -> Predictions:
        right = score_days(*args, alter=alter)
        return right if alter is None else Predictions(right.table.with_columns(p_click=pl.lit(0.97)))

    monkeypatch.setattr("pipeline.rollout.driver.replay.score_days", broken)
    found = replay(where, "sr", fault=Fault(surface="sr", feature="match_score", factor=10.0))
    quiet = replay(where, "hf")
    assert (found.canary.verdict, found.action) == ("harm", "rolled back")
    assert registry.aliases("sr") == {"champion": 1}
    last = registry.history("sr")[-1]
    assert (last.action, last.actor) == ("rollback", "canary")
    assert quiet.action == "none"
    assert registry.aliases("hf") == before
    with pytest.raises(RegistryError, match="neither a challenger nor a previous version"):
        replay(where, "sr")


def test_plan_log_and_recipe_must_belong_together(small_plan: RolloutPlan, log: Dataset, home: Path) -> None:
    def refused(changed: RolloutPlan, problem: str, wave: int = 0) -> None:
        with pytest.raises(ConfigError, match=problem):
            context(changed, log, home, wave)

    refused(replace(small_plan, dataset="feed"), "the plan was made for the log feed")
    refused(small_plan, "waves 1 to 1, and 0 for the separate models; not 2", wave=2)
    surfaces = {"hf": small_plan.surfaces["hf"], "srr": small_plan.surfaces["sr"]}
    wave = replace(small_plan.waves[0], surfaces=("hf", "srr"))
    limits = replace(LAX, p99_ms={"hf": 1.0, "srr": 1.0})
    renamed = replace(small_plan, surfaces=surfaces, waves=(wave,), thresholds=limits)
    refused(renamed, "unknown surface 'srr'; did you mean 'sr'")
    refused(replace(small_plan, replay_days=("2030-01-01",)), "unknown day '2030-01-01'")


def test_a_wave_may_not_start_before_the_one_before(
    small_plan: RolloutPlan, log: Dataset, tmp_path: Path, home: Path
) -> None:
    with pytest.raises(ConfigError, match="wave 1 may not start:\n  - wave 0 has not run"):
        run_wave(context(small_plan, log, tmp_path, 1))
