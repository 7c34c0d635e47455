"""The figures of runs: lifts with intervals, reliability, ROC, shares of experts.

Each function returns a Matplotlib figure, titled and labelled, readable in grey: runs differ by marker and line, not by
colour alone. Figures are made without pyplot, so nothing is left open and no display is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.metrics import LOWER_IS_BETTER, auc, deciles, undefined
from pipeline.evaluate.predictions import Predictions, TaskRows

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREYS = ("#111111", "#777777", "#444444", "#999999", "#222222", "#555555", "#888888")
BOUND = 1.959964  # of a standard normal, 95 %
NAMES = {"auc": "AUC", "ne": "normalised entropy", "log_loss": "log loss", "calibration": "calibration ratio"}


def lifts(comparison: Comparison, *, task: str, metric: str = "auc") -> Figure:
    """Differences of every run to the reference, one panel a surface, with paired intervals.

    Args:
        comparison: of at least two runs.
        task: such as click.
        metric: of `pipeline.evaluate.metrics.METRICS`.
    """
    runs = list(comparison.differences)
    surfaces = list(next(iter(comparison.differences.values())))
    figure, panels = _panels(len(surfaces), height=1.2 + 0.45 * len(runs), share_y=True)
    for panel, surface in zip(panels, surfaces, strict=True):
        for i, run in enumerate(runs):
            found = comparison.differences[run][surface][task][metric]
            if found.value is None:
                panel.annotate("undefined", (0, i), ha="center", va="center")
                continue
            low, high = found.low, found.high
            error = None if low is None or high is None else [[found.value - low], [high - found.value]]
            panel.errorbar(found.value, i, xerr=error, fmt=MARKERS[i % len(MARKERS)], color=GREYS[0], capsize=3)
        panel.axvline(0, color="#999999", linewidth=1)
        panel.set_title(surface)
        panel.set_ylim(len(runs) - 0.5, -0.5)
        panel.set_yticks(range(len(runs)), runs)
    side = "left" if metric in LOWER_IS_BETTER else "right"
    figure.supxlabel(
        f"{NAMES.get(metric, metric)} less that of {comparison.reference}"
        + ("" if metric == "calibration" else f"; better to the {side}")
    )
    figure.suptitle(f"{task}: lift over {comparison.reference}, {comparison.level:.0%} intervals over users")
    return figure


def reliability(runs: Mapping[str, Predictions], *, task: str, surfaces: Sequence[str] | None = None) -> Figure:
    """Observed rate against predicted probability by score decile, one panel a surface.

    The bars are 95 % intervals of the observed rate (Wilson, "Probable inference", JASA 1927).
    """
    surfaces = tuple(surfaces or next(iter(runs.values())).surfaces)
    figure, panels = _panels(len(surfaces), height=3.4)
    for panel, surface in zip(panels, surfaces, strict=True):
        top = 0.0
        for i, (name, predictions) in enumerate(runs.items()):
            table = deciles(predictions.rows(surface, task))
            low, high = _wilson(table.mean_label, table.weight)
            panel.errorbar(
                table.mean_p,
                table.mean_label,
                yerr=[table.mean_label - low, high - table.mean_label],
                fmt=MARKERS[i % len(MARKERS)] + LINES[i % len(LINES)],
                color=GREYS[i % len(GREYS)],
                capsize=2,
                linewidth=1,
                label=name,
            )
            top = max(top, float(high.max()), float(table.mean_p.max())) if table.weight.size else top
        panel.plot([0, top], [0, top], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(surface)
        panel.set_xlabel("predicted probability")
    panels[0].set_ylabel("observed rate")
    panels[-1].legend(frameon=False)
    figure.suptitle(f"{task}: reliability by score decile")
    return figure


def roc(runs: Mapping[str, Predictions], *, task: str, surfaces: Sequence[str] | None = None) -> Figure:
    """Receiver operating characteristic, one panel a surface; AUC in the legend."""
    from sklearn.metrics import roc_curve  # costs 2 s to import

    surfaces = tuple(surfaces or next(iter(runs.values())).surfaces)
    figure, panels = _panels(len(surfaces), height=3.4)
    for panel, surface in zip(panels, surfaces, strict=True):
        for i, (name, predictions) in enumerate(runs.items()):
            rows: TaskRows = predictions.rows(surface, task)
            if "auc" in undefined(rows):
                continue
            false, true, _ = roc_curve(rows.label, rows.p, sample_weight=rows.weight)
            # A few hundred points draw what a hundred thousand would.
            keep = np.unique(np.linspace(0, false.size - 1, 400).astype(int))
            label = f"{name} {auc(rows):.4f}"
            line, grey = LINES[i % len(LINES)], GREYS[i % len(GREYS)]
            panel.plot(false[keep], true[keep], label=label, linewidth=1.2, linestyle=line, color=grey)
        panel.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(surface)
        panel.set_xlabel("false positive rate")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, loc="lower right", title="AUC")
    panels[0].set_ylabel("true positive rate")
    figure.suptitle(f"{task}: receiver operating characteristic")
    return figure


def shares(values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """A table of shares as shades of grey with the numbers in them, such as what share of a gate each expert has.

    Args:
        values: float [rows, columns], each in [0, 1].
        rows, columns: their names.
        title: of the figure.
    """
    figure = Figure(figsize=(1.6 + 0.8 * len(columns), 1.2 + 0.4 * len(rows)), layout="constrained", dpi=120)
    panel = figure.subplots()
    panel.imshow(values, cmap="Greys", vmin=0.0, vmax=max(1e-9, float(values.max())), aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = value > 0.6 * float(values.max())
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_title(title)
    return figure


def bars(
    values: Mapping[str, Mapping[str, tuple[float, float, float]]], *, title: str, label: str, log: bool = False
) -> Figure:
    """Groups of bars with intervals.

    Args:
        values: group -> bar -> (value, low, high); every group has the same bars.
        title: of the figure.
        label: of the axis of values, with its unit.
        log: whether that axis is logarithmic.
    """
    groups, names = list(values), list(next(iter(values.values())))
    figure, (panel,) = _panels(1, height=3.2, width=max(4.0, 1.1 * len(groups) * max(1, len(names)) ** 0.5 + 1.5))
    width = 0.8 / len(names)
    hatches = ("", "//", "..", "xx", "\\\\")
    for i, name in enumerate(names):
        found = np.array([values[group][name] for group in groups])
        places = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        panel.bar(
            places,
            found[:, 0],
            width,
            yerr=[found[:, 0] - found[:, 1], found[:, 2] - found[:, 0]],
            capsize=2,
            color="white",
            edgecolor="black",
            hatch=hatches[i % len(hatches)],
            label=name,
        )
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel(label)
    if log:
        panel.set_yscale("log")
    if len(names) > 1:
        panel.legend(frameon=False)
    figure.suptitle(title)
    return figure


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x: str, y: str, log_x: bool = False
) -> Figure:
    """Lines, one a series of (x values, y values)."""
    figure, (panel,) = _panels(1, height=3.2, width=5.5)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        panel.plot(
            xs,
            ys,
            marker=MARKERS[i % len(MARKERS)] if len(xs) <= 20 else None,
            linestyle=LINES[i % len(LINES)],
            color=GREYS[i % len(GREYS)],
            label=name,
            linewidth=1.2,
        )
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    if log_x:
        panel.set_xscale("log")
    if len(series) > 1:
        panel.legend(frameon=False)
    figure.suptitle(title)
    return figure


def _panels(
    count: int, *, height: float, width: float | None = None, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of panels, in a style that prints."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(width or 3.3 * count + 0.7, height), layout="constrained", dpi=120)
        return figure, list(figure.subplots(1, count, squeeze=False, sharey=share_y)[0])


def _wilson(rate: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a rate over so many rows, arrays [B]."""
    centre = rate + BOUND**2 / (2 * rows)
    half = BOUND * np.sqrt(rate * (1 - rate) / rows + BOUND**2 / (4 * rows**2))
    scale = 1 + BOUND**2 / rows
    return np.maximum((centre - half) / scale, 0.0), np.minimum((centre + half) / scale, 1.0)
