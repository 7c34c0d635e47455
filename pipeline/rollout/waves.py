"""What a wave trains and serves, step by step, derived from the unified recipe: configurations and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ConfigDict, with_config

from pipeline.config import DaysConfig, ProjectionConfig, RunConfig
from pipeline.errors import ConfigError, unknown
from pipeline.recipes import variants
from pipeline.rollout.plan import STEPS, RolloutPlan

# Steps that change how a model is served, not what is trained.
SERVING_STEPS = ("broadcast", "int8", "compiled")
# Steps whose aim is a lower cost; they may lose as much quality as the gates would let pass.
EFFICIENCY_STEPS = ("projection", *SERVING_STEPS, "tf32")
_SMALLEST_BATCH = 32


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a trained model is served.

    Args:
        dtype: of embedding rows.
        compiled: ahead of time.
        broadcast: requests as they are; without it, every candidate is sent as a request of its own.
    """

    dtype: Literal["int8", "fp32"] = "fp32"
    compiled: bool = False
    broadcast: bool = False


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A model on the ladder of a wave.

    Args:
        config: its run.
        serving: how it is served.
    """

    config: RunConfig
    serving: Serving


def dated(config: RunConfig, plan: RolloutPlan) -> RunConfig:
    """The run up to the plan's evaluation days, which are its test days, in the experiment of the rollout."""
    days = DaysConfig(
        first=config.days.first, last=plan.evaluation_days[-1], validation=0, test=len(plan.evaluation_days)
    )
    return replace(config, name=f"{config.name}_rollout", days=days)


def separate(base: RunConfig, surface: str, share: float) -> RunConfig:
    """The separate model of a surface: the same blocks, and as many steps an epoch as the unified model makes.

    Args:
        base: the unified recipe.
        surface: the one to keep.
        share: of the surface in the log's requests.
    """
    batch = max(_SMALLEST_BATCH, round(base.loader.requests_per_batch * share))
    alone = variants.separate(base, surface, requests_per_batch=batch)
    return replace(alone, name=base.name)


def merged(base: RunConfig, surfaces: tuple[str, ...]) -> Rung:
    """The plain merged baseline of these surfaces: one task, no projection, one tower, served plainly."""
    plain = variants.merged(base)
    model = replace(plain.model, projection=ProjectionConfig(kind="none"))
    config = replace(
        plain,
        name=base.name,
        surfaces=surfaces,
        tasks=base.tasks[:1],
        task_weights={t: w for t, w in base.task_weights.items() if t in base.tasks[:1]},
        loader=replace(base.loader, surface_weights=None),
        model=model,
        compute=replace(base.compute, tf32=False),
    )
    return Rung(config=config, serving=Serving())


def climb(rung: Rung, step: str, base: RunConfig) -> Rung:
    """The rung with one step taken.

    Args:
        rung: the model so far.
        step: of `plan.STEPS`.
        base: the unified recipe, which the step takes its part from.

    Raises:
        ConfigError: there is no such step, or the recipe holds nothing that it could add.
    """
    config, serving, model = rung.config, rung.serving, rung.config.model
    match step:
        case "projection":
            config = replace(config, model=replace(model, projection=base.model.projection))
        case "towers":
            parts = {n: getattr(base.model, n) for n in ("towers", "tower_hidden", "late_fusion", "surface_gate")}
            config = replace(config, model=replace(model, **parts))
        case "multi_task":
            config = replace(
                config,
                tasks=base.tasks,
                task_weights=base.task_weights,
                model=replace(model, mixture=base.model.mixture),
            )
        case "calibration":
            config = replace(config, model=replace(model, calibration=base.model.calibration))
        case "tf32":
            config = replace(config, compute=replace(config.compute, tf32=True))
        case "int8":
            serving = replace(serving, dtype="int8")
        case "compiled":
            serving = replace(serving, compiled=True)
        case "broadcast":
            serving = replace(serving, broadcast=True)
        case "warm_start":
            return rung
        case _:
            raise ConfigError(unknown("step", step, STEPS))
    changed = Rung(config=config, serving=serving)
    if changed == rung:
        raise ConfigError(f"step {step!r} changes nothing: the recipe has no such part; leave the step out of the plan")
    return changed


def carried(before: Rung, surfaces: tuple[str, ...]) -> Rung:
    """All that the wave before kept, on more surfaces."""
    config = replace(before.config, surfaces=surfaces, loader=replace(before.config.loader, surface_weights=None))
    return replace(before, config=config)
