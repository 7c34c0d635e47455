"""What each step of a wave changes, and which steps are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import MixtureConfig
from pipeline.errors import ConfigError
from pipeline.recipes import find
from pipeline.rollout.gates import decide
from pipeline.rollout.measurements import Interval
from pipeline.rollout.results import Differences, WaveResult, judge_step, may_start
from pipeline.rollout.waves import Rung, Serving, carried, climb, dated, merged, separate
from tests.rollout.plans import THRESHOLDS, good, plan

BASE = dated(find("demo_staged")(), plan())


def test_runs_end_before_the_evaluation_days() -> None:
    assert (BASE.days.last, BASE.days.validation, BASE.days.test) == ("2026-01-11", 0, 2)
    assert BASE.name == "demo_staged_rollout"


def test_the_ladder_leads_from_the_merged_baseline_to_the_unified_recipe() -> None:
    rung = merged(BASE, ("hf", "sr"))
    start = rung.config.model
    assert (start.towers, start.mixture.kind, start.calibration, start.projection.kind) == (
        "shared",
        "none",
        "global",
        "none",
    )
    assert (rung.config.tasks, rung.config.surfaces) == (("click",), ("hf", "sr"))
    assert rung.serving == Serving(dtype="fp32", compiled=False, broadcast=False)
    for step in ("projection", "broadcast", "int8", "tf32", "towers", "multi_task", "calibration", "compiled"):
        rung = climb(rung, step, BASE)
    assert rung.config == replace(BASE, surfaces=("hf", "sr"))
    assert rung.serving == Serving(dtype="int8", compiled=True, broadcast=True)
    wider = carried(rung, ("hf", "sr", "rp"))
    assert wider == Rung(config=BASE, serving=rung.serving)
    assert climb(wider, "warm_start", BASE) == wider


def test_a_step_that_changes_nothing_is_an_error() -> None:
    plain = replace(BASE, model=replace(BASE.model, mixture=MixtureConfig(kind="none")), tasks=("click",))
    with pytest.raises(ConfigError, match="step 'multi_task' changes nothing"):
        climb(merged(plain, ("hf", "sr")), "multi_task", plain)
    with pytest.raises(ConfigError, match="unknown step 'tower'; did you mean 'towers'"):
        climb(merged(BASE, ("hf", "sr")), "tower", BASE)


def test_separate_models_make_as_many_steps() -> None:
    alone = separate(BASE, "rp", 0.25)
    assert (alone.surfaces, alone.loader.requests_per_batch) == (("rp",), 32)
    assert separate(BASE, "hf", 0.5).loader.requests_per_batch == 64
    assert separate(BASE, "rp", 0.001).loader.requests_per_batch == 32


def found(auc: tuple[float, float], ne: tuple[float, float] = (-0.01, 0.01)) -> Differences:
    def between(ends: tuple[float, float]) -> Interval:
        return Interval(value=sum(ends) / 2, low=ends[0], high=ends[1])

    return {
        "hf": {"click": {"auc": between(auc), "ne": between(ne)}},
        "sr": {"click": {"auc": between((-0.01, 0.01)), "ne": between((-0.01, 0.01))}},
    }


@pytest.mark.parametrize(
    ("step", "differences", "kept", "reason"),
    [
        ("towers", found((0.001, 0.01)), True, "better: hf click AUC"),
        ("towers", found((-0.01, 0.01)), True, "no difference beyond users' luck"),
        ("towers", found((-0.02, -0.0001)), False, "worse: hf click AUC"),
        ("towers", found((-0.01, 0.01), ne=(0.0001, 0.02)), False, "worse: hf click NE"),
        ("towers", found((-0.01, 0.01), ne=(-0.02, -0.0001)), True, "better: hf click NE"),
        # A step that aims at cost may lose what the gates would let pass: .01 in AUC, .02 in NE.
        ("int8", found((-0.02, -0.0001)), True, "no difference"),
        ("int8", found((-0.03, -0.0101)), False, "worse: hf click AUC"),
        ("projection", found((-0.01, 0.01), ne=(0.0201, 0.03)), False, "worse: hf click NE"),
    ],
)
def test_which_steps_are_kept(step: str, differences: Differences, kept: bool, reason: str) -> None:
    verdict = judge_step(step, differences, THRESHOLDS)
    assert verdict[0] is kept
    assert reason in verdict[1]


def result(**costs: float) -> WaveResult:
    """A wave whose surfaces cost so many times their separate models."""
    measured = {s: good(s, cost=replace(good().cost, over_separate=c)) for s, c in costs.items()}
    unused = ("champions", "champion_auc", "versions", "artifacts", "separate_cost", "champion_cost", "curves")
    empty: dict[str, Any] = {name: {} for name in unused}
    return WaveResult(
        wave=1,
        plan="p",
        dataset="d",
        evaluation_days=("2026-01-10",),
        code="c",
        run="r",
        rungs=(),
        measurements=measured,
        decisions={s: decide(m, THRESHOLDS, ("click", "save")) for s, m in measured.items()},
        **empty,
    )


def test_a_wave_waits_for_the_costs_of_the_one_before() -> None:
    assert may_start(0, None) == []
    assert may_start(2, result(hf=1.2, sr=1.5)) == []
    assert may_start(2, None) == ["wave 1 has not run: `trefoil rollout run --wave 1`"]
    assert may_start(2, result(hf=1.2, sr=1.6)) == [
        "sr is outside its envelope in wave 1: cost 1.60 times the separate model's, at most 1.5"
    ]


def test_a_wave_does_not_wait_for_other_gates() -> None:
    before = result(hf=1.2)
    decisions = {"hf": decide(good("hf", parity=2.0), THRESHOLDS, ("click", "save"))}
    assert not decisions["hf"].passed
    assert may_start(2, replace(before, decisions=decisions)) == []
