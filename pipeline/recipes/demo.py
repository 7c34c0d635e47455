"""Runs on simulated logs that end within minutes on two cores."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import (
    HistoryConfig,
    LoaderConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
)
from pipeline.recipes import variants


def demo() -> RunConfig:
    """The unified model: every block at a small size."""
    return RunConfig(
        name="demo",
        surfaces=("hf", "sr", "rp"),
        tasks=("click", "long_click", "save", "hide"),
        loader=LoaderConfig(requests_per_batch=128),
        model=ModelConfig(
            history=HistoryConfig(kind="transformer", width=32, layers=1, heads=2),
            projection=ProjectionConfig(),
            mixture=MixtureConfig(),
        ),
        optimizer=OptimizerConfig(dense_lr=2e-3, sparse_lr=0.05, decay="linear"),
        epochs=2,
    )


def rollout() -> RunConfig:
    """The unified model of the staged rollout's demo: two tasks, one epoch."""
    return replace(demo(), name="demo_staged", tasks=("click", "save"), epochs=1)


def merged() -> RunConfig:
    """The plain merged baseline of the demo."""
    return variants.merged(demo())


def separate_hf() -> RunConfig:
    """Home Feed alone."""
    return variants.separate(demo(), "hf", requests_per_batch=128)


def separate_sr() -> RunConfig:
    """Search alone."""
    return variants.separate(demo(), "sr", requests_per_batch=64)


def separate_rp() -> RunConfig:
    """Related Pins alone."""
    return variants.separate(demo(), "rp", requests_per_batch=32)
