from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.compare import align, compare
from pipeline.evaluate.metrics import METRICS, evaluate
from pipeline.evaluate.predictions import Predictions
from tests.evaluate.rows import simulated, table


def test_a_better_model_is_found_better() -> None:
    found = compare({"noisy": simulated(noise=1.5), "clear": simulated()}, resamples=300)
    better = found.differences["clear"]
    assert list(found.differences) == ["clear"]
    for surface in ("hf", "sr"):
        gain = better[surface]["click"]
        assert gain["auc"].excludes_zero
        assert gain["auc"].value == pytest.approx(
            (found.scores["clear"][surface]["click"]["auc"].value or 0)
            - (found.scores["noisy"][surface]["click"]["auc"].value or 0)
        )
        assert (gain["auc"].low or 0) > 0
        assert (gain["ne"].high or 0) < 0
        assert (gain["log_loss"].high or 0) < 0
    assert (found.macro_auc_differences["clear"]["click"].low or 0) > 0


def test_equal_models_cannot_be_told_apart() -> None:
    same = compare({"a": simulated(), "b": simulated()}, resamples=50).differences["b"]["hf"]["click"]
    assert all(same[m].as_list() == [0.0, 0.0, 0.0] for m in METRICS)
    alike = compare({"a": simulated(noise=0.5, seed=1), "b": simulated(noise=0.5, seed=2)}, resamples=300)
    for surface in ("hf", "sr"):
        assert not alike.differences["b"][surface]["click"]["auc"].excludes_zero
    assert not alike.macro_auc_differences["b"]["click"].excludes_zero


def test_pairing_narrows_the_difference() -> None:
    found = compare({"a": simulated(noise=0.2, seed=1), "b": simulated(noise=0.2, seed=2)}, resamples=300)
    alone, paired = found.scores["a"]["hf"]["click"]["auc"], found.differences["b"]["hf"]["click"]["auc"]
    assert None not in (alone.low, alone.high, paired.low, paired.high)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)  # type: ignore[operator]


def test_values_are_those_of_evaluate() -> None:
    run = simulated(noise=0.3)
    found, expected = compare({"a": run}, resamples=0), evaluate(run)
    assert found.differences == {}
    for surface in run.surfaces:
        score = found.scores["a"][surface]["click"]
        assert (score.rows, score.positives, score.users) == (
            expected[surface]["click"].rows,
            expected[surface]["click"].positives,
            expected[surface]["click"].users,
        )
        for metric in METRICS:
            assert score[metric].value == pytest.approx(expected[surface]["click"][metric], abs=1e-12)
            assert score[metric].low is None
    mean = np.mean([expected[s]["click"]["auc"] for s in run.surfaces])
    assert found.macro_auc["a"]["click"].value == pytest.approx(mean)


def test_seeds_are_averaged_inside_a_resample() -> None:
    seeds = [simulated(noise=1.0, seed=s) for s in (1, 2)]
    found = compare({"both": seeds, "one": seeds[0], "two": seeds[1]}, resamples=40)
    parts = [found.scores[n]["hf"]["click"]["ne"].value for n in ("one", "two")]
    assert found.scores["both"]["hf"]["click"]["ne"].value == pytest.approx(np.mean(parts))  # type: ignore[arg-type]
    half = [found.differences[n]["hf"]["click"]["auc"].value for n in ("one", "two")]
    assert sum(half) == pytest.approx(0)  # type: ignore[arg-type]


def test_row_order_does_not_matter() -> None:
    run = simulated(noise=0.5)
    shuffled = Predictions(run.table.sample(fraction=1.0, shuffle=True, seed=1))
    mixed = compare({"a": simulated(), "b": shuffled}, resamples=20)
    plain = compare({"a": simulated(), "b": run}, resamples=20)
    assert mixed == plain


def test_daily_averages_days_whose_scores_do_not_compare() -> None:
    """Each day ranks perfectly, but the second day's scores lie all above the first's."""
    days = Predictions.of(
        table(
            date=["2026-01-30"] * 2 + ["2026-01-31"] * 2,
            label_click=[0.0, 1.0, 0.0, 1.0],
            p_click=[0.1, 0.2, 0.8, 0.9],
        )
    )
    assert compare({"a": days}, resamples=0).scores["a"]["hf"]["click"]["auc"].value == 0.75
    daily = compare({"a": days}, resamples=0, daily=True).scores["a"]["hf"]["click"]
    assert daily["auc"].value == 1.0
    assert daily["calibration"].value == pytest.approx((0.3 + 1.7) / 2)


def test_a_day_that_cannot_be_judged_is_named() -> None:
    days = table(date=["2026-01-30"] * 2 + ["2026-01-31"] * 2, label_click=[0.0, 1.0, 0.0, 0.0])
    auc = compare({"a": Predictions.of(days)}, resamples=0, daily=True).scores["a"]["hf"]["click"]["auc"]
    assert auc.reason == "all observed outcomes are negative (seed 0 on 2026-01-31)"


def test_a_surface_that_cannot_be_judged_says_why_and_spares_the_others() -> None:
    run = simulated(surfaces=("hf", "sr"))
    silent = pl.when(pl.col("surface") == "sr").then(0.0).otherwise(pl.col("label_click"))
    found = compare({"a": Predictions.of(run.table.with_columns(label_click=silent))}, resamples=20)
    assert found.scores["a"]["hf"]["click"]["auc"].low is not None
    assert found.scores["a"]["sr"]["click"]["auc"].reason == "all observed outcomes are negative"
    assert found.macro_auc["a"]["click"].reason == "on one surface, all observed outcomes are negative"


def test_different_rows_are_refused_with_counts() -> None:
    run = simulated(rows=100)
    other = Predictions(run.table.filter(pl.col("request_id") >= 3))
    with pytest.raises(DataError, match=r"\(100 rows\).*\(97 rows\).*0 are only in 'b', 3 only in 'a'"):
        compare({"a": run, "b": other})
    with pytest.raises(DataError, match="disagree on 100 of 100 rows") as caught:
        compare({"a": run, "b": Predictions(run.table.with_columns(label_click=1 - pl.col("label_click")))})
    assert caught.value.column == "label_click"
    renamed = run.table.rename({"p_click": "p_like", "label_click": "label_like"})
    with pytest.raises(DataError, match="no task in common"):
        align({"a": [run], "b": [Predictions.of(renamed.drop("truth_click"))]})


def test_unusable_arguments() -> None:
    with pytest.raises(ConfigError, match="no run to judge"):
        compare({})
    with pytest.raises(ConfigError, match="'a' has no seeds"):
        compare({"a": []})
    with pytest.raises(ConfigError, match="did you mean 'champion'"):
        compare({"champion": simulated(rows=50)}, reference="champoin")
    with pytest.raises(ConfigError, match="level is 95"):
        compare({"a": simulated(rows=50)}, level=95)
    with pytest.raises(DataError, match="holds no rows"):
        compare({"a": Predictions(simulated(rows=50).table.head(0))})
