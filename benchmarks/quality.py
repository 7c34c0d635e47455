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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Report
from pipeline.config import DaysConfig, RunConfig
from pipeline.errors import ConfigError, unknown

Arm = tuple[Callable[[], RunConfig], ...]


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


def arms() -> dict[str, Arm]:
    """The arms by name; one of several recipes puts models of single surfaces together."""
    from pipeline.recipes import kuairand as recipes

    return {
        "unified": (recipes.kuairand,),
        "merged": (recipes.merged,),
        "separate": (recipes.separate_hf, recipes.separate_sr, recipes.separate_rp),
        **{name: (recipe,) for name, recipe in recipes.LADDER.items()},
    }


def plan(settings: Settings, data: Path) -> list[Run]:
    """Every run that the settings ask for.

    Raises:
        ConfigError: an arm that there is not, or more test days than the log can give.
    """
    from pipeline.data.logs import Dataset

    known = arms()
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
                    runs.append(Run(arm=arm, config=config, day=day, data=data, out=out))
    return runs


def execute(run: Run) -> str:
    """Train one model, score its test day, keep the predictions; what was kept before is not run again."""
    if run.out.exists():
        return f"{run.out.name}: kept"
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.predictions import write_predictions
    from pipeline.train.judge import PredictionCollector, gather
    from pipeline.train.sharding import joined
    from pipeline.train.trainer import Trainer

    start = time.perf_counter()
    with joined() as ranks:
        dataset = Dataset.open(run.data)
        trainer = Trainer(run.config, dataset, ranks, run.out.with_suffix(".checkpoints"))
        trainer.train()
        seconds = time.perf_counter() - start
        shutil.rmtree(trainer.folder)
        collector = PredictionCollector(run.config.surfaces, run.config.tasks)
        trainer.predict(trainer.days.validation + trainer.days.test, collector.add)
        predictions = gather(collector, run.out.with_suffix(".gathered.parquet"), ranks, dataset)
        assert predictions is not None, "one rank is the first"
        impressions = sum(p.impressions for s in run.config.surfaces for p in dataset.partitions(s, trainer.days.train))
        dense = trainer.dense_parameters
    run.out.with_suffix(".gathered.parquet").unlink()
    cost = {"seconds": seconds, "impressions_per_second": impressions / seconds, "dense_parameters": dense}
    run.out.with_suffix(".json").write_text(json.dumps(cost))
    write_predictions(run.out, predictions)
    return f"{run.out.name}: {seconds:.0f} s"


def collect(settings: Settings, data: Path, runs: list[Run]) -> dict[str, Any]:
    """Predictions by arm and seed, compared per day on identical rows."""
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.compare import compare
    from pipeline.evaluate.predictions import Predictions, read_predictions
    from pipeline.evaluate.report import as_dict, print_report
    from pipeline.train.days import split_days
    from pipeline.train.judge import trivial_predictions

    dataset = Dataset.open(data)
    by_arm: dict[str, list[Predictions]] = {}
    for arm in settings.arms:
        of_arm = [r for r in runs if r.arm == arm]
        by_arm[arm] = [
            Predictions.concat([read_predictions(r.out) for r in of_arm if r.config.seed == seed])
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
    result["cost"] = {arm: _cost([r for r in runs if r.arm == arm], settings.seeds) for arm in settings.arms}
    return result


def _cost(runs: list[Run], seeds: int) -> dict[str, float]:
    """Mean over seeds of training seconds and of impressions a second of all the arm's models together."""
    costs = [json.loads(r.out.with_suffix(".json").read_text()) for r in runs]
    seconds = sum(c["seconds"] for c in costs)
    impressions = sum(c["seconds"] * c["impressions_per_second"] for c in costs)
    return {"seconds_per_seed": seconds / seeds, "impressions_per_second": impressions / seconds}


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.quick:
        settings = replace(settings, seeds=1, backtest_days=1, resamples=100)
    report = Report("quality", settings)
    if settings.data is None:
        return report.finish({"skipped": "give --data, a log written by `trefoil ingest kuairand`"})
    runs = plan(settings, settings.data)
    context = multiprocessing.get_context("spawn")
    with context.Pool(settings.jobs, maxtasksperchild=1) as pool:
        for done, line in enumerate(pool.imap_unordered(execute, runs), 1):
            print(f"{done}/{len(runs)} {line}", file=sys.stderr, flush=True)
    result = collect(settings, settings.data, runs)
    reference = settings.arms[0]
    figures: dict[str, Any] = {"kuairand_backtest_macro_auc": result["macro_auc"][reference][settings.task][0]}
    for arm in settings.arms[1:]:
        value, low, high = result["macro_auc_differences"][arm][settings.task]
        figures[f"kuairand_{reference}_minus_{arm}"] = [-value, -high, -low]
    report.finish({**figures, **result})


if __name__ == "__main__":
    main()
