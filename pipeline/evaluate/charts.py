"""Forms of figures that know nothing of runs: bars, bands, points, shares.

Each function returns a Matplotlib figure, titled and labelled, readable in grey: series differ by marker and line, not
by colour alone. Figures are made without pyplot, so nothing is left open and no display is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, StrMethodFormatter

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREYS = ("#111111", "#777777", "#444444", "#999999", "#222222", "#555555", "#888888")
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
# Value and ends of its interval; None where there is none.
Triple = tuple[float | None, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Band:
    """A line with intervals; N points.

    Args:
        x: numbers, or names of steps.
        y: values.
        low, high: ends of the intervals, NaN where there is none; None for a line without.
        joined: whether a line joins the points.
    """

    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    joined: bool = True

    @classmethod
    def of(cls, x: Sequence[float] | Sequence[str], triples: Sequence[Triple]) -> Band:
        """A line through triples that have values; what lacks an end gets no interval."""
        ends = np.array([(low, high) for _, low, high in triples], dtype=float).reshape(-1, 2)
        ends[np.isnan(ends).any(axis=1)] = np.nan
        y = np.array([value for value, _, _ in triples], dtype=float)
        return cls(x=x, y=y.tolist(), low=ends[:, 0].tolist(), high=ends[:, 1].tolist())


def shares(values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """A table of shares as shades of grey with the numbers in them, such as what share of a gate each expert has.

    Args:
        values: float [rows, columns], each in [0, 1].
        rows, columns: their names.
        title: of the figure.
    """
    # As wide as its title at least, which is not shrunk to fit.
    width = max(1.6 + 0.8 * len(columns), 0.5 + 0.09 * len(title))
    figure = Figure(figsize=(width, 1.2 + 0.4 * len(rows)), layout="constrained", dpi=120)
    panel = figure.subplots()
    # The largest share is a middle grey, on which black numbers can be read.
    panel.imshow(values, cmap="Greys", vmin=0.0, vmax=max(1e-9, 2 * float(values.max())), aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="black")
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xticks(range(len(columns)), columns)
    figure.suptitle(title)
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
    figure, (panel,) = panels_in_a_row(
        1, height=3.2, width=max(4.0, 1.1 * len(groups) * max(1, len(names)) ** 0.5 + 1.5)
    )
    width = 0.8 / len(names)
    hatches = ("", "//", "..", "xx", "\\\\")
    for i, name in enumerate(names):
        found = np.array([values[group][name] for group in groups])
        places = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        panel.bar(
            places,
            found[:, 0],
            width,
            # What has no width was not measured and gets no caps.
            yerr=[found[:, 0] - found[:, 1], found[:, 2] - found[:, 0]] if np.ptp(found, axis=1).any() else None,
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


def bands(
    panels: Mapping[str, Mapping[str, Band]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    level: float | None = None,
    columns: int = 4,
) -> Figure:
    """Lines with intervals: a panel for each name, a line for each series in it; one legend for all.

    Args:
        panels: panel -> series -> line.
        title: of the figure.
        x, y: of the axes, with units.
        log_x, log_y: whether they are logarithmic; on a logarithmic x, intervals of several series stand side by side.
        level: a value to mark by a line across.
        columns: the most panels in a row.
    """
    names = list(dict.fromkeys(series for lines in panels.values() for series in lines))
    rows = -(-len(panels) // columns)
    columns = -(-len(panels) // rows)  # five panels of at most four in a row are three and two
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, 3.0 * columns + 0.7), 2.4 * rows + 1.1), layout="constrained", dpi=120)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (panel, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, band in lines.items():
            # Side by side, so that the intervals of series do not hide each other.
            aside = 1.07 ** (names.index(name) - (len(names) - 1) / 2) if log_x and band.low is not None else 1.0
            _draw_band(axis, name, band, names.index(name), aside=aside)
        if level is not None:
            axis.axhline(level, color="#999999", linewidth=1, zorder=0)
        if len(panels) > 1:
            axis.set_title(panel)
        for log, name, ticks in ((log_x, "x", axis.xaxis), (log_y, "y", axis.yaxis)):
            if log:
                axis.set(**{f"{name}scale": "log"})
                ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
                # Over a decade or two the powers of ten alone would say too little.
                ticks.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        words = list(dict.fromkeys(value for band in lines.values() for value in band.x if isinstance(value, str)))
        if words:
            # Anchored at its end, a long name leans away from its neighbour; many stand upright.
            leaning = 45 if len(words) <= 10 else 90
            anchor = {"ha": "right", "va": "center" if leaning == 90 else "top", "rotation_mode": "anchor"}
            axis.set_xticks(range(len(words)), words, rotation=leaning, **anchor)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    figure.suptitle(title)
    if len(names) > 1:
        handles = {n: h for axis in axes.flat for h, n in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    return figure


def _draw_band(axis: Axes, name: str, band: Band, i: int, *, aside: float = 1.0) -> None:
    """Draw one series; places that are numbers are moved by a factor."""
    x = [value if isinstance(value, str) else value * aside for value in band.x]
    y, few = np.asarray(band.y, dtype=float), len(band.x) <= 20
    error = None
    if band.low is not None and band.high is not None:
        low, high = np.asarray(band.low, dtype=float), np.asarray(band.high, dtype=float)
        if few:
            error = [y - low, high - y]
        else:
            # Bars at so many points would hide the line.
            axis.fill_between(x, low, high, color=GREYS[i % len(GREYS)], alpha=0.25, linewidth=0)
    axis.errorbar(
        x,
        y,
        yerr=error,
        marker=MARKERS[i % len(MARKERS)] if few else None,
        markersize=4,
        linestyle=LINES[i % len(LINES)] if band.joined else "none",
        color=GREYS[i % len(GREYS)],
        capsize=2,
        linewidth=1.2,
        label=name,
    )


def points(
    values: Mapping[str, Mapping[str, Triple]],
    *,
    title: str,
    label: str,
    at: float = 0.0,
    margin: float | None = None,
) -> Figure:
    """A line for each row, a marker for each name, with intervals along the line.

    Args:
        values: row -> name -> (value, low, high); without a value nothing is drawn, without ends no interval.
        title: of the figure.
        label: of the axis of values, with its unit.
        at: the value that means no difference, marked by a line.
        margin: a bound to mark by a broken line.
    """
    rows = list(values)
    names = list(dict.fromkeys(name for of in values.values() for name in of))
    figure, (panel,) = panels_in_a_row(1, height=1.4 + 0.24 * len(rows) * max(1.6, len(names)), width=6.4)
    for i, row in enumerate(rows):
        for j, (name, (value, low, high)) in enumerate(values[row].items()):
            if value is None:
                continue
            k = names.index(name)
            error = None if low is None or high is None else [[value - low], [high - value]]
            place = i + (j - (len(values[row]) - 1) / 2) * 0.7 / max(2, len(names))
            panel.errorbar(
                value,
                place,
                xerr=error,
                fmt=MARKERS[k % len(MARKERS)],
                color=GREYS[k % len(GREYS)],
                capsize=2,
                markersize=5,
                linewidth=1.2,
            )
    panel.axvline(at, color="#999999", linewidth=1, zorder=0)
    if margin is not None:
        panel.axvline(margin, color="#555555", linewidth=1, linestyle="--", zorder=0)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xlabel(label)
    panel.locator_params(axis="x", nbins=8)
    if len(names) > 1:
        handles = [
            Line2D([], [], color=GREYS[k % len(GREYS)], marker=MARKERS[k % len(MARKERS)], linestyle="", label=name)
            for k, name in enumerate(names)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    return figure


def panels_in_a_row(
    count: int, *, height: float, width: float | None = None, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of panels, in a style that prints."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width or 3.3 * count + 0.7, height), layout="constrained", dpi=120)
        return figure, list(figure.subplots(1, count, squeeze=False, sharey=share_y)[0])
