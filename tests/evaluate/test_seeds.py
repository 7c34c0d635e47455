"""Intervals over users and seeds, against the formula and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluate.bootstrap import Estimate
from pipeline.evaluate.compare import compare
from pipeline.evaluate.metrics import task_metrics
from pipeline.evaluate.seeds import _widened, curve_over_seeds, over_seeds
from tests.evaluate.rows import simulated

EXACT = Estimate(value=0.0, low=0.0, high=0.0)


def test_without_luck_of_users_it_is_welchs_interval() -> None:
    ours, reference = np.array([0.71, 0.72, 0.75]), np.array([0.70, 0.71])
    value = ours.mean() - reference.mean()
    got = _widened(Estimate(value=value, low=value, high=value), ours, reference, 0.95)
    want = stats.ttest_ind(ours, reference, equal_var=False).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((want.low, want.high))


def test_without_luck_of_seeds_it_is_the_users_interval() -> None:
    users = Estimate(value=0.01, low=0.0, high=0.02)
    got = _widened(users, np.array([0.7, 0.7]), np.array([0.6, 0.6]), 0.95)
    assert (got.low, got.high) == pytest.approx((0.0, 0.02))


def test_both_add_up_as_variances_of_independent_causes() -> None:
    ours, reference = np.array([0.70, 0.72]), np.array([0.70, 0.70])
    half_users = 0.03
    users = Estimate(value=0.01, low=0.01 - half_users, high=0.01 + half_users)
    v_users, v_seeds = (half_users / stats.norm.ppf(0.975)) ** 2, 0.0002 / 2
    degrees = (v_users + v_seeds) ** 2 / v_seeds**2
    half = stats.t.ppf(0.975, degrees) * np.sqrt(v_users + v_seeds)
    got = _widened(users, ours, reference, 0.95)
    assert (got.low, got.high) == pytest.approx((0.01 - half, 0.01 + half))


def test_one_seed_has_no_spread() -> None:
    got = _widened(Estimate(value=0.1, low=0.0, high=0.2), np.array([0.7]), np.array([0.6, 0.61]), 0.95)
    assert (got.value, got.low, got.high) == (0.1, None, None)
    assert "1 and 2 seeds; their spread wants at least two" in got.reason


def test_seeds_of_runs_stand_beside_their_mean() -> None:
    runs = {
        "rough": [simulated(seed=s, noise=2.0) for s in (0, 1)],
        "fine": [simulated(seed=s, noise=0.5) for s in (2, 3)],
    }
    comparison = compare(runs, resamples=50)
    found = over_seeds(comparison, runs, task="click")["fine"]["hf"]
    auc = {n: [task_metrics(p.rows("hf", "click"))["auc"] for p in of] for n, of in runs.items()}
    base = sum(auc["rough"]) / 2
    assert found.seeds == pytest.approx([a - base for a in auc["fine"]])
    users = comparison.differences["fine"]["hf"]["click"]["auc"]
    assert found.difference.value == users.value == pytest.approx(np.mean(found.seeds))
    assert found.difference.high - found.difference.low > users.high - users.low


def test_a_curve_has_students_interval_at_every_step_that_all_seeds_have() -> None:
    steps, found = curve_over_seeds([([5, 10, 15], [1.0, 0.5, 0.1]), ([5, 10], [2.0, 0.5]), ([5, 10], [3.0, 0.5])])
    assert steps == [5, 10]
    # Mean 2, standard deviation 1, t of two degrees of freedom 4.30265: 2 -+ 4.30265 / sqrt(3).
    assert (found[0].value, found[0].low, found[0].high) == pytest.approx((2.0, -0.48414, 4.48414), abs=1e-5)
    assert (found[1].value, found[1].low, found[1].high) == (0.5, 0.5, 0.5)
    steps, found = curve_over_seeds([([5], [1.0])])
    assert (steps, found[0].value, found[0].low) == ([5], 1.0, None)
    assert "one seed" in found[0].reason
    assert curve_over_seeds([([], [])]) == ([], [])
