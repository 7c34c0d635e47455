from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from pipeline.errors import ConfigError
from pipeline.evaluate import bootstrap as module
from pipeline.evaluate.bootstrap import (
    ResampledAuc,
    ResampledMetrics,
    ResampledRoc,
    UserBootstrap,
    estimate,
    roc_intervals,
)
from pipeline.evaluate.metrics import METRICS, task_metrics
from tests.evaluate.rows import simulated, task_rows

ROW = st.tuples(
    st.sampled_from([0.0, 1.0]),
    st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)),  # the first kind makes ties
    st.floats(1e-3, 1e3),
    st.integers(0, 3),
)


@settings(deadline=None)
@given(st.lists(ROW, min_size=2, max_size=40), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_auc_is_that_of_sklearn(rows: list[tuple[float, float, float, int]], drawn: list[int]) -> None:
    label, p, weight, user = map(np.array, zip(*rows, strict=True))
    counts = np.array([[1] * 4, drawn], dtype=float)
    ours = ResampledAuc(task_rows(label, p, weight), user)(counts)
    for auc, count in zip(ours, counts, strict=True):
        resampled = weight * count[user]
        drawn_rows = resampled > 0
        if np.unique(label[drawn_rows]).size < 2:
            assert np.isnan(auc)
        else:
            theirs = roc_auc_score(label[drawn_rows], p[drawn_rows], sample_weight=resampled[drawn_rows])
            assert auc == pytest.approx(theirs, abs=1e-12)


@settings(deadline=None)
@given(st.lists(ROW, min_size=2, max_size=40), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_roc_is_that_of_sklearn(rows: list[tuple[float, float, float, int]], drawn: list[int]) -> None:
    label, p, weight, user = map(np.array, zip(*rows, strict=True))
    counts, at = np.array([[1] * 4, drawn], dtype=float), np.linspace(0.01, 0.99, 23)
    ours = ResampledRoc(task_rows(label, p, weight), user, at)(counts)
    for true, count in zip(ours, counts, strict=True):
        resampled = weight * count[user]
        kept = resampled > 0
        if np.unique(label[kept]).size < 2:
            assert np.isnan(true).all()
        else:
            x, y, _ = roc_curve(label[kept], p[kept], sample_weight=resampled[kept])
            # Where the curve rises straight up at one of the rates, either end of the rise is right.
            clear = np.abs(x[:, None] - at).min(axis=0) > 1e-9
            np.testing.assert_allclose(true[clear], np.interp(at[clear], x, y), atol=1e-9)


def test_a_long_roc_is_thinned_and_covers_the_truth() -> None:
    rows = simulated(rows=4000, users=300).rows("hf", "click")
    users = UserBootstrap(rows.user_id, resamples=100)
    at = np.array([0.1, 0.5])
    whole = roc_intervals(rows, users, at)
    assert whole.auc == estimate(
        np.concatenate([ResampledMetrics(rows, users.users)(c)["auc"] for c in users.counts(9)])
    )
    x, y, _ = roc_curve(rows.label, rows.p, sample_weight=rows.weight)
    assert [e.value for e in whole.true] == pytest.approx(np.interp(at, x, y), abs=5e-3)
    for e in whole.true:
        assert e.low is not None
        assert e.high is not None
        assert e.low < e.value < e.high  # type: ignore[operator]


def test_a_resample_is_the_metrics_of_the_repeated_users() -> None:
    """Every metric but ECE, whose deciles are those of all rows, equals that of a table with users repeated."""
    rows = simulated(rows=400, users=30).rows("hf", "click")
    bootstrap = UserBootstrap(rows.user_id, resamples=5, seed=3)
    compute = ResampledMetrics(rows, bootstrap.users)
    counts = np.concatenate(list(bootstrap.counts(rows.label.size)))
    resampled = compute(counts)
    for b, count in enumerate(counts):
        times = count[np.searchsorted(bootstrap.users, rows.user_id)].astype(int)
        again = np.repeat(np.arange(times.size), times)
        expected = task_metrics(task_rows(rows.label[again], rows.p[again]))
        for metric in METRICS if b == 0 else set(METRICS) - {"ece"}:
            assert resampled[metric][b] == pytest.approx(expected[metric], abs=1e-12)


def test_draws_are_of_the_seed_and_the_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    users = np.array([4, 9, 9, 1, 4])
    whole = np.concatenate(list(UserBootstrap(users, resamples=50, seed=1).counts(10)))
    assert whole.shape == (51, 3)
    assert (whole.sum(axis=1) == 3).all()
    other = np.concatenate(list(UserBootstrap(users, resamples=50, seed=2).counts(10)))
    assert not np.array_equal(whole, other)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 7)
    chunked = np.concatenate(list(UserBootstrap(users[::-1], resamples=50, seed=1).counts(10)))
    assert np.array_equal(whole, chunked)


def test_the_interval_of_a_mean_is_the_known_one() -> None:
    """One row a user: the label rate's standard error is sqrt(rate * (1 - rate) / N), seen through calibration."""
    label = (np.random.default_rng(0).random(4000) < 0.3).astype(float)
    rows = task_rows(label, np.full(4000, 0.3))
    bootstrap = UserBootstrap(rows.user_id, resamples=2000)
    compute = ResampledMetrics(rows, bootstrap.users)
    samples = np.concatenate([compute(c)["calibration"] for c in bootstrap.counts(4000)])
    found = estimate(1 / samples)
    assert found.low is not None
    assert found.high is not None
    expected = 2 * 1.96 * np.sqrt(label.mean() * (1 - label.mean()) / 4000) / 0.3
    assert found.high - found.low == pytest.approx(expected, rel=0.08)


def test_users_not_rows_are_drawn() -> None:
    """A hundred copies of each user's row tell nothing new: the interval is as wide as without them."""
    once = simulated(rows=200, users=200).rows("hf", "click")
    often = task_rows(np.repeat(once.label, 100), np.repeat(once.p, 100), user_id=np.repeat(once.user_id, 100))
    width = []
    for rows in (once, often):
        bootstrap = UserBootstrap(rows.user_id, resamples=200)
        compute = ResampledMetrics(rows, bootstrap.users)
        found = estimate(np.concatenate([compute(c)["auc"] for c in bootstrap.counts(rows.label.size)]))
        assert found.low is not None
        assert found.high is not None
        width.append(found.high - found.low)
    assert width[0] == pytest.approx(width[1], rel=1e-9)


def test_estimates_say_why_there_is_nothing() -> None:
    assert estimate(np.array([1.0, 0.0, 2.0]), level=0.5).as_list() == pytest.approx([1.0, 0.5, 1.5])
    assert estimate(np.array([0.7])).reason == "0 of 0 resamples define it, too few for an interval"
    few = estimate(np.array([0.7, np.nan, np.nan, 0.6]))
    assert (few.value, few.low, few.excludes_zero) == (0.7, None, False)
    assert estimate(np.array([np.nan, 0.5]), reason="all negative").reason == "all negative"
    with pytest.raises(ConfigError, match="resamples is -1"):
        UserBootstrap(np.array([1]), resamples=-1)
