"""Boosted trees on rows whose truth is known, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import polars as pl
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.boosted_trees import BoostedTrees, BoostedTreesConfig
from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.predictions import Predictions
from tests.evaluate.rows import table

pytest.importorskip("lightgbm")


def rows(seed: int, n: int = 4000) -> pl.DataFrame:
    """Clicks that follow a number on hf and a category on sr; a tenth of the outcomes and numbers is missing."""
    rng = np.random.default_rng(seed)
    x, group = rng.normal(size=n), rng.integers(4, size=n)
    surface = np.where(rng.random(n) < 0.5, "hf", "sr")
    p = np.where(surface == "hf", 1 / (1 + np.exp(-2 * x)), np.array([0.1, 0.8, 0.3, 0.6])[group])
    label = np.where(rng.random(n) < 0.1, np.nan, (rng.random(n) < p).astype(float))
    return table(
        n,
        surface=surface,
        x=pl.Series(np.where(rng.random(n) < 0.1, np.nan, x)),
        group=group,
        label_click=pl.Series(label, dtype=pl.Float32).fill_nan(None),
        p_click=np.full(n, 0.5),
    )


def fitted(seed: int = 0) -> BoostedTrees:
    trees = BoostedTrees(
        numeric=["x"], categorical=["group"], config=BoostedTreesConfig(rounds=400, learning_rate=0.1, seed=seed)
    )
    return trees.fit(rows(0), rows(1))


def test_it_learns_what_each_surface_follows_and_is_calibrated() -> None:
    judged = fitted().judge(Predictions.of(rows(2)))
    scores = evaluate(judged)
    for surface, least in (("hf", 0.80), ("sr", 0.76)):
        assert (scores[surface]["click"]["auc"] or 0) > least
        assert scores[surface]["click"]["calibration"] == pytest.approx(1, abs=0.08)
    assert "x" not in judged.table.columns


def test_the_same_seed_gives_the_same_trees() -> None:
    test = Predictions.of(rows(2))
    first, again, other = (fitted(seed).judge(test).table["p_click"] for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)


def test_a_heavy_penalty_holds_predictions_near_the_rate() -> None:
    test, rate = Predictions.of(rows(2)), rows(0)["label_click"].mean()
    free, held = (
        BoostedTrees(numeric=["x"], config=BoostedTreesConfig(rounds=20, l2=l2)).fit(rows(0), rows(1)).judge(test)
        for l2 in (1.0, 1e6)
    )
    assert free.table["p_click"].to_numpy().std() > 0.03
    assert held.table["p_click"].to_numpy() == pytest.approx(rate, abs=0.003)


def test_validation_rows_choose_the_number_of_trees() -> None:
    assert 0 < fitted().trees["click"] < 400


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="given no column"):
        BoostedTrees(numeric=[])
    with pytest.raises(DataError, match="need this column"):
        BoostedTrees(numeric=["gone"]).fit(rows(0, 100), rows(1, 100))
    with pytest.raises(DataError, match="not fit on task 'click'"):
        BoostedTrees(numeric=["x"]).judge(Predictions.of(rows(2, 100)))
    with pytest.raises(DataError, match="nothing to learn"):
        BoostedTrees(numeric=["x"]).fit(rows(0, 100).drop("label_click"), rows(1, 100))
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r"trefoil\[gbdt\]"):
        BoostedTrees(numeric=["x"])
