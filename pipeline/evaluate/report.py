"""What a comparison says, for people (a table) and for machines (a dict)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.evaluate.bootstrap import Estimate
from pipeline.evaluate.compare import Comparison, Runs
from pipeline.evaluate.metrics import LOWER_IS_BETTER, METRICS
from pipeline.evaluate.predictions import Predictions

MODEL, TRIVIAL, ORACLE = "model", "trivial", "oracle"
# What a screen shows; the JSON of a run holds every metric.
PRINTED = ("auc", "ne", "calibration")
DIFFERENCES = ("auc", "ne", "log_loss")
_SHOWN = {"auc": "AUC", "ne": "NE", "log_loss": "log loss", "calibration": "calibration", "ece": "ECE"}


def lineup(
    model: Predictions | Sequence[Predictions],
    *,
    trivial: Predictions | None = None,
    others: Runs | None = None,
    name: str = MODEL,
) -> dict[str, Predictions | Sequence[Predictions]]:
    """Runs for `compare` in the order of the report: the model, the trivial baseline, others, the oracle.

    The oracle joins where the model's predictions carry the true probabilities of a simulator.
    """
    first = model if isinstance(model, Predictions) else model[0]
    runs: dict[str, Predictions | Sequence[Predictions]] = {name: model}
    if trivial is not None:
        runs[TRIVIAL] = trivial
    runs |= others or {}
    if first.has("truth"):
        runs[ORACLE] = first.using("truth")
    return runs


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON-able values; every estimate is `[value, low, high]`, None where undefined.

    Keys: `reference`, `resamples`, `level`, `seed`; `runs` (run -> surface -> task -> rows, positives, users, one
    key a metric, and `reasons` where something is None); `macro_auc` (run -> task); `differences` (run -> surface
    -> task -> metric, run minus reference) and `macro_auc_differences` (run -> task).
    """
    return {
        "reference": comparison.reference,
        "resamples": comparison.resamples,
        "level": comparison.level,
        "seed": comparison.seed,
        "runs": {
            run: {
                surface: {
                    task: {"rows": score.rows, "positives": score.positives, "users": score.users}
                    | _lists(score.estimates)
                    for task, score in tasks.items()
                }
                for surface, tasks in surfaces.items()
            }
            for run, surfaces in comparison.scores.items()
        },
        "macro_auc": {run: _plain(tasks) for run, tasks in comparison.macro_auc.items()},
        "differences": {
            run: {s: {t: _lists(estimates) for t, estimates in tasks.items()} for s, tasks in surfaces.items()}
            for run, surfaces in comparison.differences.items()
        },
        "macro_auc_differences": {run: _plain(tasks) for run, tasks in comparison.macro_auc_differences.items()},
    }


def scores_table(comparison: Comparison, *, metrics: Sequence[str] = METRICS) -> Table:
    """Values with intervals: a line for each surface, task and metric, a column for each run."""
    table = Table(title=f"value [{comparison.level:.0%} interval over users, {comparison.resamples} resamples]")
    for heading in ("surface", "task", "rows", "positive", "metric"):
        table.add_column(heading, justify="right" if heading in ("rows", "positive") else "left")
    for run in comparison.scores:
        table.add_column(run, overflow="fold")
    for surface, tasks in comparison.scores[comparison.reference].items():
        for task, score in tasks.items():
            head = [surface, task, f"{score.rows:,}", f"{score.positives:,}"]
            for metric in metrics:
                cells = [_text(comparison.scores[run][surface][task][metric]) for run in comparison.scores]
                table.add_row(*head, _SHOWN[metric], *cells, end_section=metric == metrics[-1])
                head = [""] * 4
    for task in comparison.macro_auc[comparison.reference]:
        cells = [_text(comparison.macro_auc[run][task]) for run in comparison.scores]
        table.add_row("macro", task, "", "", _SHOWN["auc"], *cells)
    return table


def differences_table(comparison: Comparison, *, metrics: Sequence[str] = DIFFERENCES) -> Table:
    """Paired differences to the reference; green is better and red worse where the interval leaves 0 out."""
    table = Table(title=f"difference to {comparison.reference!r}, paired")
    for heading in ("surface", "task", "metric"):
        table.add_column(heading)
    for run in comparison.differences:
        table.add_column(run, overflow="fold")
    for surface, tasks in comparison.scores[comparison.reference].items():
        for task in tasks:
            for metric in metrics:
                cells = [_text(of[surface][task][metric], signed=metric) for of in comparison.differences.values()]
                table.add_row(surface, task, _SHOWN[metric], *cells, end_section=metric == metrics[-1])
    for task in comparison.macro_auc[comparison.reference]:
        cells = [_text(of[task], signed="auc") for of in comparison.macro_auc_differences.values()]
        table.add_row("macro", task, _SHOWN["auc"], *cells)
    return table


def print_report(comparison: Comparison, *, console: Console | None = None, metrics: Sequence[str] = PRINTED) -> None:
    """Print values of the given metrics, and differences where there is more than one run.

    A terminal gets colours and its own width; a file or pipe gets plain text, as wide as the tables are.
    """
    console = console or Console()
    tables = [scores_table(comparison, metrics=metrics)]
    if comparison.differences:
        tables.append(differences_table(comparison, metrics=[m for m in metrics if m in DIFFERENCES]))
    if not console.is_terminal:
        free = console.options.update(max_width=10_000)
        needed = max(Measurement.get(console, free, table).maximum for table in tables)
        console = Console(file=console.file, width=max(console.width, needed), quiet=console.quiet)
    console.print(Group(*tables))


def _plain(tasks: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
    return {task: of.as_list() for task, of in tasks.items()}


def _lists(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    reasons = {metric: of.reason for metric, of in estimates.items() if of.reason}
    return {metric: of.as_list() for metric, of in estimates.items()} | ({"reasons": reasons} if reasons else {})


def _text(of: Estimate, *, signed: str | None = None) -> Text:
    """`0.6944 [0.6855, 0.7033]`; a difference in the metric `signed` bears its sign and its colour."""
    if of.value is None:
        return Text(of.reason, style="dim")
    form = "+.4f" if signed else ".4f"
    text = Text(f"{of.value:{form}}")
    if of.low is not None and of.high is not None:
        text.append(f" [{of.low:{form}}, {of.high:{form}}]")
    if signed in (*LOWER_IS_BETTER, "auc") and of.excludes_zero:
        text.stylize("green" if (of.value < 0) == (signed in LOWER_IS_BETTER) else "red")
    return text
