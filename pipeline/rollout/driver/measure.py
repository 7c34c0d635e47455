"""Every measurement of one surface's challenger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.evaluate.compare import compare
from pipeline.evaluate.metrics import deciles, wilson
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout.driver.context import Context, wave_folder
from pipeline.rollout.driver.models import Built
from pipeline.rollout.driver.publication import champion_artifact
from pipeline.rollout.features import feature_measurements
from pipeline.rollout.measurements import CostMeasurements, Interval, SurfaceMeasurements
from pipeline.rollout.meter import batch, cost_measurements, time_in_turn
from pipeline.rollout.quality import CHALLENGER, CHAMPION, interval, mark_new, task_measurements
from pipeline.rollout.registry import Version
from pipeline.rollout.results import Curve, read_result
from pipeline.rollout.waves import Serving
from pipeline.serve.artifact import ArtifactInfo, open_artifact
from pipeline.serve.parity import TOLERANCES
from pipeline.serve.scorer import Scorer

_SEPARATE = "separate"


def time_surface(
    context: Context, surface: str, model: Built, tried: Sequence[Built], champion: Version | None
) -> dict[str, CostMeasurements]:
    """Costs on a surface of the separate model, the champion, the challenger and every step of the ladder.

    All are timed in turn in one process. The steps' names are keys beside `separate`, `champion` and `challenger`.
    """
    of = context.plan.surfaces[surface]
    served = Serving(broadcast=True)
    artifacts = {"challenger": (model.artifacts[surface], model.rung.serving)}
    separate = separate_artifact(context, surface) if context.number else model.artifacts[surface]
    artifacts[_SEPARATE] = (separate, served)
    if champion is not None:
        artifacts[CHAMPION] = (champion_artifact(surface, context.out), served)
    steps = context.plan.wave(context.number).steps if context.number else ()
    artifacts |= {step: (made.artifacts[surface], made.rung.serving) for step, made in zip(steps, tried, strict=True)}
    # One artifact, served in one way, is timed once, whatever it is called.
    names: dict[tuple[str, bool], str] = {}
    runs = {}
    for name, (path, serving) in artifacts.items():
        key = (str(path.resolve()), serving.broadcast)
        if key not in names:
            names[key] = name
            runs[name] = batch(
                Scorer.open(path), candidates=of.candidates, history=of.history, broadcast=serving.broadcast
            )
    times = time_in_turn(runs)
    all_times = {
        name: times[names[str(path.resolve()), serving.broadcast]] for name, (path, serving) in artifacts.items()
    }
    champions = all_times.get(CHAMPION, all_times[_SEPARATE])
    found = {n: cost_measurements(t, all_times[_SEPARATE], champions) for n, t in all_times.items()}
    return {CHAMPION: found[_SEPARATE]} | found


def separate_artifact(context: Context, surface: str) -> Path:
    """The artifact of the surface's separate model, which wave 0 made.

    Raises:
        ConfigError: wave 0 has not run.
    """
    folder = wave_folder(context.out, 0)
    result = read_result(folder, context.plan)
    if result is None:
        raise ConfigError("wave 0 has not run: `trefoil rollout run --wave 0` makes the separate models")
    return folder / result.artifacts[surface]


def measure_surface(
    context: Context, surface: str, model: Built, rival: Predictions, cost: CostMeasurements
) -> tuple[SurfaceMeasurements, dict[str, Interval], dict[str, dict[str, Curve]]]:
    """All measurements, what the rival's AUC is by task, and reliability curves by task of both.

    Args:
        context: of the wave.
        surface: which.
        model: the challenger.
        rival: the champion's scores of the same rows.
        cost: of the challenger.
    """
    days = context.plan.evaluation_days
    info = open_artifact(model.artifacts[surface])
    scored = mark_new(model.scored[surface], context.dataset, context.training_days)
    tasks = context.base.tasks
    measured = SurfaceMeasurements(
        surface=surface,
        tasks=task_measurements(scored, rival, tasks, resamples=context.resamples),
        cost=cost,
        parity=parity_share(info),
        unique_users=info.signature.max_requests,
        features=feature_measurements(info.signature, context.dataset, context.training_days, days),
    )
    alone = compare({CHAMPION: rival}, resamples=context.resamples).scores[CHAMPION][surface]
    curves = {
        task: {
            name: _curve(of, surface, task)
            for name, of in ((CHALLENGER, scored), (CHAMPION, rival))
            if task in of.tasks
        }
        for task in tasks
    }
    return measured, {task: interval(of["auc"]) for task, of in alone.items()}, curves


def parity_share(info: ArtifactInfo) -> float | None:
    """The largest of an artifact's differences to its trainer, each over what its table type allows."""
    bound = TOLERANCES[info.signature.dtype]
    limits = {"largest_difference": bound.largest, "mean_difference": bound.mean, "mean_drift": bound.drift}
    shares = [
        abs(float(values[name])) / limit
        for values in info.read("parity.json")["tasks"].values()
        for name, limit in limits.items()
        if limit is not None
    ]
    return max(shares, default=None)


def _curve(predictions: Predictions, surface: str, task: str) -> Curve:
    table = deciles(predictions.rows(surface, task))
    low, high = wilson(table.mean_label, table.effective)
    return Curve(
        mean_p=table.mean_p.tolist(), mean_label=table.mean_label.tolist(), low=low.tolist(), high=high.tolist()
    )
