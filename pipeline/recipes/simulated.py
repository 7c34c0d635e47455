"""Runs on larger simulated logs (`benchmarks.simulated`): what the parts of the unified model are worth there.

Chosen on a world that no benchmark uses (docs/experiments.md, "Simulated logs").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.config import (
    DaysConfig,
    HistoryConfig,
    LoaderConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
)
from pipeline.recipes import variants

SURFACES = ("hf", "sr", "rp")


def simulated() -> RunConfig:
    """The unified model."""
    return RunConfig(
        name="simulated",
        surfaces=SURFACES,
        tasks=("click", "long_click", "save", "hide"),
        days=DaysConfig(validation=1, test=2),
        loader=LoaderConfig(requests_per_batch=128),
        model=ModelConfig(
            embedding_dim=32,
            embedding_dropout=0.2,
            table_scale=None,
            history=HistoryConfig(kind="state", width=64),
            cross_rank=64,
            deep=(256, 128),
            tower_hidden=(),
            calibration="monotone",
        ),
        # Long clicks are observed once in seven impressions: a weight of 1 would make their few rows the loudest.
        task_weights={"long_click": 0.15},
        optimizer=OptimizerConfig(
            dense_lr=8e-3,
            sparse_lr=0.03,
            # Most of what a user likes is told by age, country and history; users' own rows are learned by heart first.
            table_lrs={"user": 0.003, "item": 0.06},
            warmup_steps=50,
            decay="linear",
        ),
        epochs=2,
        # New users and ads come every day: the last day before the test says where the rates have gone.
        recalibration_prior=0.1,
        recalibrates="map",
    )


def merged() -> RunConfig:
    """The plain merged baseline."""
    return variants.merged(simulated())


def separate_hf() -> RunConfig:
    """Home Feed alone."""
    return variants.separate(simulated(), "hf", requests_per_batch=128)


def separate_sr() -> RunConfig:
    """Search alone."""
    return variants.separate(simulated(), "sr", requests_per_batch=64)


def separate_rp() -> RunConfig:
    """Related Pins alone."""
    return variants.separate(simulated(), "rp", requests_per_batch=32)


def global_calibration() -> RunConfig:
    """The unified model with one calibration for all surfaces; its logits are the same."""
    return _with(simulated(), calibration="global")


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, model=replace(config.model, **changes))


def _step(upto: int) -> Callable[[], RunConfig]:
    """The ladder's step: a bare merged model of the click and the first `upto` parts, in the ladder's order."""

    def recipe() -> RunConfig:
        whole = simulated()
        config = replace(merged(), name=f"simulated_ladder_{upto}", tasks=("click",), task_weights={})
        config = _with(config, history=HistoryConfig(kind="none"), projection=ProjectionConfig(kind="none"))
        parts: tuple[Callable[[RunConfig], RunConfig], ...] = (
            lambda c: _with(c, mixture=MixtureConfig()),
            lambda c: _with(c, history=whole.model.history),
            lambda c: _with(c, projection=ProjectionConfig()),
            lambda c: replace(
                _with(c, towers="per_surface", late_fusion=True), tasks=whole.tasks, task_weights=whole.task_weights
            ),
            lambda c: _with(c, calibration=whole.model.calibration),
        )
        for part in parts[:upto]:
            config = part(config)
        return config

    return recipe


# The steps of the way from a merged model to the unified one, each with all before it.
LADDER: dict[str, Callable[[], RunConfig]] = {
    "ladder merged": _step(0),
    "ladder + mmoe": _step(1),
    "ladder + history": _step(2),
    "ladder + projection": _step(3),
    "ladder + towers, tasks": _step(4),
    "ladder + calibration": _step(5),
}

# The unified model with its history read in another way.
READERS: dict[str, Callable[[], RunConfig]] = {
    kind: (lambda kind=kind: _with(simulated(), history=replace(simulated().model.history, kind=kind)))  # type: ignore[misc]
    for kind in ("transformer", "target", "din", "mean")
}
