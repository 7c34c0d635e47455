"""The trivial baseline: what knowing the item's and the user's earlier rates alone is worth.

A model that does not beat it has learned nothing of taste, whatever its AUC. Per surface s and task:

    base_s    = clicks_s / shows_s
    lift(x)   = (clicks_sx + k * base_s) / ((shows_sx + k) * base_s)          x an item or a user
    p(u, i)   = base_s * lift(i) * lift(u), clipped into [1e-6, 1 - 1e-6]

Shows and clicks are sums of weights and of weight times label over training rows whose outcome was observed.
The lift is the rate under a Beta(k * base, k * (1 - base)) prior, over the base rate: with k shows the data
weigh as much as the prior, and an item or user that was never seen has lift 1. A surface never seen in training
takes the base rate over all surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.predictions import SURFACE, WEIGHT, Predictions
from pipeline.schema import USER_ID

CLIP = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """What one task's training rows came to: a base rate by surface, lifts by (surface, item) and (surface, user)."""

    overall: float
    base: pl.DataFrame
    item: pl.DataFrame
    user: pl.DataFrame


class TrivialBaseline:
    """Smoothed item rate times user rate, per surface and task.

    Args:
        strength: k of the formula, in shows.
        item: name of the column that names the item.

    Raises:
        ConfigError: `strength` is not positive.
    """

    def __init__(self, *, strength: float = 20.0, item: str = "item_id") -> None:
        if not strength > 0:
            raise ConfigError(f"strength is {strength}; it must be above 0, say 20 shows")
        self.strength = strength
        self.item = item
        self._rates: dict[str, _Rates] = {}

    def fit(self, table: pl.DataFrame | pl.LazyFrame) -> TrivialBaseline:
        """Count shows and clicks of training rows; of a lazy table only the counts are held in memory.

        Args:
            table: one row a candidate: `surface`, `user_id`, the item's column, `label_<task>` for each task
                (null = not observed), and optionally `weight`.

        Raises:
            DataError: a column is missing, no row has an observed outcome, or none of a task's is positive.
        """
        lazy = table.lazy()
        columns = lazy.collect_schema().names()
        tasks = [name.removeprefix("label_") for name in columns if name.startswith("label_")]
        _require(columns, [SURFACE, USER_ID, self.item, *([] if tasks else ["label_<task>"])])
        self._rates = {task: self._fit_task(lazy, task, weighted=WEIGHT in columns) for task in tasks}
        return self

    def predict(self, table: pl.DataFrame) -> pl.DataFrame:
        """Probabilities `p_<task>` (float64), one row for each row of `table`, in its order.

        Args:
            table: `surface`, `user_id` and the item's column.

        Raises:
            DataError: a column is missing, or `fit` has not been called.
        """
        if not self._rates:
            raise DataError("the trivial baseline has seen no rows yet; call fit on the training days first")
        _require(table.columns, [SURFACE, USER_ID, self.item])
        keys = table.select(pl.col(SURFACE).cast(pl.String), USER_ID, self.item)
        return pl.DataFrame([self._predict_task(keys, task, rates) for task, rates in self._rates.items()])

    def judge(self, predictions: Predictions) -> Predictions:
        """The baseline's predictions for the rows of a model's, whose table carries the item's column.

        Raises:
            DataError: the item's column or a task's rates are missing.
        """
        for task in predictions.tasks:
            if task not in self._rates:
                raise DataError(f"the trivial baseline was not fit on task {task!r}", column=f"label_{task}")
        scores = self.predict(predictions.table).select(f"p_{task}" for task in predictions.tasks)
        drop = [f"{which}_{task}" for which in ("raw", "truth") for task in predictions.tasks]
        return Predictions.of(predictions.table.drop(drop, strict=False).with_columns(scores))

    def _fit_task(self, table: pl.LazyFrame, task: str, *, weighted: bool) -> _Rates:
        weight = pl.col(WEIGHT).cast(pl.Float64) if weighted else pl.lit(1.0)
        label = pl.col(f"label_{task}").cast(pl.Float64)
        observed = table.filter(label.is_not_null()).with_columns(
            pl.col(SURFACE).cast(pl.String), shows=weight, clicks=weight * label
        )
        sums = (pl.col("shows").sum(), pl.col("clicks").sum())
        base, item, user = pl.collect_all(
            [observed.group_by(keys).agg(sums) for keys in ([SURFACE], [SURFACE, self.item], [SURFACE, USER_ID])],
            engine="streaming",
        )
        shows, clicks = (float(base[name].sum()) for name in ("shows", "clicks"))
        if not shows or not clicks:
            what = "observed" if not shows else "positive"
            raise DataError(f"no training row has a {what} outcome", column=f"label_{task}")
        base = base.select(SURFACE, base=(pl.col("clicks") / pl.col("shows")).fill_nan(clicks / shows))
        return _Rates(overall=clicks / shows, base=base, item=self._lifts(item, base), user=self._lifts(user, base))

    def _lifts(self, counts: pl.DataFrame, base: pl.DataFrame) -> pl.DataFrame:
        k, rate = self.strength, pl.col("base")
        lift = (pl.col("clicks") + k * rate) / ((pl.col("shows") + k) * rate)
        # A surface without any click has base rate 0, and all its lifts are 0 / 0.
        lifts = counts.join(base, on=SURFACE).with_columns(lift=lift.fill_nan(1.0))
        return lifts.drop("shows", "clicks", "base")

    def _predict_task(self, keys: pl.DataFrame, task: str, rates: _Rates) -> pl.Series:
        joined = (
            keys.join(rates.base, on=SURFACE, how="left", maintain_order="left")
            .join(rates.item, on=[SURFACE, self.item], how="left", maintain_order="left", nulls_equal=True)
            .rename({"lift": "lift_item"})
            .join(rates.user, on=[SURFACE, USER_ID], how="left", maintain_order="left")
        )
        p = pl.col("base").fill_null(rates.overall) * pl.col("lift_item").fill_null(1) * pl.col("lift").fill_null(1)
        return joined.select(p.clip(CLIP, 1 - CLIP).alias(f"p_{task}")).to_series()


def _require(columns: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if name not in columns:
            raise DataError(f"the trivial baseline needs the columns {', '.join(wanted)}", column=name)
