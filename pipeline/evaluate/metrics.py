"""How good predictions are, per surface and task.

Every metric is weighted by the rows' weights and sees only rows whose outcome was observed:

- `auc`: the chance that a clicked row scores above one that was not, ties counting half.
- `log_loss`: mean cross entropy, in nats.
- `ne`: normalised entropy, the cross entropy divided by that of always predicting the mean label; below 1 is
  better than knowing the rate alone. He et al., "Practical Lessons from Predicting Clicks on Ads at
  Facebook", 2014; the formula and the clipping are those of `torchrec.metrics.ne`.
- `calibration`: sum of probabilities over sum of labels; 1 is right, above 1 predicts too much.
- `ece`: expected calibration error by score decile: mean over deciles of |mean probability - mean label|.
  Noise alone makes it positive, the more so the fewer the clicks; compare it between models, not with 0.

A metric that the rows cannot define is None and comes with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.evaluate.predictions import Predictions, TaskRows
from pipeline.tracking.names import metric_name

METRICS = ("auc", "log_loss", "ne", "calibration", "ece")
LOWER_IS_BETTER = frozenset({"log_loss", "ne", "ece"})
ETA = 1e-12  # probabilities are clipped to [ETA, 1 - ETA], as torchrec does
BINS = 10
BOUND = 1.959964  # of a standard normal, 95 %


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """Metrics of one task on one surface.

    Args:
        rows: rows with an observed outcome.
        positives: rows among them whose label is above 0.5.
        users: distinct users among them.
        values: by metric name; None where undefined.
        reasons: by metric name, why a value is None.
    """

    rows: int
    positives: int
    users: int
    values: Mapping[str, float | None]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]


@dataclass(frozen=True, kw_only=True)
class DecileTable:
    """A reliability curve: score deciles from low to high. Arrays [B], B <= 10; equal scores share a decile.

    Args:
        weight: sum of the rows' weights.
        effective: rows of equal weight that would tell as much (Kish, "Survey Sampling", 1965).
        mean_p: mean predicted probability.
        mean_label: observed rate.
    """

    weight: np.ndarray
    effective: np.ndarray
    mean_p: np.ndarray
    mean_label: np.ndarray


def evaluate(predictions: Predictions) -> dict[str, dict[str, TaskMetrics]]:
    """Metrics by surface, then task."""
    return {
        surface: {task: task_metrics(predictions.rows(surface, task)) for task in predictions.tasks}
        for surface in predictions.surfaces
    }


def named(evaluation: Mapping[str, Mapping[str, TaskMetrics]], *, split: str = "val") -> dict[str, float]:
    """An evaluation as flat metrics for a tracker, `val/<surface>/<task>/<metric>`; undefined ones are left out."""
    return {
        metric_name(surface, task, metric, split=split): value
        for surface, tasks in evaluation.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.values.items()
        if value is not None
    }


def task_metrics(rows: TaskRows) -> TaskMetrics:
    """All metrics of one set of rows."""
    reasons = undefined(rows)
    values = dict.fromkeys(METRICS) | {name: compute(rows) for name, compute in _COMPUTE.items() if name not in reasons}
    return TaskMetrics(
        rows=rows.label.size,
        positives=int((rows.label > 0.5).sum()),
        users=int(np.unique(rows.user_id).size),
        values=values,
        reasons=reasons,
    )


def undefined(rows: TaskRows) -> dict[str, str]:
    """By metric name, why these rows cannot define it; metrics that they define are not named."""
    total, clicked = float(rows.weight.sum()), float((rows.weight * rows.label).sum())
    if total <= 0:
        return dict.fromkeys(METRICS, "no row with weight has an observed outcome")
    reasons: dict[str, str] = {}
    if clicked <= 0 or clicked >= total:
        which = "negative" if clicked <= 0 else "positive"
        reasons |= dict.fromkeys(("auc", "ne"), f"all observed outcomes are {which}")
        if clicked <= 0:
            reasons["calibration"] = "all observed outcomes are negative"
    elif not np.isin(rows.label, (0.0, 1.0)).all():
        reasons["auc"] = "labels are not all 0 or 1"
    return reasons


def auc(rows: TaskRows) -> float:
    """Area under the ROC curve, weighted."""
    from sklearn.metrics import roc_auc_score  # costs 2 s to import

    return float(roc_auc_score(rows.label, rows.p, sample_weight=rows.weight))


def cross_entropy(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Cross entropy of each row in nats, [N]."""
    p = np.clip(p, ETA, 1 - ETA)
    return -(label * np.log(p) + (1 - label) * np.log1p(-p))


def log_loss(rows: TaskRows) -> float:
    """Mean cross entropy in nats, weighted."""
    return float(np.average(cross_entropy(rows.label, rows.p), weights=rows.weight))


def ne(rows: TaskRows) -> float:
    """Normalised entropy: log loss over the entropy of the mean label."""
    mean = np.average(rows.label, weights=rows.weight)
    return log_loss(rows) / float(cross_entropy(mean, mean))


def calibration(rows: TaskRows) -> float:
    """Sum of probabilities over sum of labels, both weighted."""
    return float((rows.weight * rows.p).sum() / (rows.weight * rows.label).sum())


def decile_of(p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The score decile of each row, int64 [N] in [0, 10): tenths of the total weight, low scores first.

    Rows of equal score share the decile of their middle, so the result does not depend on row order.
    """
    scores, group = np.unique(p, return_inverse=True)
    mass = np.bincount(group, weights=weight, minlength=scores.size)
    middle = (np.cumsum(mass) - mass / 2) / max(float(mass.sum()), ETA)
    return np.minimum((middle * BINS).astype(np.int64), BINS - 1)[group]


def deciles(rows: TaskRows) -> DecileTable:
    """The reliability curve of these rows."""
    bins = decile_of(rows.p, rows.weight)
    weight, squares, p, label = (
        np.bincount(bins, weights=rows.weight * by, minlength=BINS)
        for by in (np.ones_like(rows.p), rows.weight, rows.p, rows.label)
    )
    filled = weight > 0
    weight, squares, p, label = weight[filled], squares[filled], p[filled], label[filled]
    return DecileTable(weight=weight, effective=weight**2 / squares, mean_p=p / weight, mean_label=label / weight)


def wilson(rate: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of a rate over so many independent rows, arrays [B].

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    centre = rate + BOUND**2 / (2 * rows)
    half = BOUND * np.sqrt(rate * (1 - rate) / rows + BOUND**2 / (4 * rows**2))
    scale = 1 + BOUND**2 / rows
    # The interval holds the rate; at rates of 0 and 1, where its end is the rate, rounding may leave it outside.
    return np.minimum((centre - half) / scale, rate), np.maximum((centre + half) / scale, rate)


def ece(rows: TaskRows) -> float:
    """Expected calibration error by score decile."""
    table = deciles(rows)
    return float(np.average(np.abs(table.mean_p - table.mean_label), weights=table.weight))


_COMPUTE = {"auc": auc, "log_loss": log_loss, "ne": ne, "calibration": calibration, "ece": ece}
