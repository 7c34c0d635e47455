"""A recipe that trains in a moment."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import RunConfig
from tests.train.runs import tiny_config


def tiny() -> RunConfig:
    """Two surfaces, two tasks, every block."""
    return replace(tiny_config(), name="tiny_staged", surfaces=("hf", "sr"), bootstrap_resamples=1)
