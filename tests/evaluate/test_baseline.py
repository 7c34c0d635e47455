from __future__ import annotations

import polars as pl
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.baseline import TrivialBaseline
from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.predictions import Predictions
from tests.evaluate.rows import simulated

TRAIN = pl.DataFrame(
    {
        "surface": ["hf"] * 4 + ["sr"] * 2,
        "user_id": [1, 1, 2, 2, 1, 2],
        "item_id": [10, 11, 10, 11, 10, 10],
        "label_click": [1.0, 0.0, 1.0, None, 0.0, 0.0],
    }
)


def test_the_formula_by_hand() -> None:
    """On hf 2 clicks of 3 shows. Item 10: 2 of 2, user 1: 1 of 2. Strength 1."""
    asked = pl.DataFrame({"surface": ["hf", "hf", "sr", "rp"], "user_id": [1, 99, 1, 1], "item_id": [10, 98, 10, 10]})
    p = TrivialBaseline(strength=1.0).fit(TRAIN).predict(asked)["p_click"]
    base = 2 / 3
    item, user = (2 + base) / (3 * base), (1 + base) / (3 * base)
    assert p[0] == pytest.approx(base * item * user)
    assert p[1] == pytest.approx(base)  # unknown user and item
    assert p[2] == pytest.approx(1e-6)  # a surface without a click
    assert p[3] == pytest.approx(2 / 5)  # an unknown surface takes the rate over all


def test_weights_count_as_repeated_rows() -> None:
    asked = TRAIN.select("surface", "user_id", "item_id")
    weighted = TrivialBaseline().fit(TRAIN.with_columns(weight=2.0)).predict(asked)
    assert weighted.equals(TrivialBaseline().fit(pl.concat([TRAIN, TRAIN]).lazy()).predict(asked))


def test_it_finds_the_users_rate_and_keeps_row_order() -> None:
    world = simulated(rows=6000)
    train, test = world.table.head(4000), Predictions(world.table.tail(2000))
    judged = TrivialBaseline().fit(train).judge(test)
    assert judged.table["request_id"].equals(test.table["request_id"])
    assert "truth_click" not in judged.table.columns
    for tasks in evaluate(judged).values():
        assert (tasks["click"]["auc"] or 0) > 0.6
        assert (tasks["click"]["ne"] or 1) < 0.97


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DataError, match="label_<task>"):
        TrivialBaseline().fit(TRAIN.drop("label_click"))
    with pytest.raises(DataError, match="video"):
        TrivialBaseline(item="video").fit(TRAIN)
    with pytest.raises(DataError, match="call fit"):
        TrivialBaseline().predict(TRAIN)
    with pytest.raises(DataError, match="positive outcome"):
        TrivialBaseline().fit(TRAIN.with_columns(label_click=0.0))
    with pytest.raises(DataError, match="not fit on task 'click'"):
        TrivialBaseline().fit(TRAIN.rename({"label_click": "label_like"})).judge(simulated(rows=50))
    with pytest.raises(ConfigError, match="strength is 0"):
        TrivialBaseline(strength=0)
