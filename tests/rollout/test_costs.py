"""Waves follow costs and nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.rollout.costs import group_by_cost, predict, stage
from tests.rollout.plans import COSTS, profiles

costs = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 100, allow_nan=False), min_size=1, max_size=8)


def test_the_cheap_matched_pair_goes_first() -> None:
    found = stage(COSTS, within=1.5)
    assert found.groups == (("hf", "sr"), ("rp",))
    assert found.waves == (("hf", "sr"), ("hf", "sr", "rp"))
    assert found.pointless == ""
    assert "1.20 is at most 1.5" in found.reasons[0]
    assert "rp (3 ms) joins: 3.00 times" in found.reasons[1]


def test_four_surfaces_of_three_prices() -> None:
    found = stage({"d": 9.0, "b": 1.1, "c": 4.0, "a": 1.0}, within=1.5)
    assert [set(wave) for wave in found.waves] == [{"a", "b"}, {"a", "b", "c"}, {"a", "b", "c", "d"}]


def test_a_first_wave_has_two_surfaces() -> None:
    found = stage({"a": 1.0, "b": 4.0, "c": 16.0}, within=1.5)
    assert found.waves == (("a", "b"), ("a", "b", "c"))
    assert "no two surfaces match" in found.reasons[0]


@pytest.mark.parametrize(
    ("given_costs", "why"),
    [
        ({"a": 1.0}, "one surface only"),
        ({"a": 1.0, "b": 50.0}, "two surfaces make one wave"),
        ({"a": 1.0, "b": 1.2, "c": 1.4}, "all costs match, the dearest is 1.40 times"),
        ({"a": 1.0, "b": 3.0, "c": 3.1}, "would split them"),
    ],
)
def test_staging_that_is_pointless_says_so(given_costs: dict[str, float], why: str) -> None:
    found = stage(given_costs, within=1.5)
    assert why in found.pointless
    assert found.waves == (tuple(given_costs),)


@given(costs, st.floats(1, 5), st.randoms())
def test_order_and_names_do_not_matter(given_costs: dict[str, float], within: float, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(given_costs.items())
    random.shuffle(shuffled)
    found, again = (stage(dict(items), within=within) for items in (given_costs.items(), shuffled))
    assert [set(w) for w in found.waves] == [set(w) for w in again.waves]
    # Other names for the same costs give the same waves under these names.
    renamed = {chr(ord("z") - ord(s) + ord("a")): c for s, c in given_costs.items()}
    mirrored = [{chr(ord("z") - ord(s) + ord("a")) for s in w} for w in stage(renamed, within=within).waves]
    assert [set(w) for w in found.waves] == mirrored


@given(costs, st.floats(1, 5), st.floats(0.1, 10))
def test_groups_are_matched_ordered_and_complete(given_costs: dict[str, float], within: float, scale: float) -> None:
    groups = group_by_cost(given_costs, within)
    assert sorted(s for g in groups for s in g) == sorted(given_costs)
    for group in groups:
        values = [given_costs[s] for s in group]
        assert max(values) <= within * min(values)
    for cheap, dear in pairwise(groups):
        assert max(given_costs[s] for s in cheap) < min(given_costs[s] for s in dear)
    waves = stage(given_costs, within=within).waves
    assert all(set(a) < set(b) for a, b in pairwise(waves))
    assert set(waves[-1]) == set(given_costs)


def test_costs_in_each_wave() -> None:
    waves = stage(COSTS, within=1.5).waves
    found = predict(waves, profiles(), profiles({"hf": 1.3, "sr": 1.5, "rp": 3.6}))
    assert found == ({"hf": 1.3, "sr": 1.5, "rp": 3.0}, {"hf": 1.3, "sr": 1.5, "rp": 3.6})


def test_bad_costs_are_named() -> None:
    with pytest.raises(ConfigError, match=r"matched_within is 0\.5"):
        group_by_cost(COSTS, 0.5)
    with pytest.raises(ConfigError, match="cost of surface 'sr' is nan"):
        stage({"hf": 1.0, "sr": float("nan")}, within=1.5)
    with pytest.raises(ConfigError, match="no cost profile"):
        stage({}, within=1.5)
    with pytest.raises(ConfigError, match="unified model has no cost profile on surface 'rp'"):
        predict([("hf", "sr", "rp")], profiles(), profiles({"hf": 1.0, "sr": 1.0}))
    with pytest.raises(ConfigError, match="ms is 0"):
        profiles({"hf": 0.0})
