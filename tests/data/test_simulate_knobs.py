"""What the simulator's knobs do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, SurfaceKnobs, oracle_figures, simulate
from pipeline.data.simulate.run import calibrate
from pipeline.data.simulate.users import Users
from pipeline.data.simulate.world import make_world
from pipeline.data.truth import read_truth
from pipeline.errors import ConfigError


def taste_correlation(config: SimulationConfig, a: int, b: int) -> float:
    """Over users and dimensions, between two surfaces."""
    users = Users(config, make_world(config), first=1, count=2_000, stream=(3, 0))
    return float(np.corrcoef(users.taste[:, a].ravel(), users.taste[:, b].ravel())[0, 1])


@pytest.mark.parametrize("sharing", [0.0, 0.5, 1.0])
def test_sharing_is_the_correlation_of_tastes(sharing: float) -> None:
    config = SimulationConfig.tiny(sharing=sharing, demographic_share=0.0)
    deviations = [1 - s.deviation for s in config.surfaces]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        wanted = sharing * (deviations[a] * deviations[b]) ** 0.5
        # The rest of each is its own: cov = sqrt(shared_a * shared_b).
        assert taste_correlation(config, a, b) == pytest.approx(wanted, abs=0.03)


def test_nothing_shared_leaves_nothing_in_common() -> None:
    config = SimulationConfig.tiny(sharing=0.0, items=4_000, advertisers=2_000, demographic_share=0.0)
    world = make_world(config)
    for effect in (world.quality, world.long_quality):
        between = np.corrcoef(effect)
        assert np.abs(between[~np.eye(3, dtype=bool)]).max() < 0.1
    kept = world.transfer[:, : config.topics, : config.topics]
    assert (np.diagonal(kept, axis1=1, axis2=2) == 0).all()
    assert (kept.sum(axis=1) == 1).all()
    users = Users(config, world, first=1, count=3, stream=(3, 0))
    user, surface = np.arange(3), np.zeros(3, dtype=np.int64)
    users.interest(np.random.default_rng(0), user, surface, np.full(3, config.start_ms))
    users.reinforce(user, surface, np.ones((3, world.dimensions)))
    assert (users._reinforced[:, 0] == 1).all()
    assert (users._reinforced[:, 1:] == 0).all(), "an action on one surface must not reach another"


def test_a_deviating_surface_shares_less() -> None:
    hf, sr, rp = SimulationConfig().surfaces
    alone = SurfaceKnobs(name="sr", volume=1, candidates=3, history=4, click_rate=0.1, deviation=1.0)
    config = SimulationConfig.tiny(surfaces=(hf, alone, rp), demographic_share=0.0)
    assert taste_correlation(config, 0, 1) == pytest.approx(0, abs=0.03)
    assert taste_correlation(config, 0, 2) > 0.7
    assert sr.context == "query"


def test_candidates_and_history_override_the_surfaces(tmp_path: Path) -> None:
    dataset = simulate(tmp_path, SimulationConfig.tiny(candidates=8, candidate_spread=0.0, history=10, users=20))
    assert dataset.schema.history_length == 10
    for surface in dataset.schema.surfaces:
        for p in dataset.partitions(surface):
            for f in p.files:
                frame = pl.read_parquet(dataset.root / f.path, hive_partitioning=False)
                assert (frame["item"].list.len() == 8).all()
                assert frame["history_item"].list.len().max() <= 10


def test_no_history_means_no_history_columns(tmp_path: Path) -> None:
    dataset = simulate(tmp_path, SimulationConfig.tiny(history=0))
    assert not dataset.schema.has_history
    assert all("history" not in f.name for f in dataset.schema.features)


def test_other_surfaces_may_be_named(tmp_path: Path) -> None:
    one = SurfaceKnobs(name="feed", volume=1, candidates=3, history=5, click_rate=0.2)
    dataset = simulate(tmp_path, SimulationConfig.tiny(surfaces=(one,)))
    assert dataset.schema.surfaces == ("feed",)
    assert {v.name for v in dataset.schema.vocabularies}.isdisjoint({"query_term"})


def test_click_rates_are_about_those_asked_for(tmp_path: Path) -> None:
    dataset = simulate(tmp_path, SimulationConfig(requests=6_000, users=400))
    for knobs in SimulationConfig().surfaces:
        figures = oracle_figures(dataset)[knobs.name]
        assert figures["click"].mean_truth == pytest.approx(knobs.click_rate, rel=0.35)
        assert figures["long_click"].mean_truth == pytest.approx(0.4, rel=0.25)
        assert figures["save"].mean_truth == pytest.approx(0.05, rel=0.4)
        assert figures["hide"].mean_truth == pytest.approx(0.03, rel=0.4)


def test_noise_bounds_the_truth_and_stays_calibrated(tmp_path: Path) -> None:
    dataset = simulate(tmp_path, SimulationConfig(requests=3_000, users=300, label_noise=0.1))
    for surface, tasks in oracle_figures(dataset).items():
        truth = np.concatenate([c.flatten().to_numpy() for c in read_truth(dataset, surface)["click"].chunks])
        assert truth.min() >= 0.1 - 1e-6
        assert truth.max() <= 0.9 + 1e-6
        for f in tasks.values():
            assert abs(f.rate - f.mean_truth) < 4 * (f.mean_truth * (1 - f.mean_truth) / f.impressions) ** 0.5


def match_effect(dataset: Dataset, topics_terms: int) -> float:
    """Mean true click probability on `sr` where the ad is of the query's topic, less elsewhere."""
    truths = read_truth(dataset, "sr")
    frame = pl.concat(
        [
            pl.read_parquet(dataset.root / f.path, hive_partitioning=False)
            for p in dataset.partitions("sr")
            for f in p.files
        ]
    )
    topic = 1 + (frame["query"].list.first() - 1) // topics_terms
    flat = frame.select("category", topic.alias("topic"), pl.Series("truth", truths["click"].to_pylist()))
    flat = flat.explode("category", "truth")
    same = flat["category"] == flat["topic"]
    return float(flat.filter(same)["truth"].mean() - flat.filter(~same)["truth"].mean())  # type: ignore[operator]


def test_the_query_matters_by_relevance(tmp_path: Path) -> None:
    quiet = dict.fromkeys(("taste", "reinforcement", "intent", "quality", "context_effects"), 0.0) | {"requests": 2_000}
    with_query = simulate(tmp_path / "a", SimulationConfig.tiny(**quiet, relevance=2.0))
    without = simulate(tmp_path / "b", SimulationConfig.tiny(**quiet, relevance=0.0))
    assert match_effect(with_query, 40) > 0.15
    assert abs(match_effect(without, 40)) < 0.02


def test_actions_move_the_truth_only_through_reinforcement() -> None:
    config = SimulationConfig.tiny(intent=0.0, sharing=1.0)
    world = make_world(config)
    users = Users(config, world, first=1, count=2, stream=(3, 0))
    rng, now = np.random.default_rng(0), config.start_ms
    user, surface = np.arange(2), np.zeros(2, dtype=np.int64)
    before, _ = users.interest(rng, user, surface, np.full(2, now))
    effect = np.zeros((2, world.dimensions), dtype=np.float32)
    effect[0, 3] = 1.0
    users.reinforce(user, surface, effect)
    soon, _ = users.interest(rng, user, surface, np.full(2, now + 1))
    late, _ = users.interest(rng, user, surface, np.full(2, now + 100 * 86_400_000))
    gain = config.reinforcement * np.tanh(1.0) * (1 - 1 / config.topics)
    assert soon[0, 3] - before[0, 3] == pytest.approx(gain, rel=1e-4)
    np.testing.assert_allclose(soon[1], before[1], atol=1e-5)
    np.testing.assert_allclose(late, before, atol=1e-4)


def test_calibration_does_not_touch_the_log_s_users() -> None:
    config = SimulationConfig.tiny()
    np.testing.assert_array_equal(calibrate(config, make_world(config)), calibrate(config, make_world(config)))


def test_all_bad_values_are_reported_together() -> None:
    bad = SurfaceKnobs(name="h f", volume=-1, candidates=0, history=3, click_rate=2.0, context="what")  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        SimulationConfig(
            requests=0,
            users=2.5,  # type: ignore[arg-type]
            sharing=1.5,
            taste=float("nan"),
            start_date="yesterday",
            label_noise=0.5,
            surfaces=(bad, bad),
        )
    text = str(error.value)
    for part in (
        "requests is 0",
        "users is 2.5; it must be an integer",
        "sharing is 1.5",
        "taste is nan",
        "start_date is 'yesterday'",
        "label_noise is 0.5",
        "is there more than once",
        "volume is -1",
        "click_rate is 2.0",
        "context is 'what'",
        "its name must be letters",
    ):
        assert part in text


def test_knobs_that_clash_are_named() -> None:
    with pytest.raises(ConfigError, match=r"new_users_per_day is 0\.5(.|\n)*advertisers is 4; it must be at least"):
        SimulationConfig(new_users_per_day=0.5, advertisers=4)
    with pytest.raises(ConfigError, match="surfaces is empty"):
        SimulationConfig(surfaces=())
    with pytest.raises(ConfigError, match=r"no such knob: itmes\. Known:"):
        SimulationConfig.tiny(itmes=3)


def test_every_knob_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    for field in (*fields(SimulationConfig), *fields(SurfaceKnobs)):
        assert f"`{field.name}`" in text, field.name
