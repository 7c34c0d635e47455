"""Base rates: how often each task's outcome came true on a surface, as it was known at a time.

They are kept on a grid of time, so that they stay small whatever the size of the log; a step of the grid
counts once it is over. Sums are whole numbers, so that no order of adding can change them.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from pipeline.data.ingest.events import label
from pipeline.data.ingest.history import Timeline
from pipeline.data.ingest.spec import IngestSpec

OUTCOME_ONE = 1 << 20  # an outcome of 1 in the sums of base rates
PRIOR_RATE = 0.5  # before anything is known
PRIOR_EVENTS = 2.0


def slots(spec: IngestSpec, events: pl.DataFrame) -> pl.DataFrame:
    """Outcomes of raw events by raw surface and step: `_surface`, `slot`, and per task `sum_T` and `count_T`."""
    step = spec.causal.base_resolution_s * 1000
    columns = []
    for i, task in enumerate(spec.tasks):
        y = pl.col(label(task))
        columns.append((y * OUTCOME_ONE).round().cast(pl.Int64).sum().alias(f"sum_{i}"))
        columns.append(y.count().cast(pl.Int64).alias(f"count_{i}"))
    return events.group_by("_surface", (pl.col("_time") // step).alias("slot")).agg(columns)


def add_slots(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Slots of several parts of the events together, in order."""
    return pl.concat(parts).group_by("_surface", "slot").agg(pl.all().sum()).sort("_surface", "slot")


def collapse(table: pl.DataFrame, slot: int) -> pl.DataFrame:
    """The same slots with all those before `slot` put into one, for asking about later times only."""
    return add_slots([table.with_columns(pl.max_horizontal("slot", pl.lit(slot - 1)).alias("slot"))])


class BaseRates:
    """Answers what a surface's base rates were known to be.

    Args:
        spec: the ingest spec.
        table: slots with `_surface` as the code of the raw value.
    """

    def __init__(self, spec: IngestSpec, table: pl.DataFrame) -> None:
        table = table.sort("_surface", "slot")
        self._step = spec.causal.base_resolution_s * 1000
        self._timeline = Timeline(table["_surface"].to_numpy(), table["slot"].to_numpy())
        self._sums = [prefix(table[f"sum_{i}"].to_numpy()) for i in range(len(spec.tasks))]
        self._counts = [prefix(table[f"count_{i}"].to_numpy()) for i in range(len(spec.tasks))]

    def known(self, surface: np.ndarray, until: np.ndarray, task: int) -> np.ndarray:
        """Rate of a task on each surface from the steps that ended at or before `until` (ms)."""
        start, end = self._timeline.before(surface, until // self._step)
        total = (self._sums[task][end] - self._sums[task][start]) / OUTCOME_ONE
        count = self._counts[task][end] - self._counts[task][start]
        return (total + PRIOR_RATE * PRIOR_EVENTS) / (count + PRIOR_EVENTS)


def prefix(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
