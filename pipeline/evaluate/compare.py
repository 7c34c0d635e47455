"""Runs judged side by side on the very same rows, with intervals from the very same resamples.

Because every run sees the same users drawn, what is common to all runs cancels in a difference, and a paired
interval is far narrower than two intervals laid beside each other. The intervals speak of users only: seeds
of a run are averaged, and their spread is not part of the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from pipeline.errors import ConfigError, DataError, unknown
from pipeline.evaluate.bootstrap import Estimate, ResampledMetrics, UserBootstrap, estimate
from pipeline.evaluate.metrics import METRICS
from pipeline.evaluate.predictions import DATE, KEY, SURFACE, WEIGHT, Predictions
from pipeline.schema import USER_ID

Runs = Mapping[str, Predictions | Sequence[Predictions]]
_Key = tuple[str, str, str]  # run, surface, task


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Estimates of one run for one task on one surface; `rows`, `positives` and `users` as in `TaskMetrics`."""

    rows: int
    positives: int
    users: int
    estimates: Mapping[str, Estimate]

    def __getitem__(self, metric: str) -> Estimate:
        return self.estimates[metric]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Args:
        reference: the run that differences are taken to.
        scores: run -> surface -> task -> estimates by metric.
        differences: run -> surface -> task -> metric -> run minus reference; for every run but the reference.
        macro_auc: run -> task -> mean AUC over surfaces.
        macro_auc_differences: run -> task -> run minus reference.
        resamples: number of resamples.
        level: coverage of the intervals.
        seed: seed of the resamples.
    """

    reference: str
    scores: Mapping[str, Mapping[str, Mapping[str, TaskScore]]]
    differences: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Estimate]]]]
    macro_auc: Mapping[str, Mapping[str, Estimate]]
    macro_auc_differences: Mapping[str, Mapping[str, Estimate]]
    resamples: int
    level: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Samples [1 + B] by metric of one run, surface and task, and why some cannot be."""

    samples: dict[str, np.ndarray]
    reasons: dict[str, str]


def compare(
    runs: Runs,
    *,
    reference: str | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    daily: bool = False,
) -> Comparison:
    """Judge runs on identical rows.

    Args:
        runs: by name, the predictions of a run, or of its seeds: a metric is then averaged over the seeds,
            inside each resample. One run alone is fine and gives no differences.
        reference: name of the run that others are compared with; the first by default.
        resamples: bootstrap resamples of the users; 0 for values without intervals.
        level: coverage of the percentile intervals.
        seed: seed of the resamples.
        daily: take each metric per day and average over the days that a surface has, as in a rolling backtest,
            where each day is predicted by a model of its own and scores of different days do not compare.

    Raises:
        ConfigError: no run is given, or the reference is none of them, or a number is out of range.
        DataError: the runs do not hold the same rows with the same outcomes, users and weights; says how many.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; it must lie between 0 and 1, say 0.95")
    reference = _reference(runs, reference)
    aligned = align({name: [run] if isinstance(run, Predictions) else list(run) for name, run in runs.items()})
    first = aligned[reference][0]
    # Aligned rows are sorted by name; people read surfaces in the order of the reference run.
    chosen = runs[reference]
    surfaces = (chosen if isinstance(chosen, Predictions) else chosen[0]).surfaces
    bootstrap = UserBootstrap(first.table[USER_ID].to_numpy(), resamples=resamples, seed=seed)
    tasks = [t for t in first.tasks if all(t in p.tasks for seeds in aligned.values() for p in seeds)]
    keys = [(name, surface, task) for name in aligned for surface in surfaces for task in tasks]
    cells = _samples({key: _parts(aligned[key[0]], *key[1:], bootstrap, daily=daily) for key in keys}, bootstrap)
    others = [name for name in runs if name != reference]
    macro = {(name, task): _macro([cells[name, s, task] for s in surfaces]) for name in runs for task in tasks}

    def score(name: str, surface: str, task: str) -> TaskScore:
        return _score(aligned[name][0], surface, task, _estimates(cells[name, surface, task], level))

    def difference(name: str, surface: str, task: str) -> dict[str, Estimate]:
        return _estimates(_minus(cells[name, surface, task], cells[reference, surface, task]), level)

    def macro_difference(name: str, task: str) -> Estimate:
        return _estimates(_minus(macro[name, task], macro[reference, task]), level)["auc"]

    return Comparison(
        reference=reference,
        scores={n: {s: {t: score(n, s, t) for t in tasks} for s in surfaces} for n in runs},
        differences={n: {s: {t: difference(n, s, t) for t in tasks} for s in surfaces} for n in others},
        macro_auc={n: {t: _estimates(macro[n, t], level)["auc"] for t in tasks} for n in runs},
        macro_auc_differences={n: {t: macro_difference(n, t) for t in tasks} for n in others},
        resamples=resamples,
        level=level,
        seed=seed,
    )


def align(runs: Mapping[str, Sequence[Predictions]]) -> dict[str, list[Predictions]]:
    """The same runs with their rows in one common order.

    Raises:
        DataError: the rows differ, or their outcomes, users, dates or weights do; says how many.
    """
    tables: dict[str, list[pl.DataFrame]] = {n: [p.table.sort(KEY) for p in seeds] for n, seeds in runs.items()}
    first_name = next(iter(tables))
    first = tables[first_name][0]
    if not first.height:
        raise DataError(f"run {first_name!r} holds no rows; evaluate it on days that have some")
    for name, seeds in tables.items():
        for table in seeds:
            if not table.select(KEY).equals(first.select(KEY)):
                extra = table.join(first, on=KEY, how="anti").height
                lacking = first.join(table, on=KEY, how="anti").height
                raise DataError(
                    f"runs {first_name!r} ({first.height} rows) and {name!r} ({table.height} rows) do not hold the "
                    f"same candidates: {extra} are only in {name!r}, {lacking} only in {first_name!r}; "
                    "evaluate both on the same data"
                )
            shared = [c for c in first.columns if c.startswith("label_") and c in table.columns]
            if not shared:
                raise DataError(f"runs {first_name!r} and {name!r} have no task in common")
            for column in (USER_ID, DATE, WEIGHT, *shared):
                unequal = int(table[column].ne_missing(first[column]).sum())
                if unequal:
                    raise DataError(
                        f"runs {first_name!r} and {name!r} disagree on {unequal} of {first.height} rows; "
                        "evaluate both on the same data",
                        column=column,
                    )
    return {name: [Predictions(t) for t in seeds] for name, seeds in tables.items()}


def _reference(runs: Runs, reference: str | None) -> str:
    if not runs:
        raise ConfigError("there is no run to judge; name at least one")
    for name, run in runs.items():
        if not isinstance(run, Predictions) and not run:
            raise ConfigError(f"run {name!r} has no seeds; give at least one set of predictions")
    if reference is not None and reference not in runs:
        raise ConfigError(unknown("run", reference, runs))
    return next(iter(runs)) if reference is None else reference


def _parts(
    seeds: Sequence[Predictions], surface: str, task: str, bootstrap: UserBootstrap, *, daily: bool
) -> dict[str, ResampledMetrics]:
    """What one run's metrics on a surface are averaged over, its seeds and days, by a name that an error may say."""
    days = seeds[0].table.filter(pl.col(SURFACE) == surface)[DATE].unique().sort().to_list() if daily else [None]
    return {
        f"seed {seed}" + (f" on {day}" if day else ""): ResampledMetrics(
            predictions.rows(surface, task, date=day), bootstrap.users
        )
        for seed, predictions in enumerate(seeds)
        for day in days
    }


def _samples(cells: Mapping[_Key, Mapping[str, ResampledMetrics]], bootstrap: UserBootstrap) -> dict[_Key, _Cell]:
    """Every cell in every resample; each block of resamples is drawn once and serves all cells."""
    most = max(part.rows for parts in cells.values() for part in parts.values())
    blocks: dict[_Key, list[dict[str, np.ndarray]]] = {key: [] for key in cells}
    for counts in bootstrap.counts(most):
        for key, parts in cells.items():
            values = [part(counts) for part in parts.values()]
            blocks[key].append({metric: np.mean([v[metric] for v in values], axis=0) for metric in METRICS})
    result = {}
    for key, parts in cells.items():
        reasons: dict[str, str] = {}
        for name, part in parts.items():
            where = f" ({name})" if len(parts) > 1 else ""
            reasons |= {metric: why + where for metric, why in part.reasons.items()}
        samples = {metric: np.concatenate([block[metric] for block in blocks[key]]) for metric in METRICS}
        result[key] = _Cell(samples=samples, reasons=reasons)
    return result


def _macro(cells: Sequence[_Cell]) -> _Cell:
    reasons: dict[str, str] = {}
    for cell in cells:
        reasons |= {m: f"on one surface, {why}" for m, why in cell.reasons.items()}
    return _Cell(samples={m: np.mean([c.samples[m] for c in cells], axis=0) for m in METRICS}, reasons=reasons)


def _minus(cell: _Cell, reference: _Cell) -> _Cell:
    samples = {m: cell.samples[m] - reference.samples[m] for m in METRICS}
    return replace(cell, samples=samples, reasons=cell.reasons | reference.reasons)


def _estimates(cell: _Cell, level: float) -> dict[str, Estimate]:
    return {m: estimate(cell.samples[m], level=level, reason=cell.reasons.get(m, "")) for m in METRICS}


def _score(run: Predictions, surface: str, task: str, estimates: Mapping[str, Estimate]) -> TaskScore:
    rows = run.rows(surface, task)
    return TaskScore(
        rows=rows.label.size,
        positives=int((rows.label > 0.5).sum()),
        users=int(np.unique(rows.user_id).size),
        estimates=estimates,
    )
