"""What the benchmark on simulated logs puts together; its models are trained by the benchmark itself."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import polars as pl
import pytest

from benchmarks.simulated import (
    WORLD_BITS,
    Settings,
    _of_world,
    arms,
    arms_of,
    calibration_to_truth,
    gap_closed,
    worlds,
)
from pipeline.data.simulate import SimulationConfig
from pipeline.errors import ConfigError
from pipeline.evaluate.metrics import cross_entropy
from pipeline.evaluate.predictions import Predictions


def predictions(p: np.ndarray, truth: np.ndarray, label: np.ndarray) -> Predictions:
    n = len(p)
    return Predictions.of(
        pl.DataFrame(
            {
                "surface": ["hf"] * n,
                "date": ["2026-01-05"] * n,
                "request_id": range(n),
                "user_id": [i // 2 for i in range(n)],
                "timestamp_ms": [0] * n,
                "candidate": [0] * n,
                "weight": [1.0] * n,
                "label_click": label,
                "p_click": p,
                "truth_click": truth,
            }
        )
    )


@pytest.fixture(scope="module")
def rows() -> dict[str, Predictions]:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.6, size=400)
    label = (rng.random(400) < truth).astype(np.float32)
    rate = np.full(400, truth.mean())
    return {
        "model": predictions((truth + rate) / 2, truth, label),
        "trivial": predictions(rate, truth, label),
        "oracle": predictions(truth, truth, label),
    }


def test_settings_differ_from_the_default_in_what_they_say() -> None:
    known = worlds(requests=1_000)
    base = known["default"]
    changed = {
        name: {f.name for f in fields(SimulationConfig) if getattr(world, f.name) != getattr(base, f.name)}
        for name, world in known.items()
    }
    assert changed == {
        "default": set(),
        "unshared": {"sharing"},
        "shared": {"sharing", "surfaces"},
        "balanced": {"surfaces"},
        "starved": {"surfaces"},
    }
    impressions = [s.volume * s.candidates for s in known["balanced"].surfaces]
    assert impressions == pytest.approx([1, 1, 1])
    # The signals are the simulator's defaults; the benchmark sets sizes alone.
    sizes = {"requests", "users", "days", "history"}
    assert all(getattr(base, f.name) == f.default for f in fields(SimulationConfig) if f.name not in sizes)


def test_every_arm_is_a_whole_configuration_of_its_own() -> None:
    found = {name: [recipe() for recipe in recipes] for name, recipes in arms().items()}
    whole = [c for configs in found.values() for c in configs]
    assert len({repr(c) for c in whole}) == len(whole)
    assert [c.surfaces for c in found["separate"]] == [("hf",), ("sr",), ("rp",)]
    steps = [found[n][0] for n in found if n.startswith("ladder")]
    assert [c.model.mixture.kind for c in steps] == ["none", *["mmoe"] * 5]
    assert [c.model.history.kind for c in steps] == ["none", "none", *["state"] * 4]
    assert [c.model.projection.kind for c in steps] == [*["none"] * 3, *["dcn"] * 3]
    assert [len(c.tasks) for c in steps] == [1, 1, 1, 1, 4, 4]
    assert [c.model.calibration for c in steps] == [*["global"] * 5, "monotone"]


def test_groups_of_arms_are_spelled_out_on_the_default_setting_alone() -> None:
    settings = Settings(arms=("unified",), default_arms=("ladder", "unified"))
    assert arms_of(settings, "starved") == ("unified",)
    assert len(arms_of(settings, "default")) == 7
    with pytest.raises(ConfigError, match="unfied"):
        arms_of(Settings(arms=("unfied",)), "default")


def test_the_gap_closed_by_hand(rows: dict[str, Predictions]) -> None:
    found = gap_closed(rows["model"], rows["trivial"], rows["oracle"], resamples=20)
    loss = {
        name: cross_entropy(*(p.table[c].cast(pl.Float64).to_numpy() for c in ("label_click", "p_click"))).mean()
        for name, p in rows.items()
    }
    wanted = (loss["trivial"] - loss["model"]) / (loss["trivial"] - loss["oracle"])
    value, low, high = found["hf"]
    assert value == pytest.approx(wanted)
    assert low is not None
    assert high is not None
    assert low < wanted < high
    assert found["macro"] == found["hf"]
    assert gap_closed(rows["oracle"], rows["trivial"], rows["oracle"], resamples=2)["hf"] == pytest.approx([1, 1, 1])


def test_calibration_to_the_truth_by_hand(rows: dict[str, Predictions]) -> None:
    table = rows["model"].table
    wanted = table["p_click"].sum() / table["truth_click"].sum()
    assert calibration_to_truth(rows["model"]) == {"hf": {"click": pytest.approx(wanted)}}
    assert calibration_to_truth(rows["oracle"]) == {"hf": {"click": pytest.approx(1)}}


def test_worlds_are_told_apart(rows: dict[str, Predictions]) -> None:
    both = Predictions.concat([_of_world(rows["model"], seed) for seed in (0, 3)])
    assert both.dates == ("world 0", "world 3")
    assert both.table["user_id"].n_unique() == 2 * rows["model"].table["user_id"].n_unique()
    assert both.table["request_id"].max() == (3 << WORLD_BITS) + 399
