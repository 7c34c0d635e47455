"""A small plan and measurements that pass it, for tests to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.rollout.costs import MEASURE, CostProfile, stage
from pipeline.rollout.measurements import (
    CostMeasurements,
    FeatureMeasurements,
    Interval,
    Slice,
    SurfaceMeasurements,
    TaskMeasurements,
)
from pipeline.rollout.plan import CanaryPlan, RolloutPlan, SurfacePlan, Thresholds, Wave

SURFACES = ("hf", "sr", "rp")
COSTS = {"hf": 1.0, "sr": 1.2, "rp": 3.0}

THRESHOLDS = Thresholds(
    auc_margin=0.01,
    ne_margin=0.02,
    calibration=(0.9, 1.1),
    slice_calibration=(0.8, 1.25),
    slice_positives=20,
    cost_growth=1.5,
    cost_gain=0.9,
    p99_ms={"hf": 30.0, "sr": 30.0, "rp": 90.0},
    unique_users=16,
    coverage_drop=0.05,
    drift=0.25,
    drift_ignored=("ad_age_days",),
)
CANARY = CanaryPlan(share=0.5, salt="test", looks=10, alpha=0.05, loss_margin=0.002, calibration=(0.8, 1.25))


def profiles(costs: dict[str, float] | None = None) -> dict[str, CostProfile]:
    """Profiles of one shape with the given costs."""
    return {
        s: CostProfile(candidates=4, history=20, requests=16, ms=ms, p99_ms=20 * ms)
        for s, ms in (costs or COSTS).items()
    }


def plan(**changes: Any) -> RolloutPlan:
    """Two waves: hf and sr, then rp."""
    staging = stage(COSTS, within=1.5)
    whole = RolloutPlan(
        format_version=1,
        recipe="demo",
        dataset="0123456789abcdef",
        evaluation_days=("2026-01-10", "2026-01-11"),
        replay_days=("2026-01-12",),
        measure=MEASURE,
        matched_within=1.5,
        staging="costs differ",
        surfaces={
            s: SurfacePlan(candidates=4, history=20, separate_ms=ms, unified_ms=1.1 * ms, separate_p99_ms=20 * ms)
            for s, ms in COSTS.items()
        },
        waves=tuple(
            Wave(
                surfaces=surfaces,
                steps=("merged", "towers") if i == 0 else ("merged", "carried", "warm_start"),
                predicted_ms=dict(COSTS),
                why=reason,
            )
            for i, (surfaces, reason) in enumerate(zip(staging.waves, staging.reasons, strict=True))
        ),
        thresholds=THRESHOLDS,
        canary=CANARY,
    )
    return replace(whole, **changes)


def around(value: float, half: float = 0.001) -> Interval:
    """An interval."""
    return Interval(value=value, low=value - half, high=value + half)


def good(surface: str = "hf", **changes: Any) -> SurfaceMeasurements:
    """Measurements that pass every gate."""
    task = TaskMeasurements(
        auc=around(0.7),
        ne=around(0.9),
        auc_difference=around(0.004),
        ne_difference=around(-0.003),
        calibration=around(1.02),
        slices={
            kind: {"a": Slice(positives=100, rows=1000, calibration=around(1.05, 0.1))}
            for kind in ("decile", "users", "ads", "day")
        },
    )
    measured = SurfaceMeasurements(
        surface=surface,
        tasks={"click": task, "save": task},
        cost=CostMeasurements(ms=1.0, p99_ms=20.0, requests_per_second=1000.0, over_separate=1.1, over_champion=1.1),
        parity=0.3,
        unique_users=256,
        features={"age": FeatureMeasurements(coverage_training=0.9, coverage_evaluation=0.89, drift=0.02)},
    )
    return replace(measured, **changes)
