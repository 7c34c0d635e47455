"""Runs on KuaiRand-Pure: short-video feed logs, not ads; tab 1 as hf, tab 0 as sr, tab 4 as rp.

What is on in the unified recipe paid in the rolling backtest of docs/experiments.md; what did not is among the rivals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

Recipe = Callable[[], RunConfig]

# What the spec makes of earlier outcomes; left out, the model knows ids, profile and history alone.
RATES = ("*_rate_*", "*_ewma_*", "*_last_*", "*_count", "*_recency", "similar_*")
NO_MIXTURE = MixtureConfig(kind="none")
# A request of this log has one candidate.
ATTENTION = HistoryConfig(kind="attention", width=32, heads=2, few_candidates=True)
# Requests in a batch of a separate model: with the unified one's, small surfaces would see few steps.
BATCHES = {"hf": 256, "sr": 64, "rp": 64}


def kuairand() -> RunConfig:
    """The unified model. One epoch, small batches, decayed rates: a second epoch overfits this log."""
    return RunConfig(
        name="kuairand",
        surfaces=("hf", "sr", "rp"),
        tasks=("click", "long_view"),
        loader=LoaderConfig(requests_per_batch=256),
        model=ModelConfig(history=ATTENTION, projection=ProjectionConfig()),
        optimizer=OptimizerConfig(dense_lr=2e-3, sparse_lr=0.05, decay="linear"),
        recalibration_prior=0.1,
    )


def merged() -> RunConfig:
    """The plain merged baseline."""
    return variants.merged(kuairand())


def separate_hf() -> RunConfig:
    """Tab 1 alone."""
    return variants.separate(kuairand(), "hf", requests_per_batch=BATCHES["hf"])


def separate_sr() -> RunConfig:
    """Tab 0 alone."""
    return variants.separate(kuairand(), "sr", requests_per_batch=BATCHES["sr"])


def separate_rp() -> RunConfig:
    """Tab 4 alone."""
    return variants.separate(kuairand(), "rp", requests_per_batch=BATCHES["rp"])


def din() -> RunConfig:
    """DIN as published, for speed and quality: its activation unit, its two layers, nothing else; one candidate a row,
    so that nothing is computed once for several candidates."""
    model = ModelConfig(
        history=HistoryConfig(kind="din", width=32),
        projection=ProjectionConfig(kind="none"),
        cross_layers=0,
        deep=(200, 80),
        mixture=NO_MIXTURE,
        towers="shared",
        tower_hidden=(),
        late_fusion=False,
        calibration="global",
    )
    loader = replace(kuairand().loader, max_candidates=1, past_max_candidates="split")
    return replace(kuairand(), name="kuairand_din", model=model, loader=loader)


def din_released() -> RunConfig:
    """DIN with the layers of its authors' released code: a unit of 80 and 40 sigmoids, a network of 80 and 40."""
    paper = din()
    history = replace(paper.model.history, unit=(80, 40), unit_activation="sigmoid")
    return replace(paper, name="kuairand_din_released", model=replace(paper.model, history=history, deep=(80, 40)))


def _model(**changes: Any) -> Recipe:
    return lambda: replace(kuairand(), model=replace(kuairand().model, **changes))


def _run(**changes: Any) -> Recipe:
    return lambda: replace(kuairand(), **changes)


def _history(kind: Any) -> Recipe:
    return _model(history=HistoryConfig(kind=kind, width=32, heads=2))


_BARE = {"history": HistoryConfig(kind="none"), "projection": ProjectionConfig(kind="none")}

# The unified model with one part changed: what each part is worth (benchmarks.quality, docs/experiments.md).
PARTS: dict[str, Recipe] = {
    "no_history": _model(**_BARE),
    "mean_history": _history("mean"),
    "target_history": _history("target"),
    "transformer": _history("transformer"),
    "no_projection": _model(projection=ProjectionConfig(kind="none")),
    "linear_projection": _model(projection=ProjectionConfig(kind="linear")),
    "mmoe": _model(mixture=MixtureConfig()),
    "ple": _model(mixture=MixtureConfig(kind="ple", experts=2)),
    "shared_bottom": _model(mixture=MixtureConfig(kind="shared_bottom")),
    "star": _model(towers="star", deep=(), tower_hidden=(128, 64), late_fusion=False),
    "residual_towers": _model(towers="residual"),
    "shared_tower": _model(towers="shared", late_fusion=False),
    "no_cross": _model(cross_layers=0),
    "surface_gate": _model(surface_gate=True),
    "embedding_dropout": _model(embedding_dropout=0.1),
    "global_calibration": _model(calibration="global"),
    "no_recalibration": _run(recalibration_prior=None),
    "click_only": _run(tasks=("click",)),
    "no_rates": _run(exclude=RATES),
}

# The mission's ladder, each rung on top of the one before it.
_RUNGS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    (
        "ladder_0_merged",
        {**_BARE, "mixture": NO_MIXTURE, "towers": "shared", "late_fusion": False, "calibration": "global"},
        {"tasks": ("click",), "recalibration_prior": None},
    ),
    ("ladder_1_mmoe", {"mixture": MixtureConfig()}, {}),
    ("ladder_2_history", {"history": ATTENTION}, {}),
    ("ladder_3_projection", {"projection": ProjectionConfig()}, {}),
    ("ladder_4_towers_tasks", {"towers": "per_surface", "late_fusion": True}, {"tasks": ("click", "long_view")}),
    ("ladder_5_calibration", {"calibration": "per_surface"}, {"recalibration_prior": 0.1}),
)


def _ladder() -> Mapping[str, Recipe]:
    rungs: dict[str, Recipe] = {}
    config = kuairand()
    for name, model, run in _RUNGS:
        config = replace(config, model=replace(config.model, **model), **run)
        rungs[name] = lambda config=config: config  # type: ignore[misc]
    return rungs


LADDER = _ladder()


def _alone(rung: str) -> tuple[Recipe, ...]:
    def of(surface: str, size: int) -> Recipe:
        return lambda: variants.separate(LADDER[rung](), surface, requests_per_batch=size)

    return tuple(of(surface, size) for surface, size in BATCHES.items())


def _history_alone() -> RunConfig:
    bare = LADDER["ladder_0_merged"]()
    return replace(bare, model=replace(bare.model, history=ATTENTION))


# One surface at a time: what MMoE, and what a long history, is worth where nothing is unified.
ALONE: dict[str, tuple[Recipe, ...]] = {
    "alone_plain": _alone("ladder_0_merged"),
    "alone_mmoe": _alone("ladder_1_mmoe"),
    "alone_history": tuple(
        (lambda s=s, n=n: variants.separate(_history_alone(), s, requests_per_batch=n))  # type: ignore[misc]
        for s, n in BATCHES.items()
    ),
}
