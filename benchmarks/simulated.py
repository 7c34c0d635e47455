"""What unifying pays where the truth is known: simulated logs, the oracle beside every model, several worlds.

    python -m benchmarks.simulated --work runs/simulated

For every setting of the simulator and every seed a world of its own is drawn, each arm is trained on its log up to
the last two days and scored on these. Metrics are taken per world and averaged; users are drawn anew within worlds
(bootstrap), the same for every arm, so differences are paired. Finished runs are kept in --work and reused while
their configuration and log are the same, so a benchmark that was cut off goes on.

Calibration stands twice: over the labels (`calibration`, which the luck of few positives moves) and over the true
probabilities (`calibration_to_truth`, which has no luck in it).

What it does not show: real ads. A world that rewards what a model can do is a choice; docs/simulator.md says which.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from benchmarks.common import Report
from pipeline.config import RunConfig, config_to_json
from pipeline.data.simulate import SimulationConfig
from pipeline.errors import ConfigError, unknown

if TYPE_CHECKING:
    import numpy as np

    from pipeline.evaluate.predictions import Predictions

Arm = tuple[Callable[[], RunConfig], ...]
REFERENCE, TRIVIAL, ORACLE = "unified", "trivial", "oracle"
TASK = "click"  # of the headline figures
# With it a user's own taste can be learnt from a user's own rows; at 2.4 half of the oracle's lead stays out of reach.
REQUESTS_A_USER_AND_DAY = 14.3
# The newest 48 events of users so busy are those of some hours, and what is cut off is worth a tenth of the oracle's
# lead (`benchmarks.history_length`); of 192 nothing that counts is missing.
HISTORY = 192
# Bits of a request or user id that name its world when worlds are judged together.
WORLD_BITS = 56


@dataclass(frozen=True, kw_only=True)
class Settings:
    settings: tuple[str, ...] = ("default", "unshared", "shared", "balanced", "starved")
    """Settings of the simulator, by name."""
    arms: tuple[str, ...] = (REFERENCE, "separate", "merged")
    """What to compare on every setting; differences are taken to the first."""
    default_arms: tuple[str, ...] = ("global calibration",)
    """What is compared on the default setting too: "ladder" stands for all its steps, "readers" for ways to read
    the history."""
    seeds: int = 3
    """Worlds of the default setting; each has a log and models of its own."""
    other_seeds: int = 1
    """Worlds of the other settings."""
    requests: int = 480_000
    """Requests of each log, over 14 days; users grow with them."""
    work: Path = Path("runs/simulated")
    """Where logs and finished runs are kept."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    resamples: int = 1000
    """Resamples of users behind each interval."""
    memory: bool = False
    """Measure the simulator's memory at 2 and 8 million impressions too."""
    quick: bool = False
    """Tiny logs of two settings: does it run, not what is true."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model of one world."""

    setting: str
    arm: str
    seed: int
    config: RunConfig
    log: Path
    out: Path


def worlds(requests: int) -> dict[str, SimulationConfig]:
    """The settings by name; all differ from the default one in what their name says and nothing else."""
    days, users = 14, max(round(requests / (REQUESTS_A_USER_AND_DAY * 14)), 40)
    base = SimulationConfig(requests=requests, days=days, users=users, history=HISTORY)
    return {
        "default": base,
        "unshared": replace(base, sharing=0.0),
        "shared": replace(base, sharing=1.0, surfaces=tuple(replace(s, deviation=0.0) for s in base.surfaces)),
        # As many impressions of each surface.
        "balanced": replace(base, surfaces=tuple(replace(s, volume=1 / s.candidates) for s in base.surfaces)),
        "starved": replace(
            base, surfaces=tuple(replace(s, volume=s.volume / 4 if s.name == "rp" else s.volume) for s in base.surfaces)
        ),
    }


def arms() -> dict[str, Arm]:
    """The arms by name; one of several recipes puts models of single surfaces together."""
    from pipeline.recipes import simulated as recipes

    return {
        REFERENCE: (recipes.simulated,),
        "separate": (recipes.separate_hf, recipes.separate_sr, recipes.separate_rp),
        "merged": (recipes.merged,),
        "global calibration": (recipes.global_calibration,),
        **{name: (recipe,) for name, recipe in (recipes.LADDER | recipes.READERS).items()},
    }


def arms_of(settings: Settings, setting: str) -> tuple[str, ...]:
    """Names of the arms of a setting, groups spelled out.

    Raises:
        ConfigError: there is no such arm.
    """
    from pipeline.recipes import simulated as recipes

    groups = {"ladder": tuple(recipes.LADDER), "readers": tuple(recipes.READERS)}
    asked = settings.arms + (settings.default_arms if setting == "default" else ())
    names = dict.fromkeys(n for a in asked for n in groups.get(a, (a,)))
    for name in names:
        if name not in arms():
            raise ConfigError(unknown("arm", name, [*arms(), *groups]))
    return tuple(names)


def plan(settings: Settings) -> list[Run]:
    """Every run that the settings ask for; logs that are not there are simulated.

    Raises:
        ConfigError: a setting or arm that there is not.
    """
    known = worlds(settings.requests)
    runs = []
    for name in settings.settings:
        if name not in known:
            raise ConfigError(unknown("setting", name, known))
        for seed in range(settings.seeds if name == "default" else settings.other_seeds):
            log = _log(replace(known[name], seed=seed), settings.work / "logs")
            for arm in arms_of(settings, name):
                for recipe in arms()[arm]:
                    config = replace(recipe(), seed=seed)
                    mark = hashlib.sha256(config_to_json(config) + log.name.encode()).hexdigest()[:12]
                    out = settings.work / name / arm.replace(" ", "_") / f"{config.name}-{seed}-{mark}.parquet"
                    runs.append(Run(setting=name, arm=arm, seed=seed, config=config, log=log, out=out))
    return runs


def _log(config: SimulationConfig, folder: Path) -> Path:
    """The log of a configuration, made if it is not there."""
    from pipeline.data.simulate import simulate

    path = folder / hashlib.sha256(repr(config).encode()).hexdigest()[:12]
    if not (path / "dataset.json").exists():
        # What was cut off has no dataset.json and cannot be gone on with.
        shutil.rmtree(path, ignore_errors=True)
        simulate(path, config)
    return path


def execute(run: Run) -> str:
    """Train one model, score its test days, keep the predictions; what was kept before is not run again."""
    if run.out.exists():
        return f"{run.setting}, {run.out.stem}: kept"
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.predictions import write_predictions
    from pipeline.train.judge import PredictionCollector, gather
    from pipeline.train.sharding import joined
    from pipeline.train.trainer import Trainer

    start, busy = time.perf_counter(), time.process_time()
    with joined() as ranks:
        dataset = Dataset.open(run.log)
        trainer = Trainer(run.config, dataset, ranks, run.out.with_suffix(".checkpoints"))
        trainer.train()
        seconds, processor = time.perf_counter() - start, time.process_time() - busy
        shutil.rmtree(trainer.folder)
        collector = PredictionCollector(run.config.surfaces, run.config.tasks)
        trainer.predict(trainer.days.test, collector.add)
        gathered = run.out.with_suffix(".gathered.parquet")
        predictions = gather(collector, gathered, ranks, dataset)
        assert predictions is not None, "one rank is the first"
        days = trainer.days.train
        impressions = sum(p.impressions for s in run.config.surfaces for p in dataset.partitions(s, days))
        cost = {
            "seconds": seconds,
            "processor_seconds": processor,
            "impressions": impressions * run.config.epochs,
            "dense_parameters": trainer.dense_parameters,
        }
    gathered.unlink()
    run.out.with_suffix(".json").write_text(json.dumps(cost))
    write_predictions(run.out, predictions)
    return f"{run.setting}, {run.out.stem}: {seconds:.0f} s"


def collect(settings: Settings, setting: str, runs: list[Run]) -> dict[str, Any]:
    """The arms of one setting on identical rows, beside the trivial baseline and the oracle."""
    from pipeline.data.logs import Dataset
    from pipeline.evaluate.compare import compare
    from pipeline.evaluate.predictions import Predictions, read_predictions
    from pipeline.evaluate.report import as_dict, print_report
    from pipeline.train.days import split_days
    from pipeline.train.judge import trivial_predictions

    seeds = sorted({r.seed for r in runs})
    names = arms_of(settings, setting)
    found: dict[str, list[Predictions]] = {name: [] for name in (*names, TRIVIAL, ORACLE)}
    for seed in seeds:
        for name in names:
            parts = [read_predictions(r.out) for r in runs if (r.arm, r.seed) == (name, seed)]
            found[name].append(_of_world(Predictions.concat(parts), seed))
        first = next(r for r in runs if (r.arm, r.seed) == (names[0], seed))
        dataset = Dataset.open(first.log)
        rows = read_predictions(first.out)
        trivial = trivial_predictions(rows, dataset, split_days(dataset, first.config.days).train)
        found[TRIVIAL].append(_of_world(trivial, seed))
        found[ORACLE].append(_of_world(rows.using("truth"), seed))
    whole = {name: Predictions.concat(parts) for name, parts in found.items()}
    compared = compare(whole, resamples=settings.resamples, daily=True)
    print(f"== {setting}", file=sys.stderr)
    print_report(compared)
    result = as_dict(compared)
    result["calibration_to_truth"] = {name: calibration_to_truth(whole[name]) for name in names}
    result["ne_gap_closed"] = {
        name: gap_closed(whole[name], whole[TRIVIAL], whole[ORACLE], resamples=settings.resamples) for name in names
    }
    result["cost"] = {name: _cost([r for r in runs if r.arm == name], len(seeds)) for name in names}
    result["worlds"] = len(seeds)
    return result


def _of_world(predictions: Predictions, seed: int) -> Predictions:
    """The rows of one world, told apart from those of others: the world takes the place of the date."""
    import polars as pl

    from pipeline.evaluate.predictions import DATE, Predictions
    from pipeline.schema import REQUEST_ID, USER_ID

    mark = pl.lit(seed << WORLD_BITS, dtype=pl.Int64)
    columns = {REQUEST_ID: pl.col(REQUEST_ID) + mark, USER_ID: pl.col(USER_ID) + mark, DATE: pl.lit(f"world {seed}")}
    return Predictions.of(predictions.table.with_columns(**columns))


def calibration_to_truth(predictions: Predictions) -> dict[str, dict[str, float]]:
    """By surface and task, predicted over true probabilities, each summed over the observed rows of all worlds."""
    truth = predictions.using("truth")
    return {
        surface: {
            task: float(predictions.rows(surface, task).p.sum() / truth.rows(surface, task).p.sum())
            for task in predictions.tasks
        }
        for surface in predictions.surfaces
    }


def gap_closed(
    model: Predictions, trivial: Predictions, oracle: Predictions, *, resamples: int
) -> dict[str, list[float | None]]:
    """(trivial - model) / (trivial - oracle) in the click's NE, averaged over worlds, with intervals over users.

    Returns:
        `[value, low, high]` by surface, and of their mean as "macro".
    """
    import numpy as np

    from pipeline.evaluate.bootstrap import UserBootstrap, estimate
    from pipeline.evaluate.compare import align
    from pipeline.schema import USER_ID

    aligned = [parts[0] for parts in align({"model": [model], TRIVIAL: [trivial], ORACLE: [oracle]}).values()]
    bootstrap = UserBootstrap(aligned[0].table[USER_ID].to_numpy(), resamples=resamples)
    samples = {
        surface: np.mean([_gap(aligned, surface, world, bootstrap) for world in aligned[0].dates], axis=0)
        for surface in model.surfaces
    }
    samples["macro"] = np.mean(list(samples.values()), axis=0)
    return {name: estimate(values).as_list() for name, values in samples.items()}


def _gap(runs: list[Predictions], surface: str, world: str, bootstrap: Any) -> np.ndarray:
    """[1 + B] for one surface of one world."""
    import numpy as np

    from pipeline.evaluate.bootstrap import ResampledMetrics

    metrics = [ResampledMetrics(p.rows(surface, TASK, date=world), bootstrap.users) for p in runs]
    rows = max(m.rows for m in metrics)
    blocks = [[m(counts)["ne"] for m in metrics] for counts in bootstrap.counts(rows)]
    model, trivial, oracle = (np.concatenate([b[i] for b in blocks]) for i in range(3))
    return (trivial - model) / (trivial - oracle)


def _cost(runs: list[Run], seeds: int) -> dict[str, float]:
    """Means over seeds, of all the arm's models together."""
    costs = [json.loads(r.out.with_suffix(".json").read_text()) for r in runs]
    return {
        "processor_seconds": sum(c["processor_seconds"] for c in costs) / seeds,
        "impressions_per_processor_second": sum(c["impressions"] for c in costs)
        / sum(c["processor_seconds"] for c in costs),
        "dense_parameters": sum(c["dense_parameters"] for c in costs) / seeds,
    }


def simulator_figures(impressions: tuple[int, ...] = (2_000_000, 8_000_000)) -> dict[str, Any]:
    """Peak resident memory and impressions a second of the simulator, by size of the log; users grow with it."""
    script = (
        "import re, sys, tempfile, time\n"
        "from pipeline.data.simulate import SimulationConfig, simulate\n"
        "n, start = int(sys.argv[1]), time.process_time()\n"
        "with tempfile.TemporaryDirectory() as out:\n"
        "    config = SimulationConfig(requests=n // 5, users=n // 75, items=20_000, advertisers=2_000)\n"
        "    log = simulate(out + '/log', config)\n"
        "    made = sum(p.impressions for s in log.schema.surfaces for p in log.partitions(s))\n"
        # Not ru_maxrss: it counts the parent's memory too, which the child had for a moment before exec.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(made, int(peak) / 1024, made / (time.process_time() - start))\n"
    )
    figures = {}
    for count in impressions:
        done = subprocess.run([sys.executable, "-c", script, str(count)], check=True, capture_output=True, text=True)
        made, peak, rate = (float(x) for x in done.stdout.split())
        figures[str(count)] = {"impressions": made, "peak_mib": peak, "impressions_per_processor_second": rate}
    return figures


def simulated_figures(settings: Settings) -> dict[str, Any]:
    """All figures by name: `simulated_ne_gap_closed` (click, mean over surfaces, default setting), and per setting
    everything that `collect` finds.

    Raises:
        ConfigError: a setting or arm that there is not.
    """
    if settings.quick:
        settings = replace(
            settings,
            settings=("default", "unshared"),
            default_arms=("global calibration",),
            seeds=1,
            requests=3_000,
            resamples=50,
        )
    runs = plan(settings)
    context = multiprocessing.get_context("spawn")
    with context.Pool(settings.jobs) as pool:
        for done, line in enumerate(pool.imap_unordered(execute, runs), 1):
            print(f"{done}/{len(runs)} {line}", file=sys.stderr, flush=True)
    by_setting = {s: collect(settings, s, [r for r in runs if r.setting == s]) for s in settings.settings}
    figures: dict[str, Any] = {}
    if "default" in by_setting:
        figures["simulated_ne_gap_closed"] = by_setting["default"]["ne_gap_closed"][settings.arms[0]]["macro"]
    for setting, found in by_setting.items():
        figures[f"simulated_{setting}_separate_minus_unified_ne"] = differences(found, "separate", "ne")
    figures["settings"] = by_setting
    if settings.memory:
        figures["simulator"] = simulator_figures()
    return figures


def differences(found: Mapping[str, Any], arm: str, metric: str) -> dict[str, list[float]] | None:
    """Of the click, by surface, arm minus reference; None where the arm was not asked for."""
    if arm not in found["differences"]:
        return None
    return {surface: tasks[TASK][metric] for surface, tasks in found["differences"][arm].items()}


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    report = Report("simulated", settings)
    report.finish(simulated_figures(settings))


if __name__ == "__main__":
    main()
