"""The canary: who is served, the confidence sequence, and that a planted bad model is stopped and a good one not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.evaluate.predictions import Predictions
from pipeline.rollout.canary import CANARY_RESULT, confidence_sequence, serves, watch
from tests.rollout.plans import CANARY


def predictions(p: Any, *, users: int = 600, rows_per_user: int = 6, seed: int = 0) -> Predictions:
    """Rows with known probabilities; `p(truth, user)` is what the model says of them."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows_per_user)
    truth = np.clip(rng.beta(1.2, 5, user.size), 0.01, 0.9)
    label = (rng.random(user.size) < truth).astype(np.float32)
    said = np.clip(p(truth, user), 1e-4, 1 - 1e-4)
    return Predictions.of(
        pl.DataFrame(
            {
                "surface": ["sr"] * user.size,
                "date": ["2026-01-12"] * user.size,
                "request_id": np.arange(user.size),
                "user_id": user,
                "timestamp_ms": rng.permutation(user.size),
                "candidate": np.zeros(user.size, np.int32),
                "weight": np.ones(user.size, np.float32),
                "label_click": label,
                "p_click": said,
            }
        )
    )


def noisy(truth: np.ndarray, user: np.ndarray) -> np.ndarray:
    return truth * np.exp(0.3 * np.random.default_rng(1).normal(size=truth.size))


def right(truth: np.ndarray, user: np.ndarray) -> np.ndarray:
    return truth


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=50), st.floats(0.01, 0.99), st.text(max_size=5))
def test_the_share_grows_and_never_changes_its_mind(users: list[int], share: float, salt: str) -> None:
    ids = np.array(users, dtype=np.int64)
    few, more = serves(ids, share / 2, salt), serves(ids, share, salt)
    assert (few <= more).all()
    assert serves(ids, 1.0, salt).all()
    assert (serves(ids[::-1], share, salt)[::-1] == more).all()


def test_the_hash_is_what_it_was() -> None:
    """Values of 2026: a change would move users between models in mid-canary."""
    ids = np.arange(20)
    assert np.flatnonzero(serves(ids, 0.5, "salt")).tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11, 15, 16, 17, 18, 19]
    many = np.arange(100_000)
    assert serves(many, 0.2, "a").mean() == pytest.approx(0.2, abs=0.005)
    both = serves(many, 0.5, "a") & serves(many, 0.5, "b")
    assert both.mean() == pytest.approx(0.25, abs=0.01)


def test_the_sequence_by_hand() -> None:
    """t = 4, variance 1, rho^2 = 1 and alpha = .05: sqrt(2 * 5 / 16 * ln(sqrt(5) / .05))."""
    alpha = 0.05
    at_rho_one = -2 * np.log(alpha) + np.log(-2 * np.log(alpha)) + 1
    half = confidence_sequence(np.zeros(1), np.ones(1), np.array(4), alpha=alpha, narrowest_at=float(at_rho_one))
    assert half[0] == pytest.approx(np.sqrt(2 * 5 / 16 * np.log(np.sqrt(5) / 0.05)))
    assert half[0] == pytest.approx(1.5411, abs=1e-3)


def test_the_sequence_holds_at_all_times() -> None:
    """Over 1000 users and 400 repetitions, the mean leaves a 90 % sequence at any time in at most 10 % of them."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(400, 1000)) - 1
    t = np.arange(1, 1001)
    mean = draws.cumsum(axis=1) / t
    variance = (draws**2).cumsum(axis=1) / t - mean**2
    half = confidence_sequence(mean, variance, t, alpha=0.1, narrowest_at=500)
    left = (np.abs(mean) > half)[:, 29:].any(axis=1).mean()
    assert left <= 0.1
    # A fixed 90 % interval, looked at as often, is left far more often.
    fixed = (np.abs(mean) > 1.645 * np.sqrt(variance / t))[:, 29:].any(axis=1).mean()
    assert fixed > 0.3


def test_the_same_model_is_safe_and_a_better_one_too() -> None:
    control = predictions(noisy)
    for candidate in (control, predictions(right)):
        found = watch(candidate, control, CANARY, ["click"])
        assert found.verdict == "safe", found.reasons
        assert len(found.looks) == CANARY.looks
        assert found.users == serves(np.arange(600), 0.5, "test").sum()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda truth, user: np.full_like(truth, truth.mean()), "log loss is worse"),
        (lambda truth, user: np.minimum(2.0 * truth, 0.95), "calibration ratio is above 1.25"),
        (lambda truth, user: 0.4 * truth, "calibration ratio is below 0.8"),
    ],
    ids=["blind", "too high", "too low"],
)
def test_a_planted_bad_model_is_stopped_early(bad: Any, reason: str) -> None:
    found = watch(predictions(bad), predictions(right), CANARY, ["click"])
    assert found.verdict == "harm"
    assert any(reason in r for r in found.reasons), found.reasons
    assert len(found.looks) < CANARY.looks
    assert CANARY_RESULT.validate_json(CANARY_RESULT.dump_json(found)) == found
    assert found == watch(predictions(bad), predictions(right), CANARY, ["click"])


def test_harm_outside_the_share_is_not_seen() -> None:
    def bad_for_others(truth: np.ndarray, user: np.ndarray) -> np.ndarray:
        return np.where(serves(user, 0.5, "test"), truth, 0.9)

    assert watch(predictions(bad_for_others), predictions(right), CANARY, ["click"]).verdict == "safe"
    assert watch(predictions(bad_for_others), predictions(right), replace(CANARY, share=1.0), ["click"]).verdict == (
        "harm"
    )


def test_few_users_say_nothing() -> None:
    few = {"users": 40, "rows_per_user": 3}
    found = watch(
        predictions(lambda truth, user: np.full_like(truth, 0.9), **few), predictions(right, **few), CANARY, ["click"]
    )
    assert found.verdict == "undecided"
    assert "too few" in found.reasons[0]


def test_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="do not hold the same candidates"):
        watch(predictions(right), predictions(right, users=599), CANARY, ["click"])
    with pytest.raises(DataError, match="some user is in the candidate's share"):
        watch(predictions(right, users=1), predictions(right, users=1), replace(CANARY, share=1e-9), ["click"])
