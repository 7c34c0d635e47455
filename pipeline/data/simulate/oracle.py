"""How well the truth itself predicts: the ceiling of every model on a simulated log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.logs import Dataset
from pipeline.data.truth import read_truth

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class OracleFigures:
    """Figures of the true probabilities over the observed labels of one surface and task.

    Args:
        impressions: observed labels.
        rate: mean label.
        mean_truth: mean true probability; differs from `rate` by chance alone.
        auc: NaN where all labels are alike.
        ne: normalised entropy, log loss over that of the constant `rate`; lower is better.
        log_loss: nats.
    """

    impressions: int
    rate: float
    mean_truth: float
    auc: float
    ne: float
    log_loss: float


def oracle_figures(dataset: Dataset, days: tuple[str, ...] | None = None) -> dict[str, dict[str, OracleFigures]]:
    """Figures of the truth, by surface and task; tasks without an observed label on a surface are left out.

    Args:
        dataset: a simulated log.
        days: over these days together; None = all.

    Raises:
        DataError: no such day, or no truths beside the log.
    """
    result: dict[str, dict[str, OracleFigures]] = {}
    for surface in dataset.schema.surfaces:
        result[surface] = {}
        truths = read_truth(dataset, surface, days)
        for task in dataset.schema.tasks:
            label = _labels(dataset, surface, task, days)
            truth = _flat(truths[task])
            seen = ~np.isnan(label)
            if seen.any():
                result[surface][task] = figures(label[seen], truth[seen])
    return result


def figures(label: Array, probability: Array) -> OracleFigures:
    """Figures of any probabilities against labels of 0 and 1, both [M] with M > 0."""
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    rate = float(label.mean(dtype=np.float64))
    loss = float(-(label * np.log(p) + (1 - label) * np.log1p(-p)).mean())
    base = -sum(x * np.log(x) for x in (rate, 1 - rate) if x > 0)
    return OracleFigures(
        impressions=int(label.size),
        rate=rate,
        mean_truth=float(p.mean()),
        auc=_auc(label, p),
        ne=loss / base if base > 0 else float("nan"),
        log_loss=loss,
    )


def _auc(label: Array, score: Array) -> float:
    positive = label > 0.5
    count, others = int(positive.sum()), int((~positive).sum())
    if count == 0 or others == 0:
        return float("nan")
    _, inverse, ties = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[inverse]
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * others))


def _labels(dataset: Dataset, surface: str, task: str, days: tuple[str, ...] | None) -> Array:
    files = [f for p in dataset.partitions(surface, days) for f in p.files]
    columns = [_flat(pq.ParquetFile(dataset.root / f.path).read(columns=[task])[task]) for f in files]
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.float32)


def _flat(column: pa.ChunkedArray) -> Array:
    chunks = [c.flatten().to_numpy(zero_copy_only=False) for c in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)
