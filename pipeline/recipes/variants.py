"""The rivals of a unified model, made from its recipe so that everything else stays equal."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import MixtureConfig, RunConfig


def merged(config: RunConfig) -> RunConfig:
    """The plain merged baseline: union of features, one trunk and one tower for all surfaces, no gates."""
    model = replace(
        config.model,
        mixture=MixtureConfig(kind="none"),
        towers="shared",
        late_fusion=False,
        calibration="global",
        surface_gate=False,
    )
    return replace(config, name=f"{config.name}_merged", model=model)


def separate(config: RunConfig, surface: str, *, requests_per_batch: int) -> RunConfig:
    """A model of one surface alone, with the same blocks.

    Args:
        config: of the unified model.
        surface: the one to keep.
        requests_per_batch: the batch of this model; with the unified one, small surfaces would see few steps.
    """
    loader = replace(config.loader, requests_per_batch=requests_per_batch, surface_weights=None, temperature=None)
    return replace(config, name=f"{config.name}_{surface}", surfaces=(surface,), loader=loader)
