"""Bootstrap over users: how far a metric would move had other users come.

Rows of one user are not independent, so users, not rows, are drawn with replacement (the cluster bootstrap;
Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). A resample is a count per
user, and a row's weight in it is its own weight times its user's count. All metrics but the AUC are ratios of
sums and so need only sums per user; the AUC sorts its scores once and takes one cumulative sum a resample.

Letters: N rows, U users, B resamples, K sums kept per user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.evaluate.metrics import BINS, METRICS, cross_entropy, decile_of, undefined
from pipeline.evaluate.predictions import TaskRows

_CHUNK_VALUES = 1 << 16  # float64 values of a [b, max(N, U)] block: half a MiB, which stays in a core's own cache


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with a percentile interval.

    Args:
        value: on the rows as they are; None where undefined.
        low: lower end of the interval; None where there is none.
        high: upper end.
        reason: why something is None; empty otherwise.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def as_list(self) -> list[float | None]:
        """`[value, low, high]`."""
        return [self.value, self.low, self.high]

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside it; meant for differences."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class UserBootstrap:
    """Resamples of a set of users, the same for every metric, surface and run that asks.

    Args:
        user_id: int64, any shape, of all rows of all surfaces; repeats are fine.
        resamples: B; 0 gives values without intervals.
        seed: the draws are a function of it and of the set of users alone.

    Raises:
        ConfigError: `resamples` is negative.
    """

    def __init__(self, user_id: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> None:
        if resamples < 0:
            raise ConfigError(f"resamples is {resamples}; it must be 0 (no intervals) or more")
        self.users = np.unique(user_id)
        self.resamples = resamples
        self.seed = seed

    def counts(self, rows: int) -> Iterator[np.ndarray]:
        """Blocks [b, U] of how often each user was drawn; the first line of the first block is all ones.

        `rows` is the most rows that a caller multiplies a block with; it bounds b, never the draws.
        """
        size = self.users.size
        step = max(1, _CHUNK_VALUES // max(1, rows, size))
        rng = np.random.default_rng(self.seed)
        yield np.ones((1, size))
        for start in range(0, self.resamples, step):
            block = min(step, self.resamples - start)
            drawn = rng.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
            yield np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size).astype(np.float64)


class ResampledMetrics:
    """All metrics of one set of rows in one model's scores, ready to be taken in many resamples.

    Args:
        rows: the rows.
        users: sorted distinct users of the resamples, which hold every user of `rows`.
    """

    def __init__(self, rows: TaskRows, users: np.ndarray) -> None:
        self.rows = rows.label.size
        self.reasons = undefined(rows)
        self._user_U, local = np.unique(np.searchsorted(users, rows.user_id), return_inverse=True)
        self._sums_UK = _sums_per_user(rows, local, self._user_U.size)
        self._auc = None if "auc" in self.reasons else ResampledAuc(rows, self._user_U[local])

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics [b] by name for counts [b, U]; NaN where a resample (or the rows) cannot define one."""
        sums = (counts[:, self._user_U] @ self._sums_UK).reshape(len(counts), -1)
        bins = sums[:, 1:].reshape(-1, 3, BINS)
        entropy_sum, (weight, label, p) = sums[:, 0], bins.sum(axis=2).T
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = label / weight
            values = {
                "log_loss": entropy_sum / weight,
                "ne": entropy_sum / weight / cross_entropy(mean, mean),
                "calibration": p / label,
                "ece": np.abs(bins[:, 2] - bins[:, 1]).sum(axis=1) / weight,
            }
            # With one class only, the entropy is 0 but for the clipping, and the quotient means nothing.
            values["ne"] = np.where((mean > 0) & (mean < 1), values["ne"], np.nan)
            values["auc"] = np.full(len(counts), np.nan) if self._auc is None else self._auc(counts)
        return {name: np.where(np.isfinite(values[name]), values[name], np.nan) for name in METRICS}


def _sums_per_user(rows: TaskRows, local: np.ndarray, users: int) -> np.ndarray:
    """Cross entropy, and per score decile weight, labels and probabilities, summed per user: [U, 1 + 3 * BINS].

    The deciles are those of the rows as they are; a resample does not move their edges.
    """
    entropy = np.bincount(local, weights=rows.weight * cross_entropy(rows.label, rows.p), minlength=users)
    cell = local * BINS + decile_of(rows.p, rows.weight)
    by_bin = [
        np.bincount(cell, weights=rows.weight * by, minlength=users * BINS).reshape(users, BINS)
        for by in (np.ones_like(rows.p), rows.label, rows.p)
    ]
    return np.hstack([entropy[:, None], *by_bin])


class ResampledAuc:
    """Weighted AUC in many resamples: scores are sorted once.

    AUC = sum over positives of w * (negative weight below + half the negative weight at the same score),
    over (positive weight * negative weight): the Mann-Whitney statistic, which is the area under the ROC
    curve by trapezoids, as scikit-learn's `roc_auc_score(sample_weight=...)` takes it.

    Args:
        rows: rows with labels 0 and 1.
        user: int64 [N], column of each row in the counts.
    """

    def __init__(self, rows: TaskRows, user: np.ndarray) -> None:
        positive = rows.label == 1
        negative = np.flatnonzero(~positive)
        negative = negative[np.argsort(rows.p[negative], kind="stable")]
        below = rows.p[negative]
        self._low = np.searchsorted(below, rows.p[positive], side="left")
        self._high = np.searchsorted(below, rows.p[positive], side="right")
        self._user_pos, self._user_neg = user[positive], user[negative]
        self._weight_pos, self._weight_neg = rows.weight[positive], rows.weight[negative]

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """AUC [b] for counts [b, U]; NaN where a resample drew one class only."""
        positive = np.take(counts, self._user_pos, axis=1) * self._weight_pos
        cumulated = np.zeros((len(counts), self._weight_neg.size + 1))
        np.cumsum(np.take(counts, self._user_neg, axis=1) * self._weight_neg, axis=1, out=cumulated[:, 1:])
        below = np.take(cumulated, self._low, axis=1) + np.take(cumulated, self._high, axis=1)
        total = positive.sum(axis=1) * cumulated[:, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total > 0, (positive * below).sum(axis=1) / 2 / total, np.nan)


class ResampledRoc:
    """Points of the weighted ROC curve in many resamples: scores are sorted once.

    Between the curve's own points, which are as scikit-learn's `roc_curve(sample_weight=...)` has them, lie straight
    lines. Of curves of more points than `POINTS`, so many are taken, evenly by rank of the score.

    Args:
        rows: rows with labels 0 and 1.
        user: int64 [N], column of each row in the counts.
        at: false positive rates [G].
    """

    POINTS = 1000

    def __init__(self, rows: TaskRows, user: np.ndarray, at: np.ndarray) -> None:
        order = np.argsort(-rows.p, kind="stable")
        self._at, self._user = at, user[order]
        self._positive, self._negative = (rows.weight[order] * (rows.label[order] == label) for label in (1, 0))
        ends = np.flatnonzero(np.diff(rows.p[order], append=-np.inf))  # rows of one score move the curve together
        ends = ends[np.unique(np.linspace(0, ends.size - 1, self.POINTS).astype(int))]
        self._starts = np.append(0, ends[:-1] + 1)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """True positive rates [b, G] for counts [b, U]; NaN where a resample drew one class only."""
        drawn = np.take(counts, self._user, axis=1)
        negative, positive = self._sums(drawn * self._negative), self._sums(drawn * self._positive)
        found = np.full((len(counts), self._at.size), np.nan)
        for i in np.flatnonzero((negative[:, -1] > 0) & (positive[:, -1] > 0)):
            found[i] = np.interp(self._at, negative[i] / negative[i, -1], positive[i] / positive[i, -1])
        return found

    def _sums(self, weights: np.ndarray) -> np.ndarray:
        """Weight above each point's score, [b, 1 + points]."""
        return np.pad(np.add.reduceat(weights, self._starts, axis=1).cumsum(axis=1), ((0, 0), (1, 0)))


@dataclass(frozen=True, kw_only=True)
class RocIntervals:
    """Intervals of a ROC curve over users.

    Args:
        at: false positive rates [G].
        true: true positive rates at them, [G].
        auc: area under the curve.
    """

    at: np.ndarray
    true: list[Estimate]
    auc: Estimate


def roc_intervals(rows: TaskRows, users: UserBootstrap, at: np.ndarray, *, level: float = 0.95) -> RocIntervals:
    """The ROC curve of rows of both classes at false positive rates [G], and its area, with intervals.

    Args:
        rows: the rows.
        users: resamples of users that hold every user of the rows.
        at: false positive rates [G].
        level: coverage of the percentile intervals, which hold at each rate alone.
    """
    user = np.searchsorted(users.users, rows.user_id)
    roc, auc = ResampledRoc(rows, user, at), ResampledAuc(rows, user)
    found = [(roc(counts), auc(counts)) for counts in users.counts(rows.label.size)]
    true, areas = (np.concatenate([block[i] for block in found]) for i in (0, 1))
    return RocIntervals(
        at=at, true=[estimate(column, level=level) for column in true.T], auc=estimate(areas, level=level)
    )


def estimate(samples: np.ndarray, *, level: float = 0.95, reason: str = "") -> Estimate:
    """The estimate of a statistic whose first sample is its value and whose others are resamples, [1 + B].

    Resamples that could not define the statistic are NaN and left out; when they are more than half, there is
    no interval.
    """
    if reason or not np.isfinite(samples[0]):
        return Estimate(value=None, low=None, high=None, reason=reason or "undefined on these rows")
    value, resampled = float(samples[0]), samples[1:]
    defined = resampled[np.isfinite(resampled)]
    if resampled.size == 0 or defined.size * 2 < resampled.size:
        why = f"{defined.size} of {resampled.size} resamples define it, too few for an interval"
        return Estimate(value=value, low=None, high=None, reason=why)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=value, low=float(low), high=float(high))
