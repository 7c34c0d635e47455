"""The figures of runs: lifts with intervals, reliability, ROC, calibration of slices.

Each function returns a Matplotlib figure in the style of `pipeline.evaluate.charts`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from pipeline.evaluate import charts
from pipeline.evaluate.bootstrap import Estimate, UserBootstrap, roc_intervals
from pipeline.evaluate.charts import GREYS, LINES, MARKERS, STYLE, Triple, panels_in_a_row
from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.metrics import LOWER_IS_BETTER, deciles, undefined, wilson
from pipeline.evaluate.predictions import USER_ID, Predictions, TaskRows
from pipeline.evaluate.seeds import SeedSpread

# False positive rates of the bars on a ROC curve, and how far apart two runs' stand.
ROC_BARS, ROC_SIDE = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), 0.03
NAMES = {"auc": "AUC", "ne": "normalised entropy", "log_loss": "log loss", "calibration": "calibration ratio"}


def lifts(
    comparison: Comparison,
    *,
    task: str,
    metric: str = "auc",
    seeds: Mapping[str, Mapping[str, SeedSpread]] | None = None,
) -> Figure:
    """Differences of every run to the reference, one panel a surface, with paired intervals.

    Args:
        comparison: of at least two runs.
        task: such as click.
        metric: of `pipeline.evaluate.metrics.METRICS`.
        seeds: from `pipeline.evaluate.seeds.over_seeds`; adds each seed and a wide bar, the interval over both.
    """
    runs = list(comparison.differences)
    surfaces = list(next(iter(comparison.differences.values())))
    figure, panels = panels_in_a_row(
        len(surfaces),
        height=1.2 + 0.45 * len(runs),
        width=None if seeds is None else 3.3 * len(surfaces) + 2.6,
        share_y=True,
    )
    for panel, surface in zip(panels, surfaces, strict=True):
        for i, run in enumerate(runs):
            found = comparison.differences[run][surface][task][metric]
            if found.value is None:
                panel.annotate("undefined", (0, i), ha="center", va="center")
                continue
            low, high = found.low, found.high
            error = None if low is None or high is None else [[found.value - low], [high - found.value]]
            panel.errorbar(found.value, i, xerr=error, fmt=MARKERS[i % len(MARKERS)], color=GREYS[0], capsize=3)
            if seeds is not None:
                _draw_seeds(panel, seeds[run][surface], i)
        panel.axvline(0, color="#999999", linewidth=1)
        panel.set_title(surface)
        panel.set_ylim(len(runs) - 0.5, -0.5)
        panel.set_yticks(range(len(runs)), runs)
        panel.locator_params(axis="x", nbins=5)
    side = "left" if metric in LOWER_IS_BETTER else "right"
    figure.supxlabel(
        fontsize=9,
        t=f"{NAMES.get(metric, metric)} less that of {comparison.reference}"
        + ("" if metric == "calibration" else f"; better to the {side}"),
    )
    what = f"{task}: {NAMES.get(metric, metric)} against {comparison.reference}"
    percent = f"{100 * comparison.level:g} %"
    if seeds is None:
        figure.suptitle(f"{what}, {percent} over users")
        return figure
    figure.suptitle(what)
    handles = [
        Line2D([], [], color=GREYS[0], marker="o", label=f"mean of seeds,\n{percent} over users"),
        Line2D([], [], color="#bbbbbb", linewidth=6, label=f"{percent} over users\nand seeds"),
        Line2D([], [], color="#555555", linestyle="", marker="|", markersize=9, label="one seed"),
    ]
    if all(of.difference.low is None for surfaces_of in seeds.values() for of in surfaces_of.values()):
        del handles[1]  # an arm has one seed, whose spread nobody knows
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def _draw_seeds(panel: Axes, spread: SeedSpread, place: int) -> None:
    low, high = spread.difference.low, spread.difference.high
    if low is not None and high is not None:
        panel.plot([low, high], [place, place], color="#bbbbbb", linewidth=6, solid_capstyle="butt", zorder=0)
    # Beside the line, so that a seed does not hide behind the point.
    panel.plot(spread.seeds, [place + 0.22] * len(spread.seeds), "|", color="#555555", markersize=9)


def reliability(
    runs: Mapping[str, Predictions], *, task: str, surfaces: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Observed rate against predicted probability by score decile, one panel a surface.

    The bars are 95 % intervals of the observed rate over rows, by `pipeline.evaluate.metrics.wilson`.

    Args:
        runs: predictions by name.
        task: such as click.
        surfaces: which; None takes all.
        title: of the figure; None says the task and what is shown.
    """
    surfaces = tuple(surfaces or next(iter(runs.values())).surfaces)
    figure, panels = panels_in_a_row(len(surfaces), height=3.4 if len(runs) == 1 else 3.7)
    for panel, surface in zip(panels, surfaces, strict=True):
        top = 0.0
        for i, (name, predictions) in enumerate(runs.items()):
            table = deciles(predictions.rows(surface, task))
            low, high = wilson(table.mean_label, table.effective)
            panel.errorbar(
                table.mean_p,
                table.mean_label,
                yerr=[table.mean_label - low, high - table.mean_label],
                fmt=MARKERS[i % len(MARKERS)] + LINES[i % len(LINES)],
                color=GREYS[i % len(GREYS)],
                # Every other one hollow and small, so that runs which agree do not hide each other.
                fillstyle="none" if i % 2 else "full",
                markersize=5,
                capsize=2,
                linewidth=1,
                label=name,
            )
            top = max(top, float(high.max()), float(table.mean_p.max())) if table.weight.size else top
        panel.plot([0, top], [0, top], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(surface)
        panel.set_xlabel("predicted probability")
    panels[0].set_ylabel("observed rate")
    if len(runs) > 1:
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False
        )
    figure.suptitle(title or f"{task}: reliability by score decile, 95 % over rows")
    return figure


def roc(
    runs: Mapping[str, Predictions], *, task: str, surfaces: Sequence[str] | None = None, resamples: int = 1000
) -> Figure:
    """Receiver operating characteristic, one panel a surface; AUC in the legend.

    The bars are 95 % intervals of the true positive rate over users, each at one false positive rate; those of
    different runs stand side by side.

    Args:
        runs: predictions by name, of the same users.
        task: such as click.
        surfaces: which; None takes all.
        resamples: of the users; 0 draws no intervals.
    """
    from sklearn.metrics import roc_curve  # costs 2 s to import

    first = next(iter(runs.values()))
    surfaces = tuple(surfaces or first.surfaces)
    users = UserBootstrap(first.table[USER_ID].to_numpy(), resamples=resamples)
    figure, panels = panels_in_a_row(len(surfaces), height=3.8)
    for panel, surface in zip(panels, surfaces, strict=True):
        for i, (name, predictions) in enumerate(runs.items()):
            rows: TaskRows = predictions.rows(surface, task)
            if "auc" in undefined(rows):
                continue
            false, true, _ = roc_curve(rows.label, rows.p, sample_weight=rows.weight)
            # A few hundred points draw what a hundred thousand would.
            keep = np.unique(np.linspace(0, false.size - 1, 400).astype(int))
            line, grey, marker = (of[i % len(of)] for of in (LINES, GREYS, MARKERS))
            panel.plot(false[keep], true[keep], linewidth=1.2, linestyle=line, color=grey)
            found = roc_intervals(rows, users, ROC_BARS + ROC_SIDE * (i - (len(runs) - 1) / 2))
            _draw_points(panel, found.at, found.true, marker=marker, color=grey)
            label = f"{name} {found.auc.value:.4f}"
            if found.auc.low is not None:
                label += f" [{found.auc.low:.4f}, {found.auc.high:.4f}]"
            panel.plot([], [], label=label, linewidth=1.2, linestyle=line, color=grey, marker=marker, markersize=4)
        panel.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(surface)
        panel.set_xlabel("false positive rate")
        if panel.get_legend_handles_labels()[0]:
            # Below the panel: within it a name of any length covers a curve.
            panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), title="AUC")
    panels[0].set_ylabel("true positive rate")
    figure.suptitle(f"{task}: receiver operating characteristic" + (", 95 % intervals over users" if resamples else ""))
    return figure


def _draw_points(panel: Axes, x: np.ndarray, found: Sequence[Estimate], *, marker: str, color: str) -> None:
    """Values with their intervals; those without an interval are left out."""
    whole = [(at, e.value, e.low, e.high) for at, e in zip(x, found, strict=True) if e.low is not None]
    if whole:
        at, value, low, high = np.array(whole, dtype=float).T
        error = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
        panel.errorbar(at, value, yerr=error, fmt=marker, color=color, capsize=2, markersize=3.5, linewidth=1)


def gates(metrics: Mapping[str, float]) -> Figure | None:
    """The mean weight that the gate of each surface and task gives each expert; None where there are no gates.

    Args:
        metrics: of a training report, those called `train/gates/SURFACE/TASK/expert_E` among them.
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if (match := re.fullmatch(r"train/gates/(\w+)/(\w+)/expert_(\d+)", name)) is not None:
            surface, task, expert = match.groups()
            found.setdefault(f"{surface} {task}", {})[f"expert {expert}"] = value
    if not found:
        return None
    experts = list(next(iter(found.values())))
    values = np.array([[of[expert] for expert in experts] for of in found.values()])
    return charts.shares(values, rows=list(found), columns=experts, title="mean gate weight, last report of training")


def slices(
    found: Mapping[str, Mapping[str, Mapping[str, Triple]]], *, title: str, label: str, at: float = 1.0
) -> Figure:
    """A ratio on parts of the rows: a line of panels for each surface, a panel for each kind of slice.

    Args:
        found: surface -> kind (such as day) -> slice -> (value, low, high); without a value nothing is drawn. Values
            past a tenth or ten times are triangles at the edge.
        title: of the figure.
        label: of the axis of ratios, which is logarithmic.
        at: the ratio that is right, marked by a line.
    """
    surfaces, kinds = list(found), list(next(iter(found.values())))
    widths = [max(2, *(len(found[s][kind]) for s in surfaces)) for kind in kinds]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(1.6 + 0.36 * sum(widths) + 0.5 * len(kinds), 1.1 + 1.9 * len(surfaces)),
            layout="constrained",
            dpi=120,
        )
        axes = figure.subplots(len(surfaces), len(kinds), squeeze=False, sharey=True, sharex="col", width_ratios=widths)
    for i, surface in enumerate(surfaces):
        for panel, kind in zip(axes[i], kinds, strict=True):
            names = list(found[surface][kind])
            for j, (value, low, high) in enumerate(found[surface][kind].values()):
                if value is None or value <= 0:
                    continue
                error = None if low is None or high is None else [[value - low], [high - value]]
                panel.errorbar(j, value, yerr=error, fmt=MARKERS[0], color=GREYS[0], capsize=2, markersize=4)
            panel.axhline(at, color="#999999", linewidth=1, zorder=0)
            panel.set_yscale("log")
            panel.set_xlim(-0.6, max(1, len(names) - 1) + 0.6 if len(names) > 1 else 0.6)
            leaning = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            panel.set_xticks(range(len(names)), names, **(leaning if max(map(len, names), default=0) > 5 else {}))
            if i == 0:
                panel.set_title(kind)
        axes[i][0].set_ylabel(surface, fontsize=10)
    low, high = _ratio_axis(axes[0][0])
    for panel, places in zip(axes.flat, (found[s][k] for s in surfaces for k in kinds), strict=True):
        for j, (value, _, _) in enumerate(places.values()):
            if value is not None and not low <= value <= high:
                over = value > high
                edge, marker = (high, "^") if over else (low, "v")
                panel.plot(j, edge, marker, color=GREYS[0], fillstyle="none", clip_on=False, markersize=6)
    figure.supylabel(label, fontsize=9)
    figure.suptitle(title)
    return figure


def _ratio_axis(panel: Axes) -> tuple[float, float]:
    """Ends of a logarithmic axis of ratios around 1, its ticks at round numbers and never so many that they meet."""
    low, high = panel.get_ylim()
    low, high = max(0.1, min(low, 0.8)), min(10.0, max(high, 1.25))
    panel.set_ylim(low, high)
    fine = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75)
    coarse = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    panel.yaxis.set_major_locator(FixedLocator(fine if high / low < 3 else coarse))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    return low, high
