"""What the figures show, read back from their axes."""

from __future__ import annotations

import io

import numpy as np
import polars as pl
import pytest

from pipeline.evaluate import charts, figures
from pipeline.evaluate.compare import compare
from pipeline.evaluate.metrics import deciles, wilson
from pipeline.evaluate.predictions import Predictions
from pipeline.evaluate.seeds import over_seeds


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
    low, high = wilson(np.array([0.1]), np.array([10.0]))
    assert (low[0], high[0]) == pytest.approx((0.01787, 0.40415), abs=1e-5)


def test_wilson_holds_the_rate_where_nobody_or_everybody_clicked() -> None:
    # Rounding puts 0 out of the interval of 0 in 13 rows, say, and a bar of negative length cannot be drawn.
    rows = np.arange(1.0, 400.0)
    for rate in (0.0, 1.0):
        low, high = wilson(np.full(rows.size, rate), rows)
        assert (low <= rate).all()
        assert (high >= rate).all()
        assert ((high - low) < 1).all()


def test_roc_ends_in_the_corners_and_names_the_auc() -> None:
    figure = figures.roc(RUNS, task="click", surfaces=["hf"], resamples=100)
    (panel,) = figure.axes
    line = panel.lines[0]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (0, 0)
    assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (1, 1)
    # The same interval as in every report of these predictions.
    comparison = compare({"unified": RUNS["unified"]}, resamples=100)
    auc = comparison.scores["unified"]["hf"]["click"]["auc"]
    assert panel.get_legend() is not None
    assert panel.get_legend().get_texts()[0].get_text() == f"unified {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}]"
    # Bars stand on the curve, those of two runs side by side.
    first, second = (container[0] for container in panel.containers)
    np.testing.assert_allclose(first.get_xdata() + figures.ROC_SIDE, second.get_xdata())
    on_the_curve = np.interp(first.get_xdata(), line.get_xdata(), line.get_ydata())
    np.testing.assert_allclose(first.get_ydata(), on_the_curve)
    low, high = panel.containers[0][2][0].get_segments()[2][:, 1]
    assert low < first.get_ydata()[2] < high
    (panel,) = figures.roc(RUNS, task="click", surfaces=["hf"], resamples=0).axes
    assert not panel.containers
    assert panel.get_legend().get_texts()[0].get_text() == f"unified {auc.value:.4f}"


def test_lifts_over_seeds_add_the_wider_interval_and_each_seed() -> None:
    runs = {"merged": [predictions(0.2), predictions(0.25)], "unified": [predictions(0.0), predictions(0.05)]}
    comparison = compare(runs, resamples=100)
    spread = over_seeds(comparison, runs, task="click")
    figure = figures.lifts(comparison, task="click", seeds=spread)
    for panel in figure.axes:
        of = spread["unified"][panel.get_title()]
        drawn = [list(line.get_xdata()) for line in panel.lines]
        assert [of.difference.low, of.difference.high] in drawn
        assert list(of.seeds) in drawn
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["mean of seeds,\n95 % over users", "95 % over users\nand seeds", "one seed"]


def test_bands_show_values_and_ends() -> None:
    line = charts.Band(x=["1 h", "1 d"], y=[1.0, 2.0], low=[0.5, 1.5], high=[1.25, 3.0])
    bare = charts.Band(x=["1 h", "1 d"], y=[3.0, 4.0], joined=False)
    figure = charts.bands(
        {s: {"lift": line, "bare": bare} for s in ("hf", "sr", "rp")},
        title="t",
        x="age",
        y="ratio",
        level=1.0,
        columns=2,
    )
    shown = [a for a in figure.axes if a.get_visible()]
    assert [a.get_title() for a in shown] == ["hf", "sr", "rp"]
    segments = shown[1].containers[0][2][0].get_segments()
    assert [list(s[:, 1]) for s in segments] == [[0.5, 1.25], [1.5, 3.0]]
    assert shown[1].containers[1][0].get_linestyle() == "None"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["lift", "bare"]


def test_a_long_line_has_a_shaded_band_and_a_gap_where_there_is_no_interval() -> None:
    band = charts.Band.of(list(range(21)), [(2.0, 1.0, 4.0)] * 20 + [(3.0, None, 5.0)])
    assert band.y == [2.0] * 20 + [3.0]
    assert (band.low[0], band.high[0]) == (1.0, 4.0)
    assert np.isnan([band.low[20], band.high[20]]).all()
    (panel,) = charts.bands({"": {"loss": band}}, title="t", x="step", y="nats").axes
    assert list(panel.lines[0].get_ydata()) == band.y
    shade = panel.collections[0].get_paths()[0].vertices
    assert (shade[:, 0].max(), shade[:, 1].min(), shade[:, 1].max()) == (19.0, 1.0, 4.0)


def test_series_on_a_logarithmic_axis_stand_aside_of_each_other() -> None:
    lines = {name: charts.Band(x=[1, 100], y=[1.0, 2.0], low=[0.5, 1.5], high=[1.5, 2.5]) for name in "abc"}
    (panel,) = charts.bands({"hf": lines}, title="t", x="candidates", y="ms", log_x=True).axes
    places = [list(container[0].get_xdata()) for container in panel.containers]
    assert places[1] == [1.0, 100.0]
    assert places[0] == pytest.approx([1 / 1.07, 100 / 1.07])
    assert places[2] == pytest.approx([1.07, 107.0])


def test_points_show_what_was_measured_and_leave_out_what_was_not() -> None:
    values = {"hf": {"click": (0.1, 0.0, 0.2), "save": (None, None, None)}, "sr": {"save": (-0.1, None, None)}}
    figure = charts.points(values, title="t", label="difference", margin=-0.03)
    (panel,) = figure.axes
    assert [c[0].get_xdata()[0] for c in panel.containers] == [0.1, -0.1]
    assert list(panel.containers[0][2][0].get_segments()[0][:, 0]) == [0.0, 0.2]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["hf", "sr"]
    # One marker means the same in every row.
    assert panel.containers[0][0].get_marker() == charts.MARKERS[0]
    assert panel.containers[1][0].get_marker() == charts.MARKERS[1]


def test_gates_are_read_from_a_training_report() -> None:
    metrics = {"train/click/loss": 0.5, "train/gates/hf/click/entropy": 0.9}
    assert figures.gates(metrics) is None
    for surface, of in (("hf", (0.25, 0.75)), ("sr", (0.5, 0.5))):
        metrics |= {f"train/gates/{surface}/long_click/expert_{e}": share for e, share in enumerate(of)}
    figure = figures.gates(metrics)
    assert figure is not None
    (panel,) = figure.axes
    assert [text.get_text() for text in panel.texts] == ["0.25", "0.75", "0.50", "0.50"]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["hf long_click", "sr long_click"]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["expert 0", "expert 1"]


def test_slices_stand_in_a_panel_for_each_surface_and_kind() -> None:
    kinds = {"users": {"known": (1.1, 1.0, 1.2), "new": (None, None, None)}, "day": {"26-01-09": (0.9, None, None)}}
    figure = figures.slices({"hf": kinds, "sr": kinds}, title="t", label="ratio")
    assert len(figure.axes) == 4
    top = figure.axes[0]
    assert (top.get_title(), top.get_ylabel()) == ("users", "hf")
    assert [c[0].get_ydata()[0] for c in top.containers] == [1.1]
    assert [t.get_text() for t in figure.axes[2].get_xticklabels()] == ["known", "new"]
    low, high = top.get_ylim()
    assert low <= 0.8
    assert high >= 1.25


def test_every_figure_can_be_written() -> None:
    drawn = [
        figures.lifts(compare(RUNS, resamples=20), task="click", metric="ne"),
        charts.shares(np.array([[0.2, 0.8], [0.5, 0.5]]), rows=["hf", "sr"], columns=["a", "b"], title="gates"),
        charts.bars({"hf": {"int8": (1.0, 0.9, 1.2), "fp32": (2.0, 1.9, 2.2)}}, title="cost", label="ms"),
    ]
    for figure in drawn:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert len(file.getvalue()) > 5000
    texts = [t.get_text() for t in drawn[1].axes[0].texts]
    assert texts == ["0.20", "0.80", "0.50", "0.50"]
