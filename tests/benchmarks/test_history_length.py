"""What a reader of cut histories knows: by hand, and at both ends."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.history_length import Settings, cut_probabilities, history_length_figures, reinforced
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.data.simulate.users import HOUR_MS
from pipeline.data.simulate.world import make_world
from pipeline.data.truth import read_truth

CONFIG = SimulationConfig.tiny(history=64, requests=600)
CLICKED, HIDDEN = 1 + 0b0001, 1 + 0b1000


def test_the_effect_of_two_events_by_hand() -> None:
    world = make_world(CONFIG)
    now = 1_000 * HOUR_MS
    requests = pl.DataFrame(
        {
            "timestamp_ms": [now, now],
            "history_item": [[5, 9], []],
            "history_action": [[CLICKED, HIDDEN], []],
            "history_surface": [[1, 2], []],
            "history_time_ms": [[now - 12 * HOUR_MS, now - 6 * HOUR_MS], []],
        },
        schema_overrides={n: pl.List(pl.Int64) for n in ("history_item", "history_action", "history_surface")},
    )
    newest, both = reinforced(CONFIG, world, 0, requests, (1, 2))
    own = (-0.09 + 0.3) * math.exp(-1) * world.vector[4] @ world.transfer[0]
    other = (-0.09 - 0.7) * math.exp(-0.5) * math.sqrt(world.shared[0] * world.shared[1])
    elsewhere = other * world.vector[8] @ world.transfer[1]
    np.testing.assert_allclose(both[0], CONFIG.reinforcement * np.tanh(own + elsewhere), rtol=1e-5)
    np.testing.assert_allclose(newest[0], CONFIG.reinforcement * np.tanh(elsewhere), rtol=1e-5)
    assert not both[1].any()


def test_whole_histories_give_the_truth_and_shorter_ones_what_the_log_would_hold(tmp_path: Path) -> None:
    dataset = simulate(tmp_path / "log", CONFIG)
    world, days = make_world(CONFIG), dataset.days[-1:]
    for surface in dataset.schema.surfaces:
        truth = pl.DataFrame(pl.from_arrow(read_truth(dataset, surface, days)))
        clicks = truth["click"].explode(empty_as_null=False).to_numpy()
        found = cut_probabilities(CONFIG, world, dataset, surface, days, (2, CONFIG.history_length))
        np.testing.assert_allclose(found[f"p_{CONFIG.history_length}"], clicks, rtol=1e-5)
        assert found.select("request_id", "candidate").is_unique().all()
        assert np.abs(found["p_2"].to_numpy() - clicks).max() > 0.01


def test_longer_histories_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.history_length.CHUNK", 100)
    settings = Settings(lengths=(1, 768), requests=1_500, resamples=0)
    found = history_length_figures(settings)["gap_closed"]
    assert found["768"]["macro"][0] == pytest.approx(1)
    assert found["1"]["macro"][0] < 0.95
