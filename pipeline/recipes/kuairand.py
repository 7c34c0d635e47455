"""Runs on KuaiRand-Pure: short-video feed logs, not ads; tab 1 as hf, tab 0 as sr, tab 4 as rp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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

# What the spec makes of earlier outcomes; left out, the model knows ids, profile and history alone.
RATES = ("*_rate_*", "*_ewma_*", "*_last_*", "*_count", "*_recency", "similar_*")


def kuairand() -> RunConfig:
    """The unified model. One epoch, small batches, decayed rates: a second epoch overfits this log."""
    return RunConfig(
        name="kuairand",
        surfaces=("hf", "sr", "rp"),
        tasks=("click", "long_view"),
        loader=LoaderConfig(requests_per_batch=256),
        model=ModelConfig(history=HistoryConfig(width=32, layers=1, heads=2)),
        optimizer=OptimizerConfig(dense_lr=2e-3, sparse_lr=0.05, decay="linear"),
    )


def merged() -> RunConfig:
    """The plain merged baseline."""
    return variants.merged(kuairand())


def separate_hf() -> RunConfig:
    """Tab 1 alone."""
    return variants.separate(kuairand(), "hf", requests_per_batch=256)


def separate_sr() -> RunConfig:
    """Tab 0 alone."""
    return variants.separate(kuairand(), "sr", requests_per_batch=64)


def separate_rp() -> RunConfig:
    """Tab 4 alone."""
    return variants.separate(kuairand(), "rp", requests_per_batch=64)


def _with_model(**changes: Any) -> Callable[[], RunConfig]:
    return lambda: replace(kuairand(), model=replace(kuairand().model, **changes))


def _with_optimizer(**changes: Any) -> Callable[[], RunConfig]:
    return lambda: replace(kuairand(), optimizer=replace(kuairand().optimizer, **changes))


def _with(**changes: Any) -> Callable[[], RunConfig]:
    return lambda: replace(kuairand(), **changes)


# The unified model with one part changed: what each part is worth (benchmarks.quality, docs/experiments.md).
LADDER: dict[str, Callable[[], RunConfig]] = {
    "no_history": _with_model(history=HistoryConfig(kind="none"), projection=ProjectionConfig(kind="none")),
    "mean_history": _with_model(history=HistoryConfig(kind="mean", width=32)),
    "target_history": _with_model(history=HistoryConfig(kind="target", width=32)),
    "linear_projection": _with_model(projection=ProjectionConfig(kind="linear")),
    "no_mixture": _with_model(mixture=MixtureConfig(kind="none")),
    "shared_bottom": _with_model(mixture=MixtureConfig(kind="shared_bottom")),
    "shared_tower": _with_model(towers="shared", late_fusion=False),
    "no_cross": _with_model(cross_layers=0),
    "surface_gate": _with_model(surface_gate=True),
    "global_calibration": _with_model(calibration="global"),
    "click_only": _with(tasks=("click",)),
    "no_rates": _with(exclude=RATES),
    "sparse_adam": _with_optimizer(sparse="adam", sparse_lr=2e-3),
}
