"""A wave's result made by hand, for the report and the rules that read results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.recipes import find
from pipeline.rollout.gates import decide
from pipeline.rollout.measurements import CostMeasurements, Interval
from pipeline.rollout.results import Curve, RungResult, WaveResult
from pipeline.rollout.waves import climb, dated, merged
from tests.rollout.plans import THRESHOLDS, around, good, plan

TASKS = ("click", "save")


def wave_result(**changes: Any) -> WaveResult:
    """Wave 1 of the test plan: hf passed, sr was stopped by its cost."""
    measured = {
        "hf": good("hf"),
        "sr": good("sr", cost=replace(good().cost, over_separate=1.7, over_separate_interval=(1.6, 1.9))),
    }
    base = dated(find("demo_staged")(), plan())
    first = merged(base, ("hf", "sr"))
    second = climb(first, "towers", base)
    difference = {
        s: {"click": {"auc": Interval(value=0.004, low=0.001, high=0.007), "ne": around(-0.002)}} for s in measured
    }
    rungs = tuple(
        RungResult(
            step=step,
            kept=kept,
            reason=reason,
            config=rung.config,
            serving=rung.serving,
            checkpoint=f"{step}/checkpoints/epoch-1-step-00000000",
            artifacts={s: f"{step}/artifacts/{s}-fp32" for s in measured},
            auc={s: {"click": around(0.7)} for s in measured},
            differences=found,
            cost={s: CostMeasurements(ms=1.1, ms_interval=(1.05, 1.2)) for s in measured},
        )
        for step, rung, kept, reason, found in (
            ("merged", first, True, "the start", {}),
            ("towers", second, False, "worse: <b>sr</b>", difference),
        )
    )
    curve = Curve(mean_p=[0.05, 0.2], mean_label=[0.06, 0.18], low=[0.04, 0.15], high=[0.09, 0.22])
    result = WaveResult(
        wave=1,
        plan=plan().digest,
        dataset=plan().dataset,
        evaluation_days=plan().evaluation_days,
        code="abc123",
        run="run-1",
        rungs=rungs,
        measurements=measured,
        decisions={s: decide(m, THRESHOLDS, TASKS) for s, m in measured.items()},
        champions={"hf": 1, "sr": None},
        champion_auc={s: {"click": around(0.69)} for s in measured},
        versions={"hf": 2},
        artifacts={s: f"merged/artifacts/{s}-fp32" for s in measured},
        separate_cost={s: CostMeasurements(ms=1.0) for s in measured},
        champion_cost={s: CostMeasurements(ms=1.0) for s in measured},
        curves={s: {t: {"challenger": curve, "champion": curve} for t in TASKS} for s in measured},
    )
    return replace(result, **changes)
