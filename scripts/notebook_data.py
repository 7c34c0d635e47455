"""Make from nothing what the notebooks read: a simulated log, runs of separate, merged and unified models, artifacts,
and a first wave through the gates. What is there already is not made again.

    python scripts/notebook_data.py --home runs/notebooks

With --tiny it ends in about a minute and shows nothing but that the notebooks run; the figures mean something on the
default log alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from pipeline import job
from pipeline.config import (
    DaysConfig,
    HistoryConfig,
    LoaderConfig,
    MixtureConfig,
    ModelConfig,
    ProjectionConfig,
    RunConfig,
    config_to_json,
)
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.recipes import find
from pipeline.recipes.variants import merged, separate

# Requests in a batch of a separate model: with the unified one's, small surfaces would see few steps.
BATCHES = {"hf": 128, "sr": 64, "rp": 32}


@dataclass(frozen=True, kw_only=True)
class Settings:
    home: Path = Path("runs/notebooks")
    """Folder of the runs and MLflow's store: TREFOIL_HOME of the notebooks."""
    requests: int = 20_000
    """Requests of the log, over eight days."""
    seeds: int = 3
    """Seeds of every model."""
    epochs: int = 1
    """Epochs of every model."""
    register: bool = True
    """Export and register every surface of the first unified model."""
    rollout: bool = True
    """Run the separate models, and a first wave of hf and sr, through the gates."""
    tiny: bool = False
    """A log of 600 requests, models of a few steps, two seeds, no wave but that of the separate models."""


def unified(settings: Settings) -> RunConfig:
    """The demo's unified model for two tasks."""
    config = replace(
        find("demo")(),
        tasks=("click", "save"),
        epochs=settings.epochs,
        days=DaysConfig(validation=1, test=2),
        log_steps=5,
    )
    if not settings.tiny:
        return config
    model = ModelConfig(
        embedding_dim=8,
        history=HistoryConfig(kind="transformer", width=8, layers=1, heads=2),
        projection=ProjectionConfig(width=8, rank=4),
        cross_layers=1,
        cross_rank=8,
        deep=(16,),
        mixture=MixtureConfig(experts=2, hidden=(8,)),
        tower_hidden=(8,),
    )
    loader = LoaderConfig(requests_per_batch=64, lanes=8, window=16)
    return replace(config, tasks=("click",), model=model, loader=loader, bootstrap_resamples=20, log_steps=1)


def main(settings: Settings) -> None:
    import os

    home = settings.home.absolute()
    os.environ["TREFOIL_HOME"] = str(home)
    console = Console(highlight=False)
    log = home / "logs"
    if not settings.tiny:
        console.print("a log, the runs and two waves of a rollout: about ten minutes on two idle cores, once")
    if not (log / "dataset.json").is_file():
        console.print(f"simulating {log}")
        simulate(log, _simulation(settings))
    base = unified(settings)
    # One seed of the separate models is enough to show that a notebook says what it lacks.
    seeds = {True: (2, 1), False: (settings.seeds, settings.seeds)}[settings.tiny]
    for seed in range(seeds[0]):
        train(replace(base, seed=seed), log, home, console, register=settings.register and seed == 0)
        train(replace(merged(base), seed=seed), log, home, console)
    for seed in range(seeds[1]):
        for surface in base.surfaces:
            alone = separate(base, surface, requests_per_batch=BATCHES[surface])
            train(replace(alone, seed=seed), log, home, console)
    if settings.rollout:
        roll_out(settings, base, log, home, console)
    console.print(f"the notebooks' data is there; next: TREFOIL_HOME={settings.home} make notebooks")


def train(config: RunConfig, data: Path, home: Path, console: Console, *, register: bool = False) -> None:
    """Train a run that has not ended yet; with `register`, export every surface too."""
    folder = home / f"{config.name}-seed{config.seed}"
    registered = all((folder / "exports" / surface).is_dir() for surface in config.surfaces)
    if (folder / "test_metrics.json").is_file() and (registered or not register):
        return
    console.print(f"training {folder.name}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        quiet = Console(file=file, width=160, highlight=False)
        result = job.run(config, data, folder, console=quiet)
        if register:
            job.register(result, data, console=quiet)


def roll_out(settings: Settings, base: RunConfig, log: Path, home: Path, console: Console) -> None:
    """Plan a rollout, and run its first waves through gates as wide as a small log wants them."""
    from pipeline.rollout.driver.context import open_context
    from pipeline.rollout.driver.planning import make_plan
    from pipeline.rollout.driver.wave import run_wave
    from pipeline.rollout.plan import CanaryPlan, Thresholds, read_plan, write_plan
    from pipeline.rollout.registry import Registry

    path, recipe = home / "plan.yaml", home / "rollout-recipe.json"
    if not path.is_file():
        surfaces = base.surfaces[:2] if settings.tiny else base.surfaces
        recipe.write_bytes(config_to_json(replace(base, surfaces=surfaces)))
        drifting = ("ad_age_days", "tenure_days", "history_events", "item", "advertiser", "user")
        thresholds = Thresholds(
            auc_margin=0.03,
            ne_margin=0.03,
            calibration=(0.8, 1.25),
            slice_calibration=(0.65, 1.5),
            slice_positives=30,
            cost_growth=1.5,
            cost_gain=0.9,
            p99_ms={},
            unique_users=64,
            coverage_drop=0.05,
            drift=0.25,
            drift_ignored=drifting,
        )
        canary = CanaryPlan(share=0.5, salt="canary", looks=12, alpha=0.05, loss_margin=0.002, calibration=(0.65, 1.5))
        plan, _ = make_plan(
            str(recipe),
            log,
            evaluation_days=1,
            replay_days=1,
            matched_within=1.4,
            thresholds=thresholds,
            canary=canary,
            console=console,
        )
        # A few steps say what a ladder is; the rest of it is `make rollout`.
        first = replace(
            plan.waves[0], steps=("merged", "broadcast", "towers", "multi_task") if len(base.tasks) > 1 else ("merged",)
        )
        write_plan(path, replace(plan, waves=(first, *plan.waves[1:])))
    plan = read_plan(path)
    for number in (0,) if settings.tiny else (0, 1):
        context = open_context(
            plan, number, log, home / "rollout", resamples=20 if settings.tiny else 500, console=console
        )
        result = run_wave(context)
        registry = Registry(home)
        for surface, version in result.versions.items() if number == 0 else ():
            if registry.aliases(surface).get("challenger") == version:
                registry.promote(surface, dataset=plan.dataset)


def _simulation(settings: Settings) -> SimulationConfig:
    if settings.tiny:
        return SimulationConfig.tiny(requests=600, days=6)
    return SimulationConfig(
        requests=settings.requests,
        days=8,
        users=max(100, settings.requests // 15),
        items=max(100, settings.requests // 25),
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
