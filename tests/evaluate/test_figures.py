"""What the figures show, read back from their axes."""

from __future__ import annotations

import io

import numpy as np
import polars as pl
import pytest

from pipeline.evaluate import figures
from pipeline.evaluate.compare import compare
from pipeline.evaluate.metrics import deciles
from pipeline.evaluate.predictions import Predictions


def predictions(noise: float, rows: int = 400) -> Predictions:
    rng = np.random.default_rng(3)
    truth = rng.uniform(0.05, 0.6, rows)
    surface = np.where(np.arange(rows) % 4 == 0, "sr", "hf")
    return Predictions.of(
        pl.DataFrame(
            {
                "surface": surface,
                "date": ["2026-01-01"] * rows,
                "request_id": np.arange(rows),
                "user_id": np.arange(rows) % 50,
                "timestamp_ms": np.arange(rows),
                "candidate": np.zeros(rows, dtype=np.int32),
                "weight": np.ones(rows, dtype=np.float32),
                "label_click": (rng.random(rows) < truth).astype(np.float32),
                "p_click": np.clip(truth + noise * rng.standard_normal(rows), 0.01, 0.99),
            }
        )
    )


RUNS = {"unified": predictions(0.0), "merged": predictions(0.2)}


def test_lifts_show_the_paired_differences_and_their_intervals() -> None:
    comparison = compare(RUNS, reference="merged", resamples=100)
    figure = figures.lifts(comparison, task="click")
    assert [panel.get_title() for panel in figure.axes] == ["sr", "hf"]
    for panel in figure.axes:
        found = comparison.differences["unified"][panel.get_title()]["click"]["auc"]
        point, _, bars = panel.containers[0]
        assert point.get_xdata()[0] == found.value
        np.testing.assert_allclose(bars[0].get_segments()[0][:, 0], [found.low, found.high])
    assert figure.get_supxlabel() == "AUC less that of merged; better to the right"


def test_reliability_shows_the_deciles_with_wilson_intervals() -> None:
    figure = figures.reliability(RUNS, task="click")
    panel = next(p for p in figure.axes if p.get_title() == "hf")
    table = deciles(RUNS["unified"].rows("hf", "click"))
    point, _, bars = panel.containers[0]
    np.testing.assert_array_equal(point.get_xdata(), table.mean_p)
    np.testing.assert_array_equal(point.get_ydata(), table.mean_label)
    low, high = bars[0].get_segments()[0][:, 1]
    assert low < table.mean_label[0] < high


def test_wilson_of_one_in_ten_is_the_textbooks() -> None:
    low, high = figures._wilson(np.array([0.1]), np.array([10.0]))
    assert (low[0], high[0]) == pytest.approx((0.01787, 0.40415), abs=1e-5)


def test_roc_ends_in_the_corners_and_names_the_auc() -> None:
    figure = figures.roc(RUNS, task="click", surfaces=["hf"])
    (panel,) = figure.axes
    line = panel.lines[0]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (0, 0)
    assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (1, 1)
    comparison = compare({"unified": RUNS["unified"]}, resamples=0)
    value = comparison.scores["unified"]["hf"]["click"]["auc"].value
    assert panel.get_legend() is not None
    assert panel.get_legend().get_texts()[0].get_text() == f"unified {value:.4f}"


def test_every_figure_can_be_written() -> None:
    drawn = [
        figures.lifts(compare(RUNS, resamples=20), task="click", metric="ne"),
        figures.shares(np.array([[0.2, 0.8], [0.5, 0.5]]), rows=["hf", "sr"], columns=["a", "b"], title="gates"),
        figures.bars({"hf": {"int8": (1.0, 0.9, 1.2), "fp32": (2.0, 1.9, 2.2)}}, title="cost", label="ms"),
        figures.curves({"loss": ([1, 2, 3], [0.3, 0.2, 0.1])}, title="training", x="step", y="loss"),
    ]
    for figure in drawn:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert len(file.getvalue()) > 5000
    texts = [t.get_text() for t in drawn[1].axes[0].texts]
    assert texts == ["0.20", "0.80", "0.50", "0.50"]
