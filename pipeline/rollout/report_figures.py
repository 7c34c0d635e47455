"""The figures of a wave's report, as SVG text: lifts, reliability, cost, ladder.

Colours help and are never needed: what belongs together shares a marker, a line or a shade that prints in grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.rollout.measurements import CostMeasurements, Interval
from pipeline.rollout.plan import RolloutPlan
from pipeline.rollout.results import Curve, WaveResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, PLAIN, SOFT, INK, FAINT = "#1a7f4b", "#c0392b", "#2c5d8f", "#9aa5b1", "#1f2933", "#52606d"
_SURFACES = ((PLAIN, "o", "-"), ("#c77d1e", "s", "--"), (GOOD, "^", "-."), ("#7d4bb0", "D", ":"), (BAD, "v", "-"))
# A number beside a line stays readable where the line runs through it.
_HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}


def lifts(result: WaveResult, plan: RolloutPlan) -> str:
    """Differences of AUC and NE to what each surface is compared with, with intervals and the gates' margins."""
    rows = [(s, t, of) for s, m in result.measurements.items() for t, of in m.tasks.items()][::-1]
    figure, (left, right) = _figure(9.5, 1.1 + 0.42 * max(1, len(rows)), 2, sharey=True)
    limits = plan.thresholds
    for axis, name, title, margin, sign in (
        (left, "auc_difference", "AUC, right is better", -limits.auc_margin, 1),
        (right, "ne_difference", "NE, left is better", limits.ne_margin, -1),
    ):
        axis.axvline(0, color=INK, linewidth=0.8, zorder=0)
        axis.axvline(margin, color=BAD, linewidth=1, linestyle="--", zorder=0)
        axis.set_title(title, fontsize=9, loc="left", color=FAINT)
        axis.set_xlabel(f"difference in {title.partition(',')[0]}", fontsize=8)
        for y, (_, _, of) in enumerate(rows):
            d: Interval | None = getattr(of, name)
            if d is None or d.value is None or d.low is None or d.high is None:
                axis.text(0, y, " not measured", fontsize=8, color=BAD, va="center")
                continue
            low, high = sorted((sign * d.low, sign * d.high))
            # Filled where the interval leaves out 0, so that it shows without colour too.
            colour, told = (GOOD, True) if low > 0 else (BAD, True) if high < 0 else (PLAIN, False)
            axis.plot([d.low, d.high], [y, y], color=colour, linewidth=2)
            axis.plot(d.value, y, "o", color=colour, markersize=5, markerfacecolor=colour if told else "white")
            place: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "bbox": _HALO}
            axis.annotate(f"{d.value:+.4f}", (d.value, y), fontsize=7, **place)
    left.set_yticks(range(len(rows)), [f"{s} {t}" for s, t, _ in rows])
    left.set_ylim(-0.6, len(rows) - 0.3)
    return _svg(figure)


def reliability(result: WaveResult) -> str:
    """Observed rate over predicted probability by score decile, first task, a panel for each surface."""
    surfaces = list(result.curves)
    figure, axes = _figure(9.5, 3.5, max(1, len(surfaces)))
    for axis, surface in zip(axes, surfaces, strict=False):
        task, models = next(iter(result.curves[surface].items()))
        rival = "trivial baseline" if result.champions[surface] is None else "champion"
        kinds: tuple[tuple[str, str, dict[str, Any]], ...] = (
            ("champion", rival, {"color": SOFT, "fmt": "s--", "markerfacecolor": "white"}),
            ("challenger", "challenger", {"color": PLAIN, "fmt": "o-"}),
        )
        drawn = [_draw_curve(axis, models[name], label, form) for name, label, form in kinds if name in models]
        axis.plot([0, max(drawn, default=1.0)], [0, max(drawn, default=1.0)], color=INK, linewidth=0.8, linestyle=":")
        axis.set_title(f"{surface}, {task}", fontsize=9, loc="left", color=FAINT)
        axis.set_xlabel("predicted probability", fontsize=8)
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    axes[0].set_ylabel("observed rate", fontsize=8)
    return _svg(figure)


def _draw_curve(axis: Axes, curve: Curve, label: str, form: dict[str, Any]) -> float:
    """Draw a curve with the intervals of its rates; returns the largest value that it holds."""
    error = [
        [rate - low for rate, low in zip(curve.mean_label, curve.low, strict=True)],
        [high - rate for rate, high in zip(curve.mean_label, curve.high, strict=True)],
    ]
    axis.errorbar(
        curve.mean_p, curve.mean_label, yerr=error, label=label, markersize=4, linewidth=1.2, elinewidth=0.8, **form
    )
    return max([0.0, *curve.mean_p, *curve.high])


def cost(result: WaveResult, plan: RolloutPlan) -> str:
    """Milliseconds of a request of the separate model, the champion and the challenger, and the envelope."""
    surfaces = list(result.measurements)
    figure, (axis,) = _figure(9.5, 0.9 + 0.75 * len(surfaces), 1)
    kinds = (
        ("separate", SOFT, result.separate_cost),
        # Where nothing served, the separate model's cost stands in for the champion's and is not drawn twice.
        ("champion", "#7fa8cf", {s: c for s, c in result.champion_cost.items() if result.champions[s] is not None}),
        ("challenger", PLAIN, {s: m.cost for s, m in result.measurements.items()} if result.wave else {}),
    )
    shown = {name: None for name, _, of in kinds for s in surfaces if s in of}
    for i, surface in enumerate(surfaces[::-1]):
        for name, colour, costs in kinds:
            if surface not in costs or costs[surface].ms is None:
                continue
            y = i + 0.25 * ((len(shown) - 1) / 2 - list(shown).index(name))
            _draw_cost(axis, costs[surface], y, colour)
        separate = result.separate_cost[surface].ms if surface in result.separate_cost else None
        if separate is not None:
            limit = separate * plan.thresholds.cost_growth
            axis.plot([limit, limit], [i - 0.4, i + 0.4], color=BAD, linewidth=1.2, linestyle="--")
    axis.set_yticks(range(len(surfaces)), surfaces[::-1])
    axis.set_xlabel("ms a request; dashed: the envelope", fontsize=8)
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour, _ in kinds if name in shown]
    axis.legend(handles=handles, fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return _svg(figure)


def _draw_cost(axis: Axes, cost: CostMeasurements, y: float, colour: str) -> None:
    assert cost.ms is not None
    low, high = cost.ms_interval or (cost.ms, cost.ms)
    axis.barh(y, cost.ms, height=0.22, color=colour)
    if cost.ms_interval is not None:
        axis.errorbar(cost.ms, y, xerr=[[cost.ms - low], [high - cost.ms]], color=INK, linewidth=1, capsize=2)
    axis.annotate(f"{cost.ms:.2f}", (high, y), (4, 0), textcoords="offset points", fontsize=7, va="center")


def ladder(result: WaveResult) -> str:
    """First task's AUC and cost by step, with intervals, a line for each surface; hollow where the step was dropped."""
    steps = [r.step for r in result.rungs]
    figure, (left, right) = _figure(9.5, 3.4, 2)
    surfaces = list(result.measurements)
    for k, (surface, (colour, marker, line)) in enumerate(zip(surfaces, _SURFACES, strict=False)):
        auc = {i: next(iter(r.auc[surface].values())) for i, r in enumerate(result.rungs) if surface in r.auc}
        costs = {i: r.cost[surface] for i, r in enumerate(result.rungs) if surface in r.cost}
        series = (
            {i: (of.value, of.low, of.high) for i, of in auc.items()},
            {i: (of.ms, *(of.ms_interval or (None, None))) for i, of in costs.items()},
        )
        for axis, values in zip((left, right), series, strict=True):
            known = {i: (v, low, high) for i, (v, low, high) in values.items() if v is not None}
            # Side by side, so that the intervals of surfaces do not hide each other.
            places = {i: i + 0.12 * (k - (len(surfaces) - 1) / 2) for i in known}
            axis.plot(list(places.values()), [v for v, _, _ in known.values()], line, color=colour, linewidth=1.2)
            for i, (v, low, high) in known.items():
                error = None if low is None or high is None else [[max(0, v - low)], [max(0, high - v)]]
                face = colour if result.rungs[i].kept else "white"
                form: dict[str, Any] = {
                    "fmt": marker,
                    "color": colour,
                    "markerfacecolor": face,
                    "markersize": 6,
                    "elinewidth": 0.9,
                }
                axis.errorbar(places[i], v, yerr=error, **form)
            axis.plot([], [], line, marker=marker, color=colour, label=surface)
    for axis, title, unit in ((left, "AUC of the first task", "AUC"), (right, "Cost of serving", "ms a request")):
        axis.set_title(f"{title} (hollow: dropped)", fontsize=9, loc="left", color=FAINT)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_xticks(range(len(steps)), steps, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_xlim(-0.5, len(steps) - 0.5)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, loc="outside lower center", ncols=max(1, len(labels)))
    return _svg(figure)


def _figure(width: float, height: float, columns: int, *, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=FAINT)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure's SVG element; the same figure gives the same text."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "trefoil", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
