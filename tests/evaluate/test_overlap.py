"""Whose rows gain, by hand and by adding up."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.overlap import GROUPS, gain_by_overlap
from pipeline.evaluate.predictions import Predictions
from tests.evaluate.rows import simulated, table

DAY = "2026-01-31"


def test_gains_by_hand() -> None:
    """Four users on hf, one of each group; the second model says .5 everywhere."""
    better = Predictions.of(table(4, label_click=[1.0, 0.0, 1.0, 0.0], p_click=[0.8, 0.4, 0.5, 0.6]))
    other = Predictions.of(table(4, label_click=[1.0, 0.0, 1.0, 0.0], p_click=np.full(4, 0.5)))
    seen = {(DAY, "hf"): {0, 2}, (DAY, "sr"): {0, 1}}
    found = gain_by_overlap(better, other, seen, task="click", resamples=50)["hf"]
    want = np.log(np.array([0.8, 0.6, 0.5, 0.4]) / 0.5)
    assert tuple(found) == GROUPS
    assert [found[g].gain.value for g in GROUPS] == pytest.approx(list(want))
    assert [found[g].row_share for g in GROUPS] == [0.25] * 4
    assert [found[g].gain_share.value for g in GROUPS] == pytest.approx(list(want / want.sum()))


def test_unobserved_rows_count_nothing() -> None:
    better = Predictions.of(table(3, label_click=[1.0, None, 0.0], p_click=[0.8, 0.9, 0.5]))
    other = Predictions.of(table(3, label_click=[1.0, None, 0.0], p_click=np.full(3, 0.5)))
    found = gain_by_overlap(better, other, {(DAY, "hf"): {0, 1, 2}}, task="click", resamples=0)["hf"]
    assert found["here only"].gain.value == pytest.approx(np.log(1.6) / 2)
    assert found["nowhere"].gain.reason == "no row of such a user"


def test_groups_add_up_to_the_whole_gain() -> None:
    better, other = simulated(noise=0.2), simulated(noise=1.5)
    users = np.unique(better.table["user_id"].to_numpy())
    seen = {(DAY, "hf"): set(users[::2].tolist()), (DAY, "sr"): set(users[::3].tolist())}
    found = gain_by_overlap(better, other, seen, task="click", resamples=200)
    for surface in ("hf", "sr"):
        parts = [(g.row_share, g.gain.value, g.gain_share.value) for g in found[surface].values()]
        whole = sum(share * (gain or 0) for share, gain, _ in parts)
        losses = [evaluate(p)[surface]["click"]["log_loss"] or 0 for p in (other, better)]
        assert whole == pytest.approx(losses[0] - losses[1])
        assert sum(part or 0 for *_, part in parts) == pytest.approx(1)
        assert all(g.gain.excludes_zero for g in found[surface].values())


def test_a_day_or_surface_that_is_not_given_is_named() -> None:
    rows = simulated()
    with pytest.raises(DataError, match="on sr are not given"):
        gain_by_overlap(rows, rows, {(DAY, "hf"): set()}, task="click")
    with pytest.raises(DataError, match=f"for {DAY} on hf"):
        gain_by_overlap(rows, rows, {("2026-01-30", "hf"): set(), ("2026-01-30", "sr"): set()}, task="click")
