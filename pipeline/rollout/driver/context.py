"""What every part of a wave needs: plan, recipe and log, checked to belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.config import RunConfig
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, unknown
from pipeline.job import experiment_of
from pipeline.recipes import find
from pipeline.rollout import waves
from pipeline.rollout.plan import RolloutPlan
from pipeline.train.days import split_days

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every part of a wave needs.

    Args:
        plan: that it holds to.
        number: of the wave; 0 for the separate models.
        base: the unified recipe up to the evaluation days.
        data: folder of the log.
        dataset: the log.
        out: folder of the rollout, which holds `wave-N`.
        resamples: of users behind each interval.
        console: told of progress.
    """

    plan: RolloutPlan
    number: int
    base: RunConfig
    data: Path
    dataset: Dataset
    out: Path
    resamples: int
    console: Console

    @property
    def folder(self) -> Path:
        return wave_folder(self.out, self.number)

    @property
    def surfaces(self) -> tuple[str, ...]:
        """That the wave trains and judges."""
        return tuple(self.plan.surfaces) if self.number == 0 else self.plan.wave(self.number).surfaces

    @property
    def training_days(self) -> tuple[str, ...]:
        return split_days(self.dataset, self.base.days).train

    @property
    def experiment(self) -> str:
        return experiment_of(self.base)


def wave_folder(out: Path, number: int) -> Path:
    """Where a wave lies."""
    return out / f"wave-{number}"


def open_context(plan: RolloutPlan, number: int, data: Path, out: Path, *, resamples: int, console: Console) -> Context:
    """Check that plan, log and recipe belong together.

    Raises:
        ConfigError: there is no such wave; the log is another than the plan's; the recipe lacks a surface of the plan.
    """
    if number:
        plan.wave(number)
    dataset = Dataset.open(data)
    if dataset.fingerprint != plan.dataset:
        raise ConfigError(
            f"the plan was made for the log {plan.dataset}, and {data} is {dataset.fingerprint}; give that log, or "
            "make a plan for this one with `trefoil rollout plan`"
        )
    recipe = find(plan.recipe)()
    for surface in plan.surfaces:
        if surface not in recipe.surfaces:
            raise ConfigError(f"the recipe {plan.recipe!r}: " + unknown("surface", surface, recipe.surfaces))
    for day in (*plan.evaluation_days, *plan.replay_days):
        if day not in dataset.days:
            raise ConfigError("the plan: " + unknown("day", day, dataset.days))
    base = waves.dated(recipe, plan)
    return Context(
        plan=plan,
        number=number,
        base=base,
        data=data,
        dataset=dataset,
        out=out,
        resamples=resamples,
        console=console,
    )
