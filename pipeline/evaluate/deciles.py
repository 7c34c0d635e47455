"""Calibration by score decile over the days and seeds of a backtest.

Each day is predicted by a model of its own, so deciles are taken within a day and seed, then averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.evaluate.metrics import BINS, decile_of
from pipeline.evaluate.predictions import Predictions


class Decile(NamedTuple):
    """A tenth of the rows, by score.

    Fields:
        mean_p: mean predicted probability.
        mean_label: mean outcome.
    """

    mean_p: float
    mean_label: float


def reliability(seeds: Sequence[Predictions], task: str) -> dict[str, list[Decile]]:
    """By surface, deciles from low to high scores, weighted by rows' weights; empty ones are left out.

    Args:
        seeds: predictions of a run's seeds on the same rows, of one or several days.
        task: which outcome.
    """
    result = {}
    for surface in seeds[0].surfaces:
        sums = np.zeros((BINS, 3))
        for predictions in seeds:
            for day in predictions.dates:
                rows = predictions.rows(surface, task, date=day)
                bins = decile_of(rows.p, rows.weight)
                for i, value in enumerate((np.ones_like(rows.p), rows.p, rows.label)):
                    sums[:, i] += np.bincount(bins, weights=rows.weight * value, minlength=BINS)
        filled = sums[sums[:, 0] > 0]
        result[surface] = [Decile(float(p / w), float(y / w)) for w, p, y in filled]
    return result
