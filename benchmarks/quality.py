"""What unifying pays: every arm on the same rows, with seeds and paired intervals over users.

    python -m benchmarks.quality --data KUAIRAND_LOG --arms unified merged separate --seeds 3 --backtest-days 3

Rolling backtest: for each of the last days d, a model is trained on the days up to d-2 and scored on d; metrics are
taken per day and averaged, and averaged over seeds within each resample of the users. The trivial baseline is fit on
the same training days. Finished runs are kept in --work and reused while their configuration is the same, so a
benchmark that was cut off goes on.

What it does not show: later days, other logs, the spread between seeds (intervals are over users), and ads: KuaiRand
is a feed of short videos.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from benchmarks import simulated
from benchmarks.common import Report
from pipeline.config import DaysConfig, RunConfig, config_from_json, config_to_json
from pipeline.errors import ConfigError, unknown

if TYPE_CHECKING:
    from pipeline.evaluate.boosted_trees import BoostedTreesConfig
    from pipeline.evaluate.predictions import Predictions

Arm = tuple[Callable[[], RunConfig], ...]

# Knobs of a run that do not touch what it learns on one rank.
HOUSEKEEPING = ("bootstrap_resamples", "checkpoint", "log_steps", "sharding", "timeout_s")
# The arm that is no model of ours (beside its tuned form): LightGBM on the unified recipe's numbers.
BOOSTED_TREES = "boosted_trees"


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path | None = None
    """Folder of the log that `trefoil ingest kuairand` wrote; without it nothing is measured, and says so."""
    arms: tuple[str, ...] = ("unified", "merged", "separate")
    """What to compare; the first is the reference."""
    seeds: int = 3
    """Seeds of each arm."""
    backtest_days: int = 3
    """Last days of the log that are each tested."""
    task: str = "click"
    """Task of the headline figures."""
    work: Path = Path("runs/quality")
    """Where finished runs are kept."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    resamples: int = 1000
    """Resamples of users behind each interval."""
    simulated: bool = False
    """Measure simulated logs too, as `python -m benchmarks.simulated` does without flags of its own."""
    quick: bool = False
    """One seed, one day, fewer resamples: does it run, not what is true."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model: an arm's part, a seed and a test day."""

    arm: str
    config: RunConfig
    day: str
    data: Path
    out: Path
    trees: BoostedTreesConfig | None = None
    """Boosted trees with these settings, in place of a model."""


def arms() -> dict[str, Arm]:
    """The arms by name; one of several recipes puts models of single surfaces together."""
    from pipeline.recipes import kuairand as recipes
    from pipeline.recipes.kuairand_tuned import TUNED

    return {
        "unified": (recipes.kuairand,),
        "merged": (recipes.merged,),
        "separate": (recipes.separate_hf, recipes.separate_sr, recipes.separate_rp),
        "din": (recipes.din,),
        "din_released": (recipes.din_released,),
        BOOSTED_TREES: (recipes.kuairand,),
        **{name: (recipe,) for name, recipe in (recipes.PARTS | recipes.LADDER).items()},
        **recipes.ALONE,
        **TUNED,
    }


def tree_settings() -> dict[str, BoostedTreesConfig]:
    """Settings of the arms that are boosted trees."""
    from pipeline.evaluate.boosted_trees import BoostedTreesConfig
    from pipeline.recipes.kuairand_tuned import TUNED_TREES

    return {BOOSTED_TREES: BoostedTreesConfig(), **TUNED_TREES}


def plan(settings: Settings, data: Path) -> list[Run]:
    """Every run that the settings ask for.

    Raises:
        ConfigError: an arm that there is not, or more test days than the log can give.
    """
    from pipeline.data.logs import Dataset

    known, trees = arms(), tree_settings()
    days = Dataset.open(data).days
    if len(days) < settings.backtest_days + 2:
        raise ConfigError(f"{len(days)} days of log are too few for {settings.backtest_days} test days")
    runs = []
    for arm in settings.arms:
        if arm not in known:
            raise ConfigError(unknown("arm", arm, known))
        for seed in range(settings.seeds):
            for day in days[-settings.backtest_days :]:
                for recipe in known[arm]:
                    config = replace(recipe(), seed=seed, days=DaysConfig(last=day, validation=1, test=1))
                    out = settings.work / arm / f"{config.name}-{day}-{seed}.parquet"
                    runs.append(Run(arm=arm, config=config, day=day, data=data, out=out, trees=trees.get(arm)))
    return runs


def kept(run: Run) -> bool:
    """Whether a finished run of this very configuration is there. A knob that the kept run did not know of must
    stand at its default, so that a new one leaves what was measured valid."""
    record = run.out.with_suffix(".json")
    if not record.exists() or not run.out.exists():
        return False
    held = json.loads(record.read_text())
    if run.trees is not None and type(run.trees)(**held.get("trees", {})) != run.trees:
        return False
    was = config_from_json(json.dumps(held["config"]).encode(), source=str(record))
    return _learned(was) == _learned(run.config)


def _learned(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that decides what is learned."""
    whole = json.loads(config_to_json(config))
    return {name: value for name, value in whole.items() if name not in HOUSEKEEPING}


def execute(run: Run) -> str:
    """Train one model, score its test day, keep the predictions; what was kept before is not run again."""
    if kept(run):
        return f"{run.out.name}: kept"
    os.environ["OMP_NUM_THREADS"] = "1"
    from pipeline.evaluate.predictions import write_predictions

    predictions, cost = _train(run) if run.trees is None else _boost(run, run.trees)
    write_predictions(run.out, predictions)
    record = {**cost, "config": json.loads(config_to_json(run.config))}
    if run.trees is not None:
        record["trees"] = asdict(run.trees)
    run.out.with_suffix(".json").write_text(json.dumps(record, indent=1))
    return f"{run.out.name}: {cost['seconds']:.0f} s"


def _boost(run: Run, trees: BoostedTreesConfig) -> tuple[Predictions, dict[str, Any]]:
    from pipeline.data.logs import Dataset
    from pipeline.train.boosted_trees import boosted_tree_predictions

    start, start_cpu = time.perf_counter(), time.process_time()
    predictions, impressions = boosted_tree_predictions(run.config, Dataset.open(run.data), trees)
    cost = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "impressions": impressions,
        "dense_parameters": 0,
        "parameters": 0,
    }
    return predictions, cost


def _train(run: Run) -> tuple[Predictions, dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    from pipeline.data.logs import Dataset
    from pipeline.train.judge import PredictionCollector, gather
    from pipeline.train.sharding import joined
    from pipeline.train.trainer import Trainer

    start, start_cpu = time.perf_counter(), time.process_time()
    with joined() as ranks:
        dataset = Dataset.open(run.data)
        trainer = Trainer(run.config, dataset, ranks, run.out.with_suffix(".checkpoints"))
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        shutil.rmtree(trainer.folder)
        collector = PredictionCollector(run.config.surfaces, run.config.tasks)
        trainer.predict(trainer.days.validation + trainer.days.test, collector.add)
        predictions = gather(collector, run.out.with_suffix(".gathered.parquet"), ranks, dataset)
        assert predictions is not None, "one rank is the first"
        impressions = sum(p.impressions for s in run.config.surfaces for p in dataset.partitions(s, trainer.days.train))
        dense, every = trainer.dense_parameters, sum(p.numel() for p in trainer.model.parameters())
        shifts = {surface: shift.tolist() for surface, shift in trainer.shifts.items()}
    run.out.with_suffix(".gathered.parquet").unlink()
    cost = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "impressions": impressions,
        "dense_parameters": dense,
        "parameters": every,
        "shifts": shifts,
    }
    return predictions, cost


def collect(settings: Settings, data: Path, runs: list[Run]) -> dict[str, Any]:
    """Predictions by arm and seed, compared per day on identical rows."""
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.compare import compare
    from pipeline.evaluate.deciles import reliability
    from pipeline.evaluate.predictions import Predictions, read_predictions
    from pipeline.evaluate.report import as_dict, print_report
    from pipeline.train.days import split_days
    from pipeline.train.judge import trivial_predictions

    dataset = Dataset.open(data)
    by_arm: dict[str, list[Predictions]] = {}
    for arm in settings.arms:
        of_arm = [r for r in runs if r.arm == arm]
        by_arm[arm] = [
            Predictions.concat(
                [read_predictions(r.out).select(dates=(r.day,)) for r in of_arm if r.config.seed == seed]
            )
            for seed in range(settings.seeds)
        ]
    trivial = []
    for day in sorted({r.day for r in runs}):
        rows = by_arm[settings.arms[0]][0].select(dates=(day,))
        training = split_days(dataset, DaysConfig(last=day, validation=1, test=1)).train
        trivial.append(trivial_predictions(rows, dataset, training))
    compared = compare({**by_arm, "trivial": Predictions.concat(trivial)}, resamples=settings.resamples, daily=True)
    print_report(compared)
    result = as_dict(compared)
    result["deciles"] = {arm: reliability(by_arm[arm], settings.task) for arm in settings.arms}
    result["cost"] = {arm: _cost([r for r in runs if r.arm == arm], settings) for arm in settings.arms}
    return result


def _cost(runs: list[Run], settings: Settings) -> dict[str, float]:
    """Of all the arm's models together: processor seconds a seed, impressions a processor second, and parameters of
    the models of one day. Processor seconds, as the machine may be busy."""
    costs = [json.loads(r.out.with_suffix(".json").read_text()) for r in runs]
    seconds, groups = sum(c["cpu_seconds"] for c in costs), settings.seeds * settings.backtest_days
    return {
        "cpu_seconds_per_seed": seconds / settings.seeds,
        "impressions_per_cpu_second": sum(c["impressions"] for c in costs) / seconds,
        "dense_parameters": sum(c["dense_parameters"] for c in costs) / groups,
        "parameters": sum(c["parameters"] for c in costs) / groups,
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.quick:
        settings = replace(settings, seeds=1, backtest_days=1, resamples=100)
    report = Report("quality", settings)
    figures: dict[str, Any] = {}
    if settings.data is None:
        figures["skipped"] = "KuaiRand: give --data, a log written by `trefoil ingest kuairand`"
    else:
        figures |= kuairand_figures(settings, settings.data)
    if settings.simulated:
        figures |= simulated.simulated_figures(simulated.Settings(jobs=settings.jobs, quick=settings.quick))
    report.finish(figures)


def kuairand_figures(settings: Settings, data: Path) -> dict[str, Any]:
    """All figures of the real log: the headline ones by name, and everything that `collect` finds."""
    runs = plan(settings, data)
    context = multiprocessing.get_context("spawn")
    with context.Pool(settings.jobs, maxtasksperchild=1) as pool:
        for done, line in enumerate(pool.imap_unordered(execute, runs), 1):
            print(f"{done}/{len(runs)} {line}", file=sys.stderr, flush=True)
    result = collect(settings, data, runs)
    reference = settings.arms[0]
    figures: dict[str, Any] = {"kuairand_backtest_macro_auc": result["macro_auc"][reference][settings.task][0]}
    for arm in settings.arms[1:]:
        value, low, high = result["macro_auc_differences"][arm][settings.task]
        figures[f"kuairand_{reference}_minus_{arm}"] = [-value, -high, -low]
    return {**figures, **result}


if __name__ == "__main__":
    main()
