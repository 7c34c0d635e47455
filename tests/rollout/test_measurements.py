"""Measurements by hand: calibration of slices, drift and coverage, times in turn, planted faults."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.data.simulate import SimulationConfig
from pipeline.data.simulate.schema import simulation_schema
from pipeline.errors import ConfigError
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout.faults import parse_fault
from pipeline.rollout.features import drift_of_ids, drift_of_numbers
from pipeline.rollout.meter import REQUESTS, cost_measurements, cost_profile, time_in_turn
from pipeline.rollout.quality import calibration_slices, task_measurements


def rows(p: list[float], *, model: str = "a") -> Predictions:
    """Eight rows of four users on two days; the second day and the last user are new."""
    return Predictions.of(
        pl.DataFrame(
            {
                "surface": ["sr"] * 8,
                "date": ["2026-01-10"] * 4 + ["2026-01-11"] * 4,
                "request_id": np.arange(8),
                "user_id": [1, 1, 2, 2, 3, 3, 4, 4],
                "timestamp_ms": np.arange(8),
                "candidate": np.zeros(8, np.int32),
                "weight": np.ones(8, np.float32),
                "label_click": [1, 0, 1, 0, 0, 0, 1, None],
                "p_click": p,
                "new_user": [False] * 6 + [True] * 2,
                "new_ad": [False, True] * 4,
            }
        )
    )


def test_calibration_of_slices_by_hand() -> None:
    found = calibration_slices(rows([0.8, 0.2, 0.6, 0.2, 0.1, 0.1, 0.5, 0.9]), "click", resamples=20)
    ratios = {
        kind: {name: None if s.calibration is None else s.calibration.value for name, s in parts.items()}
        for kind, parts in found.items()
    }
    # Sum of probabilities over clicks, of the rows whose outcome was observed.
    assert ratios["day"] == pytest.approx({"2026-01-10": 1.8 / 2, "2026-01-11": 0.7})
    assert ratios["users"] == pytest.approx({"known": 2.0 / 2, "new": 0.5})
    assert ratios["ads"]["known"] == pytest.approx((0.8 + 0.6 + 0.1 + 0.5) / 3)
    assert ratios["ads"]["new"] is None
    assert (found["ads"]["new"].positives, found["ads"]["new"].rows) == (0, 3)
    assert sum(s.rows for s in found["decile"].values()) == 7


def test_a_model_beside_itself_differs_by_nothing() -> None:
    same = rows([0.8, 0.2, 0.6, 0.2, 0.1, 0.1, 0.5, 0.9])
    found = task_measurements(same, same, ["click", "save"], resamples=50)
    assert set(found) == {"click"}
    difference = found["click"].auc_difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert found["click"].auc is not None
    assert found["click"].auc.value == 1.0


def test_drift_of_numbers() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=20_000)
    assert drift_of_numbers(before, rng.normal(size=20_000)) == pytest.approx(0, abs=0.003)
    # Deciles of N(0, 1) under N(1, 1): that of the normals is 1, the squared shift; bins lose some.
    assert drift_of_numbers(before, rng.normal(1, 1, 20_000)) == pytest.approx(0.95, abs=0.05)
    assert drift_of_numbers(np.zeros(100), np.zeros(50)) == pytest.approx(0)
    assert drift_of_numbers(before, np.zeros(0)) is None


def test_drift_of_ids() -> None:
    before = np.repeat([3, 7], [500, 500])
    # Shares (.5, .5, 0) to (.8, 0, .2): half a row in each bin keeps it finite.
    after = np.repeat([3, 9], [800, 200])
    p = np.array([500.5, 500.5, 0.5]) / 1001.5
    q = np.array([800.5, 0.5, 200.5]) / 1001.5
    assert drift_of_ids(before, after) == pytest.approx(((q - p) * np.log(q / p)).sum())
    assert drift_of_ids(before, before[::-1]) == pytest.approx(0)
    assert drift_of_ids(before, np.zeros(0, np.int64)) is None


def test_models_are_timed_in_turn_and_compared_round_by_round() -> None:
    order: list[str] = []
    times = time_in_turn({n: lambda n=n: order.append(n) for n in "ab"}, rounds=4)
    assert order[6:] == ["a", "b"] * 4
    assert {n: t.shape for n, t in times.items()} == {"a": (4,), "b": (4,)}
    slow, fast = np.array([4.0, 8.0, 6.0]), np.array([2.0, 4.0, 3.0])
    found = cost_measurements(slow, separate=fast, champion=slow)
    assert (found.over_separate, found.over_champion) == (2.0, 1.0)
    assert found.ms == 6.0 / REQUESTS
    assert found.over_separate_interval == (2.0, 2.0)
    # Of 30 rounds the median's interval goes from the 10th to the 22nd: 15 -+ 1.96 * sqrt(30 / 4), outwards.
    rounds = np.random.default_rng(0).permutation(np.arange(1.0, 31.0))
    over_one = cost_measurements(rounds, separate=np.ones(30), champion=rounds)
    assert over_one.over_separate == 15.5
    assert over_one.over_separate_interval == (10.0, 22.0)
    assert over_one.ms_interval == (10.0 / REQUESTS, 22.0 / REQUESTS)
    assert found.requests_per_second == pytest.approx(1000 * REQUESTS / 6)
    profile = cost_profile(slow, candidates=4, history=20)
    assert profile.ms == found.ms
    assert profile.p99_ms == pytest.approx(np.percentile(slow, 99))


SCHEMA = simulation_schema(SimulationConfig.tiny())


def test_faults_change_what_they_say() -> None:
    table = pa.table(
        {
            "match_score": pa.array([[1.0, 2.0], [], [None]], pa.list_(pa.float32())),
            "tenure_days": pa.array([1.0, None, 3.0], pa.float32()),
        }
    )
    fault = parse_fault("sr:match_score*10", SCHEMA)
    assert str(fault) == "match_score times 10"
    changed = fault.apply(table.slice(0), SCHEMA)
    assert changed["match_score"].to_pylist() == [[10.0, 20.0], [], [None]]
    assert changed["tenure_days"].equals(table["tenure_days"])
    lost = parse_fault("sr:match_score", SCHEMA).apply(table, SCHEMA)
    assert lost["match_score"].to_pylist() == [[None, None], [], [None]]
    days = parse_fault("hf:tenure_days*0.5", SCHEMA).apply(table, SCHEMA)
    assert days["tenure_days"].to_pylist() == [0.5, None, 1.5]


def test_scores_are_distorted_behind_the_model() -> None:
    fault = parse_fault("sr:scores*2", SCHEMA)
    said = rows([0.8, 0.2, 0.6, 0.2, 0.1, 0.1, 0.5, 0.9])
    assert fault.distort(said).table["p_click"].to_list() == [1.0, 0.4, 1.0, 0.4, 0.2, 0.2, 1.0, 1.0]
    table = pa.table({"match_score": pa.array([[1.0]], pa.list_(pa.float32()))})
    assert fault.apply(table, SCHEMA) is table
    assert parse_fault("sr:price*2", SCHEMA).distort(said) is said


def test_a_slice_of_a_table_is_changed_alike() -> None:
    table = pa.table({"match_score": pa.array([[9.0], [1.0, 2.0], [3.0]], pa.list_(pa.float32()))}).slice(1)
    changed = parse_fault("sr:match_score*10", SCHEMA).apply(table, SCHEMA)
    assert changed["match_score"].to_pylist() == [[10.0, 20.0], [30.0]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("match_score", "is not written SURFACE:FEATURE"),
        ("sr:", "is not written SURFACE:FEATURE"),
        ("srr:price", "unknown surface 'srr'; did you mean 'sr'"),
        ("sr:match_scor", "unknown numeric feature 'match_scor'; did you mean 'match_score'"),
        ("hf:match_score", "unknown numeric feature 'match_score'"),
        ("sr:query*2", "unknown numeric feature 'query'"),
        ("sr:price*x", "'x' is no number"),
        ("sr:scores*-1", "'-1' is no number"),
        ("sr:scores", "unknown numeric feature 'scores'"),
        ("sr:price*", "is not written SURFACE:FEATURE"),
    ],
)
def test_faults_that_cannot_be(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_fault(text, SCHEMA)
