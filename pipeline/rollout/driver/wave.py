"""One wave: climb its ladder, measure its challengers, let the gates decide, keep the evidence, register."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from pipeline.config import default_home
from pipeline.errors import ConfigError
from pipeline.evaluate.predictions import Predictions
from pipeline.job import code_version
from pipeline.rollout import waves
from pipeline.rollout.driver.context import REPORT, Context, wave_folder
from pipeline.rollout.driver.ladder import Ladder
from pipeline.rollout.driver.measure import measure_surface, separate_artifact, time_surface
from pipeline.rollout.driver.models import Built, export_all, score_all, train
from pipeline.rollout.driver.publication import champion_artifact, keep_evidence, register_passed
from pipeline.rollout.gates import Decision, decide
from pipeline.rollout.measurements import CostMeasurements, Interval, SurfaceMeasurements
from pipeline.rollout.registry import CHAMPION, Registry, Version
from pipeline.rollout.report import write_report
from pipeline.rollout.results import RESULT, WAVE_RESULT, Curve, RungResult, WaveResult, may_start, read_result
from pipeline.rollout.waves import Rung, Serving
from pipeline.tracking import Tracker
from pipeline.train.judge import trivial_predictions


def run_wave(context: Context) -> WaveResult:
    """Run a wave to its decisions, or return what it came to before. What was begun is gone on with.

    Raises:
        ConfigError: the wave may not start yet, with every reason.
        TrefoilError: training, export or registration failed; surfaces registered before it stay so.
    """
    plan, number, console = context.plan, context.number, context.console
    done = read_result(context.folder, plan)
    if done is not None:
        console.print(f"wave {number} has ended before; its report is {context.folder / REPORT}")
        return done
    before = read_result(wave_folder(context.out, number - 1), plan) if number else None
    if reasons := may_start(number, before):
        raise ConfigError(f"wave {number} may not start:\n  - " + "\n  - ".join(reasons))
    Registry(default_home()).surfaces()  # one clear error now, not after an hour of training
    context.folder.mkdir(parents=True, exist_ok=True)
    what = "the separate models" if number == 0 else f"steps {', '.join(plan.wave(number).steps)}"
    console.print(f"wave {number}: {', '.join(context.surfaces)}; {what}")
    tracker = Tracker.start(
        f"wave-{number}",
        run_dir=context.folder,
        root=default_home(),
        experiment=context.experiment,
        tags={
            "kind": "wave",
            "wave": str(number),
            "plan": plan.digest,
            "dataset": plan.dataset,
            "surfaces": ",".join(context.surfaces),
        },
        rank=0,
    )
    with tracker:
        result = _measure_and_decide(context, before, tracker)
        (context.folder / RESULT).write_bytes(WAVE_RESULT.dump_json(result, indent=1))
        write_report(result, plan, context.folder / REPORT)
        for name in (RESULT, REPORT):
            tracker.log_artifact(context.folder / name)
    console.print(f"report: {context.folder / REPORT}")
    return result


def _measure_and_decide(context: Context, before: WaveResult | None, tracker: Tracker) -> WaveResult:
    rungs: tuple[RungResult, ...] = ()
    built: tuple[Built, ...] = ()
    if context.number == 0:
        challengers = _separate_models(context, tracker)
    else:
        assert before is not None, "may_start has seen it"
        ladder = Ladder(context, before, tracker.key)
        ladder.climb()
        challengers = dict.fromkeys(context.surfaces, ladder.current)
        rungs, built = tuple(ladder.rungs), tuple(ladder.built)
    registry = Registry(default_home())
    champions = {s: registry.get(s, CHAMPION) for s in context.surfaces}
    measurements: dict[str, SurfaceMeasurements] = {}
    decisions: dict[str, Decision] = {}
    champion_auc: dict[str, dict[str, Interval]] = {}
    curves: dict[str, dict[str, dict[str, Curve]]] = {}
    times: dict[str, dict[str, CostMeasurements]] = {}
    for surface in context.surfaces:
        model, champion = challengers[surface], champions[surface]
        times[surface] = time_surface(context, surface, model, built, champion)
        rival = _rival(context, surface, model, champion)
        measured, champion_auc[surface], curves[surface] = measure_surface(
            context, surface, model, rival, times[surface]["challenger"]
        )
        measurements[surface] = measured
        decisions[surface] = decide(measured, context.plan.thresholds, context.base.tasks)
    artifacts = {s: challengers[s].artifacts[s] for s in context.surfaces}
    result = WaveResult(
        wave=context.number,
        plan=context.plan.digest,
        dataset=context.plan.dataset,
        evaluation_days=context.plan.evaluation_days,
        code=code_version(),
        run=tracker.run_id or tracker.key or "",
        rungs=tuple(_with_cost(rung, times) for rung in rungs),
        measurements=measurements,
        decisions=decisions,
        champions={s: None if v is None else v.version for s, v in champions.items()},
        champion_auc=champion_auc,
        versions={},
        artifacts={s: str(path.relative_to(context.folder)) for s, path in artifacts.items()},
        separate_cost={s: of["separate"] for s, of in times.items()},
        champion_cost={s: of["champion"] for s, of in times.items()},
        curves=curves,
    )
    versions = {}
    for surface in context.surfaces:
        evidence = keep_evidence(context, result, surface, parent=tracker.key)
        tell(decisions[surface], context.console)
        if decisions[surface].passed:
            versions[surface] = register_passed(context, surface, artifacts[surface], evidence, parent=tracker.key)
    return replace(result, versions=versions)


def _separate_models(context: Context, tracker: Tracker) -> dict[str, Built]:
    """Wave 0: the separate model of each surface, as it serves before any unification."""
    sizes = {s: sum(p.requests for p in context.dataset.partitions(s)) for s in context.surfaces}
    serving = Serving(broadcast=True)
    days, users = context.plan.evaluation_days, context.plan.thresholds.unique_users
    made = {}
    for surface in context.surfaces:
        config = waves.separate(context.base, surface, sizes[surface] / sum(sizes.values()))
        folder = context.folder / surface
        path = train(config, context.data, folder, parent=tracker.key, wave=0, warm=None, console=context.console)
        artifacts = export_all(
            path, (surface,), serving, folder / "artifacts", context.dataset, days=days, unique_users=users
        )
        rung = Rung(config=config, serving=serving)
        scored = score_all(artifacts, context.dataset, days)
        made[surface] = Built(rung=rung, checkpoint=path, artifacts=artifacts, scored=scored)
    return made


def _rival(context: Context, surface: str, model: Built, champion: Version | None) -> Predictions:
    """Scores that a challenger is compared with: the champion's; where nothing serves, those of the separate model,
    or in wave 0 of the trivial baseline."""
    if champion is not None or context.number:
        path = champion_artifact(surface, context.out) if champion is not None else separate_artifact(context, surface)
        return score_all({surface: path}, context.dataset, context.plan.evaluation_days)[surface]
    return trivial_predictions(model.scored[surface], context.dataset, context.training_days)


def _with_cost(rung: RungResult, times: dict[str, dict[str, CostMeasurements]]) -> RungResult:
    return replace(rung, cost={s: of[rung.step] for s, of in times.items() if rung.step in of})


def tell(decision: Decision, console: Console) -> None:
    """Print a decision, with the reason of every gate that did not pass."""
    failures = decision.failures
    if decision.passed:
        console.print(f"  {decision.surface}: passed all {len(decision.verdicts)} gates", style="green")
        return
    console.print(f"  {decision.surface}: stopped by {len(failures)} of {len(decision.verdicts)} gates", style="red")
    for verdict in failures:
        console.print(f"    {verdict}", soft_wrap=True)
