"""The page that a reviewer reads before `promote`: one self-contained HTML file, plots inline as SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from pipeline.rollout import report_figures as figures
from pipeline.rollout.gates import Decision
from pipeline.rollout.measurements import CostMeasurements, Interval
from pipeline.rollout.plan import STEPS, RolloutPlan
from pipeline.rollout.results import WaveResult

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p.lead { color: #52606d; margin-top: 0 } .cards { display: flex; gap: 1rem; flex-wrap: wrap }
.card { flex: 1 1 15rem; border: 1px solid #d9dee4; border-top: 4px solid; border-radius: 6px; padding: .7rem 1rem }
.card h3 { margin: 0 } .card .verdict { font-weight: 600 } .card ul { margin: .3rem 0 0; padding-left: 1.1rem }
table { border-collapse: collapse; width: 100%; font-size: .88rem }
th, td { text-align: left; padding: .28rem .6rem; border-bottom: 1px solid #e4e8ec; vertical-align: top }
th { color: #52606d; font-weight: 600 } td.number { text-align: right; font-variant-numeric: tabular-nums }
.good { color: #1a7f4b } .bad { color: #c0392b; font-weight: 600 } .soft { color: #7b8794 }
svg { width: 100%; height: auto } summary { cursor: pointer; color: #2c5d8f; margin-top: .6rem }
footer { margin-top: 2.5rem; color: #7b8794; font-size: .82rem } code { font-size: .9em }
"""


def write_report(result: WaveResult, plan: RolloutPlan, path: Path) -> None:
    """Write the report of a wave."""
    path.write_text(report_html(result, plan), encoding="utf-8")


def report_html(result: WaveResult, plan: RolloutPlan) -> str:
    """The report of a wave as one HTML page that needs nothing else."""
    passed = [s for s, d in result.decisions.items() if d.passed]
    title = f"Wave {result.wave}: {', '.join(result.decisions)}"
    wave = None if result.wave == 0 else plan.wave(result.wave)
    what = "The separate models, as they serve before unification." if wave is None else f"{wave.why}."
    baseline = "the trivial baseline (earlier rates of ad and user)"
    served = [version is not None for version in result.champions.values()]
    rival = "its champion" if all(served) else baseline
    if any(served) and not all(served):
        rival = f"its champion or, where nothing served before, {baseline}"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(what)} {len(passed)} of {len(result.decisions)} surfaces passed every gate. '
        f"Each is compared with {rival} on {', '.join(result.evaluation_days)}.</p>",
        _cards(result),
        "<h2>Lifts</h2><p class='lead'>Challenger less what it is compared with, paired over users, 95 % intervals; "
        "filled where they leave out 0. The dashed line is the margin that the gate wants the whole interval to clear."
        "</p>",
        figures.lifts(result, plan),
        _quality_table(result),
        "<h2>Calibration</h2><p class='lead'>Observed rate over predicted probability by score decile, 95 % "
        "intervals over rows (Wilson); the diagonal is right.</p>",
        figures.reliability(result),
        "<h2>Cost</h2><p class='lead'>Processor time of one thread per request, at each surface's own mean request; "
        "all models timed in turn in one process; medians, 95 % intervals over the rounds.</p>",
        figures.cost(result, plan),
        _cost_table(result, plan),
    ]
    if result.rungs:
        sections += [
            "<h2>Ladder</h2><p class='lead'>Every step of the wave: what it changed, against the last step that was "
            "kept. 95 % intervals: of AUC over users, of cost over the rounds.</p>",
            figures.ladder(result),
            _ladder_table(result),
        ]
    sections += ["<h2>Gates</h2>", *(_verdict_table(d) for d in result.decisions.values())]
    sections += ["<h2>Features</h2>", *(_feature_table(result, s, plan) for s in result.decisions)]
    facts = {
        "plan": result.plan,
        "log": result.dataset,
        "code": result.code,
        "MLflow run": result.run,
        "versions": ", ".join(f"{s} {v}" for s, v in result.versions.items()) or "none registered",
    }
    footer = " · ".join(f"{name} <code>{html.escape(value)}</code>" for name, value in facts.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}<footer>{footer}</footer></body></html>\n"
    )


def _cards(result: WaveResult) -> str:
    cards = []
    for surface, decision in result.decisions.items():
        colour = figures.GOOD if decision.passed else figures.BAD
        champion = result.champions[surface]
        versus = "nothing served before" if champion is None else f"against champion version {champion}"
        if decision.passed:
            version = result.versions.get(surface)
            body = f"<p>Promote: <code>trefoil rollout promote {surface}</code></p>" if version else ""
            verdict = f"passed all {len(decision.verdicts)} gates"
        else:
            lines = "".join(f"<li>{html.escape(str(v))}</li>" for v in decision.failures[:4])
            more = len(decision.failures) - 4
            body = f"<ul>{lines}</ul>" + (f"<p class='soft'>and {more} more below</p>" if more > 0 else "")
            verdict = f"stopped by {len(decision.failures)} of {len(decision.verdicts)} gates"
        cards.append(
            f'<div class="card" style="border-top-color:{colour}"><h3>{html.escape(surface)}</h3>'
            f'<div class="verdict" style="color:{colour}">{verdict}</div>'
            f'<div class="soft">{versus}</div>{body}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _quality_table(result: WaveResult) -> str:
    rows = [
        [
            surface,
            task,
            _ranged(result.champion_auc.get(surface, {}).get(task)),
            _ranged(of.auc),
            _ranged(of.ne),
            _ranged(of.calibration, ".3f"),
        ]
        for surface, measured in result.measurements.items()
        for task, of in measured.tasks.items()
    ]
    return _table(("surface", "task", "rival's AUC", "challenger AUC", "challenger NE", "challenger calibration"), rows)


def _cost_table(result: WaveResult, plan: RolloutPlan) -> str:
    rows = []
    for surface, measured in result.measurements.items():
        predicted = None if result.wave == 0 else plan.wave(result.wave).predicted_ms.get(surface)
        cells: Sequence[CostMeasurements | None] = (
            result.separate_cost.get(surface),
            result.champion_cost.get(surface),
            measured.cost,
        )
        rows.append(
            [
                surface,
                *(_number(None if c is None else c.ms, ".3f") for c in cells),
                _number(predicted, ".3f"),
                _ranged(_ratio(measured.cost), ".2f"),
                _number(measured.cost.requests_per_second, ",.0f"),
                _number(measured.cost.p99_ms, ".1f"),
                _number(plan.thresholds.p99_ms.get(surface), ".1f"),
            ]
        )
    head = (
        "surface",
        "separate ms",
        "champion ms",
        "challenger ms",
        "predicted ms",
        "over separate",
        "requests/s a thread",
        "p99 ms a batch",
        "limit",
    )
    return _table(head, rows)


def _ladder_table(result: WaveResult) -> str:
    rows = []
    for rung in result.rungs:
        gains = [
            f"{surface} {_signed(next(iter(tasks.values()))['auc'])}" for surface, tasks in rung.differences.items()
        ]
        costs = [f"{s} {_number(c.ms, '.2f')}" for s, c in rung.cost.items()]
        kept = '<span class="good">kept</span>' if rung.kept else '<span class="bad">dropped</span>'
        rows.append(
            [
                rung.step,
                html.escape(STEPS[rung.step]),
                "<br>".join(gains) or "—",
                "<br>".join(costs) or "—",
                f"{kept}<br><span class='soft'>{html.escape(rung.reason)}</span>",
            ]
        )
    return _table(("step", "what", "AUC against the step before", "ms a request", "decision"), rows)


def _verdict_table(decision: Decision) -> str:
    rows = [
        [
            html.escape(v.gate),
            html.escape(v.subject),
            '<span class="good">pass</span>' if v.passed else '<span class="bad">stop</span>',
            html.escape(v.reason),
        ]
        for v in sorted(decision.verdicts, key=lambda v: v.passed)
    ]
    opened = "" if decision.passed else " open"
    summary = f"{decision.surface}: {len(rows) - len(decision.failures)} of {len(rows)} gates passed"
    table = _table(("gate", "of", "verdict", "measured and allowed"), rows)
    return f"<details{opened}><summary>{html.escape(summary)}</summary>{table}</details>"


def _feature_table(result: WaveResult, surface: str, plan: RolloutPlan) -> str:
    features = result.measurements[surface].features or {}
    rows = [
        [
            html.escape(name),
            _number(of.coverage_training, ".1%"),
            _number(of.coverage_evaluation, ".1%"),
            _number(of.drift, ".3f"),
            "not judged: moves by design" if name in plan.thresholds.drift_ignored else "",
        ]
        for name, of in sorted(features.items(), key=lambda item: -(item[1].drift or 0))
    ]
    table = _table(("feature", "present in training", "on evaluation days", "drift (PSI)", ""), rows)
    return f"<details><summary>{html.escape(surface)}: {len(rows)} features</summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _ranged(of: Interval | None, form: str = ".4f") -> str:
    if of is None or of.value is None:
        return "—"
    ends = "" if of.low is None or of.high is None else f" [{of.low:{form}}, {of.high:{form}}]"
    return f"{of.value:{form}}{ends}"


def _ratio(cost: CostMeasurements) -> Interval:
    low, high = cost.over_separate_interval or (None, None)
    return Interval(value=cost.over_separate, low=low, high=high)


def _signed(of: Interval) -> str:
    if of.value is None:
        return "—"
    ends = "" if of.low is None or of.high is None else f" [{of.low:+.4f}, {of.high:+.4f}]"
    return f"{of.value:+.4f}{ends}"
