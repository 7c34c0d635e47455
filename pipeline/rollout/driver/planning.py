"""A plan from measured costs: the separate model of each surface and the unified one, untrained, timed in turn."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError
from pipeline.recipes import find
from pipeline.rollout.costs import MEASURE, CostProfile, Staging, predict, stage
from pipeline.rollout.driver.models import export_all, first_weights
from pipeline.rollout.meter import batch, cost_profile, mean_shape, time_in_turn
from pipeline.rollout.plan import CanaryPlan, RolloutPlan, SurfacePlan, Thresholds, Wave
from pipeline.rollout.waves import Serving, separate
from pipeline.serve.scorer import Scorer

FIRST_WAVE = ("merged", "projection", "broadcast", "int8", "towers", "multi_task", "calibration")
LATER_WAVE = ("merged", "carried", "warm_start")
_P99_SLACK = 2.0  # over what growth allows, so that the envelope is of the product, not of one afternoon's noise


def make_plan(
    recipe: str,
    data: Path,
    *,
    evaluation_days: int,
    replay_days: int,
    matched_within: float,
    thresholds: Thresholds,
    canary: CanaryPlan,
    console: Console,
) -> tuple[RolloutPlan, Staging]:
    """Measure the costs of a recipe's separate and unified models on a log, and plan its waves.

    Args:
        recipe: of the unified model.
        data: folder of the log.
        evaluation_days: how many days the gates judge on.
        replay_days: how many days after them the canary replays.
        matched_within: greatest ratio of costs that match.
        thresholds: of the gates; its `p99_ms` is filled in from what was measured where it is empty.
        canary: of the replay.
        console: told of progress.

    Raises:
        ConfigError: too few days, or the recipe or a number is of no use.
        DataError: the log is damaged, or lacks a surface of the recipe.
    """
    dataset = Dataset.open(data)
    if evaluation_days < 1 or replay_days < 1 or len(dataset.days) < evaluation_days + replay_days + 1:
        raise ConfigError(
            f"the log has {len(dataset.days)} days; {evaluation_days} to judge on and {replay_days} to replay must be "
            "at least 1 each and leave one to train on"
        )
    last = len(dataset.days) - replay_days
    days = {"evaluation_days": dataset.days[last - evaluation_days : last], "replay_days": dataset.days[last:]}
    apart, unified, shapes = measure_costs(
        recipe, dataset, days["evaluation_days"], unique_users=thresholds.unique_users, console=console
    )
    costs = {surface: of.ms for surface, of in apart.items()}
    staging = stage(costs, within=matched_within)
    predicted = predict(staging.waves, apart, unified)
    waves = tuple(
        Wave(
            surfaces=surfaces,
            steps=FIRST_WAVE if i == 0 else LATER_WAVE,
            predicted_ms={s: float(f"{ms:.4g}") for s, ms in of.items()},
            why=why,
        )
        for i, (surfaces, of, why) in enumerate(zip(staging.waves, predicted, staging.reasons, strict=True))
    )
    growth = thresholds.cost_growth * _P99_SLACK
    limits = thresholds.p99_ms or {s: float(f"{growth * of.p99_ms:.3g}") for s, of in apart.items()}
    plan = RolloutPlan(
        format_version=1,
        recipe=recipe,
        dataset=dataset.fingerprint,
        measure=MEASURE,
        matched_within=matched_within,
        staging=staging.pointless or f"staging pays: {len(waves)} waves, because the costs of surfaces differ",
        surfaces={
            s: SurfacePlan(
                candidates=shapes[s][0],
                history=shapes[s][1],
                separate_ms=float(f"{of.ms:.4g}"),
                unified_ms=float(f"{unified[s].ms:.4g}"),
                separate_p99_ms=float(f"{of.p99_ms:.4g}"),
            )
            for s, of in apart.items()
        },
        waves=waves,
        thresholds=replace(thresholds, p99_ms=limits),
        canary=canary,
        **days,
    )
    return plan, staging


def measure_costs(
    recipe: str, dataset: Dataset, days: tuple[str, ...], *, unique_users: int, console: Console
) -> tuple[dict[str, CostProfile], dict[str, CostProfile], dict[str, tuple[int, int]]]:
    """Profiles of the separate models and of the unified one by surface, and each surface's shape.

    Both are served in the same way (fp32, request-level broadcasting), so that their ratio is that of the models.
    """
    base = find(recipe)()
    serving = Serving(broadcast=True)
    sizes = {s: sum(p.requests for p in dataset.partitions(s)) for s in base.surfaces}
    shapes = {s: mean_shape(dataset, s, days) for s in base.surfaces}
    folder = Path(tempfile.mkdtemp(prefix="trefoil-costs-"))
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    try:
        console.print("measuring what the separate models and the unified one cost (untrained: weights cost nothing)")
        whole = first_weights(base, dataset, folder / "unified")
        for surface, (candidates, history) in shapes.items():
            alone = first_weights(
                separate(base, surface, sizes[surface] / sum(sizes.values())), dataset, folder / surface
            )
            for kind, checkpoint in (("separate", alone), ("unified", whole)):
                paths = export_all(
                    checkpoint, (surface,), serving, folder / kind, None, days=(), unique_users=unique_users
                )
                runs[surface, kind] = batch(Scorer.open(paths[surface]), candidates=candidates, history=history)
        # All in turn: the costs of surfaces are compared with one another.
        times = time_in_turn(runs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    apart, unified = (
        {
            s: cost_profile(times[s, kind], candidates=candidates, history=history)
            for s, (candidates, history) in shapes.items()
        }
        for kind in ("separate", "unified")
    )
    return apart, unified, shapes
