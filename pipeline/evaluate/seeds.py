"""Differences between runs with intervals over users and over seeds: would it hold for other users, and retrained?

`compare` averages a run's seeds and resamples users, so its intervals hold the seeds fixed. Here the spread of the
seeds is added. The value is a difference of means, of n seeds of a run and of k of the reference, and its variance

    v = v_users + s_run^2 / n + s_reference^2 / k

with v_users from the width of the interval over users and s^2 the seeds' sample variances. The interval is
value +- t * sqrt(v), t of Student's distribution with Satterthwaite's degrees of freedom ("An Approximate Distribution
of Estimates of Variance Components", Biometrics Bulletin 1946). Few seeds make it wide, as they should: Bouthillier et
al., "Accounting for Variance in Machine Learning Benchmarks", MLSys 2021.

A curve, such as the loss by step, has Student's interval of its mean over seeds at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.evaluate.bootstrap import Estimate
from pipeline.evaluate.compare import Comparison, Runs
from pipeline.evaluate.metrics import task_metrics
from pipeline.evaluate.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class SeedSpread:
    """A difference to the reference, seed by seed.

    Args:
        seeds: metric of each seed less the mean over the reference's seeds; empty where undefined.
        difference: the difference of means, with an interval over users and seeds.
    """

    seeds: tuple[float, ...]
    difference: Estimate


def over_seeds(
    comparison: Comparison, runs: Runs, *, task: str, metric: str = "auc"
) -> dict[str, dict[str, SeedSpread]]:
    """Run -> surface -> spread, for every run but the reference.

    Args:
        comparison: of these very runs, not daily.
        runs: as given to `compare`.
        task: such as click.
        metric: of `pipeline.evaluate.metrics.METRICS`.
    """
    result: dict[str, dict[str, SeedSpread]] = {}
    for run, surfaces in comparison.differences.items():
        result[run] = {}
        for surface, tasks in surfaces.items():
            ours, reference = (_by_seed(runs[name], surface, task, metric) for name in (run, comparison.reference))
            found = tasks[task][metric]
            defined = found.value is not None and np.isfinite([*ours, *reference]).all()
            result[run][surface] = SeedSpread(
                seeds=tuple((ours - reference.mean()).tolist()) if defined else (),
                difference=_widened(found, ours, reference, comparison.level),
            )
    return result


def curve_over_seeds(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]], *, level: float = 0.95
) -> tuple[list[int], list[Estimate]]:
    """Steps, and at each the mean over seeds with Student's interval; one seed has none.

    Args:
        curves: steps and values of each seed; steps that some seed lacks are left out.
        level: coverage of the intervals, which hold at each step alone.
    """
    by_step = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    n = len(by_step)
    found = []
    for step in steps:
        values = np.array([curve[step] for curve in by_step])
        mean = float(values.mean())
        if n < 2:
            found.append(Estimate(value=mean, low=None, high=None, reason="one seed; its spread wants at least two"))
            continue
        half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / n**0.5)
        found.append(Estimate(value=mean, low=mean - half, high=mean + half))
    return steps, found


def _by_seed(seeds: Predictions | Sequence[Predictions], surface: str, task: str, metric: str) -> np.ndarray:
    """The metric of each seed, NaN where undefined."""
    every = [seeds] if isinstance(seeds, Predictions) else seeds
    values = [task_metrics(p.rows(surface, task))[metric] for p in every]
    return np.array([np.nan if v is None else v for v in values])


def _widened(users: Estimate, ours: np.ndarray, reference: np.ndarray, level: float) -> Estimate:
    if users.value is None or users.low is None or users.high is None:
        return users
    if min(ours.size, reference.size) < 2:
        why = f"{ours.size} and {reference.size} seeds; their spread wants at least two of each"
        return Estimate(value=users.value, low=None, high=None, reason=why)
    of_users = ((users.high - users.low) / 2 / stats.norm.ppf((1 + level) / 2)) ** 2
    of_seeds = np.array([ours.var(ddof=1) / ours.size, reference.var(ddof=1) / reference.size])
    freedom = of_seeds**2 / np.array([ours.size - 1, reference.size - 1])
    total = of_users + of_seeds.sum()
    degrees = total**2 / freedom.sum() if freedom.sum() > 0 else np.inf
    half = float(stats.t.ppf((1 + level) / 2, degrees) * np.sqrt(total))
    return Estimate(value=users.value, low=users.value - half, high=users.value + half)
