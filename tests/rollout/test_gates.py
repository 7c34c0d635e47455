"""Gates: each bound by a hand-made case, and what must hold for any measurements whatever."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rollout.gates import Decision, decide, decide_all
from pipeline.rollout.measurements import (
    MEASUREMENTS,
    CostMeasurements,
    FeatureMeasurements,
    Interval,
    Slice,
    SurfaceMeasurements,
    TaskMeasurements,
)
from tests.rollout.plans import SURFACES, THRESHOLDS, around, good

TASKS = ("click", "save")


def failed(measured: SurfaceMeasurements) -> set[tuple[str, str]]:
    """Gates and subjects that stop the challenger."""
    return {(v.gate, v.subject) for v in decide(measured, THRESHOLDS, TASKS).failures}


def with_task(**changes: Any) -> SurfaceMeasurements:
    """Good but for the click task."""
    base = good()
    return replace(base, tasks=base.tasks | {"click": replace(base.tasks["click"], **changes)})


def test_good_measurements_pass() -> None:
    decision = decide(good(), THRESHOLDS, TASKS)
    assert decision.passed
    assert decision.failures == ()
    assert len(decision.verdicts) == 2 * 7 + 1 + 4 + 2


@pytest.mark.parametrize(
    ("changes", "stopped_by"),
    [
        ({"auc_difference": Interval(value=0.0, low=-0.0101, high=0.01)}, "auc"),
        ({"ne_difference": Interval(value=0.0, low=-0.02, high=0.021)}, "ne"),
        ({"calibration": around(1.11)}, "calibration"),
        ({"calibration": around(0.89)}, "calibration"),
    ],
)
def test_a_task_past_its_bound(changes: dict[str, Any], stopped_by: str) -> None:
    assert failed(with_task(**changes)) == {(stopped_by, "click")}


def test_inferior_by_less_than_the_margin_passes() -> None:
    # NE is better, so the gain gate is content.
    assert failed(with_task(auc_difference=Interval(value=-0.004, low=-0.0099, high=0.002))) == set()


def test_slices() -> None:
    slices = dict(good().tasks["click"].slices or {})

    def after(**parts: Slice) -> set[tuple[str, str]]:
        return failed(with_task(slices=slices | {"ads": parts}))

    off = Slice(positives=100, rows=900, calibration=around(1.4, 0.1))
    assert after(old=off) == {("calibration by ads", "click")}
    # Too few to judge, and an interval that reaches into the bounds.
    assert after(new=replace(off, positives=19)) == set()
    assert after(new=replace(off, calibration=around(1.4, 0.2))) == set()
    assert after(new=replace(off, calibration=None)) == {("calibration by ads", "click")}
    del slices["day"]
    assert failed(with_task(slices=slices)) == {("calibration by day", "click")}


@pytest.mark.parametrize(
    ("changes", "stopped_by"),
    [
        ({"cost": replace(good().cost, over_separate=1.51)}, "cost"),
        ({"cost": replace(good().cost, p99_ms=30.1)}, "p99"),
        ({"parity": 1.01}, "parity"),
        ({"unique_users": 15}, "unique users"),
        (
            {"features": {"a": FeatureMeasurements(coverage_training=0.9, coverage_evaluation=0.84, drift=0)}},
            "coverage",
        ),
        ({"features": {"a": FeatureMeasurements(coverage_training=1, coverage_evaluation=1, drift=0.26)}}, "drift"),
    ],
)
def test_a_surface_past_its_bound(changes: dict[str, Any], stopped_by: str) -> None:
    assert failed(good(**changes)) == {(stopped_by, "")}


def test_drift_that_is_meant_is_ignored() -> None:
    moved = FeatureMeasurements(coverage_training=1, coverage_evaluation=1, drift=3.0)
    assert failed(good(features={"ad_age_days": moved})) == set()


def test_better_in_nothing_is_stopped() -> None:
    same = replace(good().tasks["click"], auc_difference=around(0.0), ne_difference=around(0.0))
    assert failed(good(tasks={"click": same, "save": same})) == {("gain", "")}
    cheaper = replace(good().cost, over_champion=0.8)
    assert failed(good(tasks={"click": same, "save": same}, cost=cheaper)) == set()
    # A little cheaper is the clock's luck.
    luck = replace(good().cost, over_champion=0.95)
    assert failed(good(tasks={"click": same, "save": same}, cost=luck)) == {("gain", "")}


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize(
    ("owner", "name", "gate"),
    [
        ("task", "auc_difference", "auc"),
        ("task", "ne_difference", "ne"),
        ("task", "calibration", "calibration"),
        ("cost", "over_separate", "cost"),
        ("cost", "p99_ms", "p99"),
        ("surface", "parity", "parity"),
    ],
)
def test_what_was_not_measured_fails(owner: str, name: str, gate: str, missing: float | None) -> None:
    if owner == "task":
        value = None if missing is None else Interval(value=missing, low=missing, high=missing)
        assert failed(with_task(**{name: value})) == {(gate, "click")}
    elif owner == "cost":
        assert failed(good(cost=replace(good().cost, **{name: missing}))) == {(gate, "")}
    else:
        assert failed(good(**{name: missing})) == {(gate, "")}


def test_nothing_measured_fails_every_gate_but_none_twice() -> None:
    decision = decide(SurfaceMeasurements(surface="hf", tasks={}), THRESHOLDS, TASKS)
    assert all(not v.passed for v in decision.verdicts)
    assert len({(v.gate, v.subject) for v in decision.verdicts}) == len(decision.verdicts)


# Any measurements whatever, nonsense and gaps included.
number = st.none() | st.floats(-2, 3) | st.just(float("nan"))
interval = st.none() | st.builds(Interval, value=number, low=number, high=number)
part = st.builds(Slice, positives=st.integers(0, 200), rows=st.integers(0, 999), calibration=interval)
slices = st.none() | st.fixed_dictionaries(
    {},
    optional={k: st.dictionaries(st.sampled_from("ab"), part, max_size=2) for k in ("decile", "users", "ads", "day")},
)
task = st.builds(TaskMeasurements, auc_difference=interval, ne_difference=interval, calibration=interval, slices=slices)
cost = st.builds(CostMeasurements, over_separate=number, over_champion=number, p99_ms=number)
feature = st.builds(FeatureMeasurements, coverage_training=number, coverage_evaluation=number, drift=number)


def measurements(surface: str = "hf") -> st.SearchStrategy[SurfaceMeasurements]:
    return st.builds(
        SurfaceMeasurements,
        surface=st.just(surface),
        tasks=st.dictionaries(st.sampled_from(TASKS), task),
        cost=cost,
        parity=number,
        unique_users=st.none() | st.integers(0, 99),
        features=st.none() | st.dictionaries(st.sampled_from(["age", "ad_age_days"]), feature),
    )


@given(
    st.lists(st.tuples(st.floats(-1, 0), st.floats(0, 1)), min_size=2, max_size=2),
    st.floats(1, 3),
    st.floats(0, 0.01),
)
def test_worse_on_every_count_is_never_promoted(
    differences: list[tuple[float, float]], cost_ratio: float, half: float
) -> None:
    """However small the harm, and however fine everything else: no AUC above, no NE below, no lower cost."""
    tasks = {
        name: replace(good().tasks["click"], auc_difference=around(auc, half), ne_difference=around(ne, half))
        for name, (auc, ne) in zip(TASKS, differences, strict=True)
    }
    measured = good(tasks=tasks, cost=replace(good().cost, over_champion=cost_ratio))
    assert not decide(measured, THRESHOLDS, TASKS).passed


@given(measurements())
def test_a_pass_means_that_every_measurement_was_there(measured: SurfaceMeasurements) -> None:
    decision = decide(measured, THRESHOLDS, TASKS)
    assert decision == decide(measured, THRESHOLDS, tuple(reversed(TASKS)))
    assert decision.passed == all(v.passed for v in decision.verdicts)
    if decision.passed:
        assert measured.parity is not None
        assert measured.features
        assert set(TASKS) <= set(measured.tasks)


@given(st.tuples(*(measurements(s) for s in SURFACES)), st.permutations(SURFACES), measurements("sr"))
def test_surfaces_do_not_touch_each_other(
    measured: tuple[SurfaceMeasurements, ...], order: list[str], other: SurfaceMeasurements
) -> None:
    by_surface = dict(zip(SURFACES, measured, strict=True))
    decisions = decide_all(by_surface, THRESHOLDS, TASKS)
    assert decide_all({s: by_surface[s] for s in order}, THRESHOLDS, TASKS) == decisions
    # Whatever becomes of sr, the others' decisions are what they were.
    changed = decide_all(by_surface | {"sr": other}, THRESHOLDS, TASKS)
    assert {s: d for s, d in changed.items() if s != "sr"} == {s: d for s, d in decisions.items() if s != "sr"}


@given(measurements(), st.sampled_from([f.name for f in fields(CostMeasurements)]))
def test_a_measurement_taken_away_never_helps(measured: SurfaceMeasurements, name: str) -> None:
    before = decide(measured, THRESHOLDS, TASKS)
    after = decide(replace(measured, cost=replace(measured.cost, **{name: None})), THRESHOLDS, TASKS)
    assert before.passed or not after.passed


def test_measurements_survive_json() -> None:
    measured = with_task(calibration=Interval(value=None, low=None, high=None))
    assert MEASUREMENTS.validate_json(MEASUREMENTS.dump_json(measured)) == measured
    decision: Decision = decide(measured, THRESHOLDS, TASKS)
    assert decide(MEASUREMENTS.validate_json(MEASUREMENTS.dump_json(measured)), THRESHOLDS, TASKS) == decision
