"""Runs on KuaiRand-Pure: short-video feed logs, not ads; tab 1 as hf, tab 0 as sr, tab 4 as rp."""

from __future__ import annotations

from pipeline.config import HistoryConfig, LoaderConfig, ModelConfig, OptimizerConfig, RunConfig
from pipeline.recipes import variants


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
