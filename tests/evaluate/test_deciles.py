"""Deciles over days and seeds, by hand and against the table of one day."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.deciles import reliability
from pipeline.evaluate.metrics import deciles
from pipeline.evaluate.predictions import Predictions
from tests.evaluate.rows import simulated, table


def test_one_day_is_the_table_of_that_day() -> None:
    predictions = simulated()
    for surface, found in reliability([predictions], "click").items():
        want = deciles(predictions.rows(surface, "click"))
        np.testing.assert_allclose([d.mean_p for d in found], want.mean_p)
        np.testing.assert_allclose([d.mean_label for d in found], want.mean_label)


def test_days_are_cut_each_by_itself() -> None:
    """Day two scores ten times as high; cut together, its rows would fill the upper deciles alone."""
    p = np.arange(1, 11) / 200
    days = Predictions.of(
        table(
            20,
            date=["2026-01-01"] * 10 + ["2026-01-02"] * 10,
            p_click=np.concatenate([p, 10 * p]),
            label_click=np.concatenate([np.zeros(10), np.ones(10)]),
        )
    )
    found = reliability([days], "click")["hf"]
    assert [d.mean_label for d in found] == [0.5] * 10
    assert [d.mean_p for d in found] == pytest.approx(list(5.5 * p))


def test_seeds_are_averaged() -> None:
    first = Predictions.of(table(10, p_click=np.full(10, 0.2)))
    second = Predictions.of(table(10, p_click=np.full(10, 0.4)))
    (found,) = reliability([first, second], "click")["hf"]
    assert found == pytest.approx((0.3, 0.5))
