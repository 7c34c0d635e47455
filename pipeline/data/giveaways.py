"""Features that alone tell an outcome: nearly always the outcome under another name, or something made with it.

What is point in time cannot be told from a finished log alone (`pipeline.data.ingest.leaks` proves it from the flat
one), but a number that ranks the rows with an outcome before the others almost without a mistake gives itself away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.columns import Column, columns_of_table
from pipeline.schema import DatasetSchema, Kind, Level

MOST_CANDIDATES = 200_000
LEAST_OF_EACH = 50
# Area under the ROC curve, or 1 less it. No honest feature of an ads log comes near.
TELLING = 0.99


@dataclass(frozen=True, kw_only=True)
class Giveaway:
    """A feature that tells an outcome.

    Args:
        auc: area under the ROC curve of the feature alone; far below one half if large values mean no.
    """

    surface: str
    feature: str
    task: str
    auc: float

    def __str__(self) -> str:
        return (
            f"{self.feature!r} alone tells {self.task!r} on {self.surface} (AUC {self.auc:.3f}): is it made from the "
            "outcome, or known only after it?"
        )


@dataclass
class Sample:
    """Single-valued numbers and labels of the first `MOST_CANDIDATES` candidates of a surface."""

    rows: int = 0
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, table: pa.Table, schema: DatasetSchema, surface: str) -> None:
        """Take the rows of a sound table, as long as there is room."""
        if self.rows >= MOST_CANDIDATES:
            return
        numbers = [f for f in schema.select(surface=surface, kind=Kind.NUMERIC) if f.level is not Level.HISTORY]
        levels = {f.name: f.level for f in numbers if not f.multi_valued} | dict.fromkeys(schema.tasks, Level.CANDIDATE)
        columns = columns_of_table(table, levels)
        counts = np.diff(columns[schema.tasks[0]].bounds[0])
        self.rows += int(counts.sum())
        for name, level in levels.items():
            self.parts.setdefault(name, []).append(_by_candidate(columns[name], level, counts))

    def giveaways(self, schema: DatasetSchema, surface: str) -> list[Giveaway]:
        """Every feature and task of which the one tells the other."""
        values = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        found = []
        for feature in values.keys() - set(schema.tasks):
            for task in schema.tasks:
                auc = _auc(values[feature], values[task])
                if auc is not None and not 1 - TELLING < auc < TELLING:
                    found.append(Giveaway(surface=surface, feature=feature, task=task, auc=auc))
        return sorted(found, key=lambda g: (g.feature, schema.tasks.index(g.task)))


def _by_candidate(column: Column, level: Level, counts: np.ndarray) -> np.ndarray:
    return np.repeat(column.numbers, counts) if level is Level.REQUEST else column.numbers.copy()


def _auc(values: np.ndarray, labels: np.ndarray) -> float | None:
    """Mann and Whitney's statistic of the rows that have both; None where one class is too small to say."""
    there = ~(np.isnan(values) | np.isnan(labels))
    values, positive = values[there], labels[there] >= 0.5
    yes = int(positive.sum())
    no = positive.size - yes
    if min(yes, no) < LEAST_OF_EACH:
        return None
    ranks = pl.Series(values).rank("average").to_numpy()
    return float((ranks[positive].mean() - (yes + 1) / 2) / no)
