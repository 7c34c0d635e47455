"""The tabular rival: gradient-boosted trees on the numbers and small id spaces of a log, without embeddings.

A neural model that does not beat it has not earned its tables. Ke et al., "LightGBM: A Highly Efficient Gradient
Boosting Decision Tree", NeurIPS 2017; the library is the optional extra `gbdt`. One model a task learns from the
rows of all surfaces, with the surface as a categorical feature. The number of trees is where the log loss of the
validation rows is lowest; nothing is chosen on test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.predictions import SURFACE, WEIGHT, Predictions

PATIENCE = 50  # rounds without a better validation loss before boosting stops


@dataclass(frozen=True, kw_only=True)
class BoostedTreesConfig:
    """Settings of the trees: a slow learner of small trees, which logs of a few hundred thousand rows want."""

    rounds: int = 1000
    """The most trees of a task; fewer where the validation loss stops falling."""
    learning_rate: float = 0.03
    leaves: int = 15
    rows_in_leaf: int = 200
    feature_fraction: float = 0.5
    """Share of the columns that each tree may use."""
    l2: float = 10.0
    """Penalty on the squares of the leaves' values."""
    seed: int = 0


class BoostedTrees:
    """Boosted trees for several tasks.

    Args:
        numeric: names of numeric columns; null or NaN is absent.
        categorical: names of integer columns that are ids; the surface is added by itself.
        config: settings.

    Raises:
        ConfigError: there is no column at all, or LightGBM is not installed.
    """

    def __init__(
        self,
        *,
        numeric: Sequence[str],
        categorical: Sequence[str] = (),
        config: BoostedTreesConfig | None = None,
    ) -> None:
        try:
            import lightgbm
        except ImportError as cause:
            raise ConfigError("boosted trees need LightGBM; install the extra: pip install 'trefoil[gbdt]'") from cause
        if not numeric and not categorical:
            raise ConfigError("boosted trees were given no column; name numeric or categorical ones")
        self._lightgbm = lightgbm
        self.numeric, self.categorical = tuple(numeric), tuple(categorical)
        self.config = config or BoostedTreesConfig()
        self._surfaces: list[str] = []
        self._boosters: dict[str, Any] = {}

    @property
    def trees(self) -> dict[str, int]:
        """Trees of each task that predictions use."""
        return {task: booster.best_iteration for task, booster in self._boosters.items()}

    def fit(self, training: pl.DataFrame, validation: pl.DataFrame) -> BoostedTrees:
        """Learn every task whose label both tables have.

        Args:
            training: one row a candidate: `surface`, the columns, `label_<task>` (null = not observed), optionally
                `weight`.
            validation: the same for later rows, which choose the number of trees.

        Raises:
            DataError: a column is missing, or a task has no observed row.
        """
        tasks = [n.removeprefix("label_") for n in training.columns if n.startswith("label_")]
        if not tasks:
            raise DataError("no column label_<task> holds an outcome; there is nothing to learn")
        self._surfaces = training[SURFACE].unique().sort().to_list()
        for task in tasks:
            sets = [self._set(part, task) for part in (training, validation)]
            sets[1].reference = sets[0]
            self._boosters[task] = self._lightgbm.train(
                self._parameters(),
                sets[0],
                num_boost_round=self.config.rounds,
                valid_sets=[sets[1]],
                callbacks=[self._lightgbm.early_stopping(PATIENCE, verbose=False)],
            )
        return self

    def judge(self, predictions: Predictions) -> Predictions:
        """The trees' predictions for the rows of a model's, whose table carries the columns.

        Raises:
            DataError: a column is missing, or `fit` has not been called for a task.
        """
        table = predictions.table
        for task in predictions.tasks:
            if task not in self._boosters:
                raise DataError(f"the boosted trees were not fit on task {task!r}", column=f"label_{task}")
        features = self._features(table)
        scores = [
            pl.Series(f"p_{task}", np.asarray(self._boosters[task].predict(features), dtype=np.float64))
            for task in predictions.tasks
        ]
        extra = [f"{which}_{task}" for which in ("raw", "truth") for task in predictions.tasks]
        drop = [*extra, *self.numeric, *self.categorical]
        return Predictions.of(table.with_columns(scores).drop(drop, strict=False))

    def _parameters(self) -> dict[str, Any]:
        config = self.config
        return {
            "objective": "binary",
            "learning_rate": config.learning_rate,
            "num_leaves": config.leaves,
            "min_data_in_leaf": config.rows_in_leaf,
            "feature_fraction": config.feature_fraction,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "lambda_l2": config.l2,
            "seed": config.seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }

    def _set(self, table: pl.DataFrame, task: str) -> Any:
        observed = table.filter(pl.col(f"label_{task}").is_not_null())
        if not observed.height:
            raise DataError("no row has an observed outcome", column=f"label_{task}")
        weight = observed[WEIGHT].to_numpy() if WEIGHT in observed.columns else None
        names = [*self.numeric, SURFACE, *self.categorical]
        return self._lightgbm.Dataset(
            self._features(observed),
            label=observed[f"label_{task}"].to_numpy(),
            weight=weight,
            feature_name=names,
            categorical_feature=[SURFACE, *self.categorical],
        )

    def _features(self, table: pl.DataFrame) -> np.ndarray:
        for name in (SURFACE, *self.numeric, *self.categorical):
            if name not in table.columns:
                raise DataError("the boosted trees need this column", column=name)
        surface = pl.col(SURFACE).replace_strict(
            {s: i for i, s in enumerate(self._surfaces)}, default=None, return_dtype=pl.Float64
        )
        columns = [pl.col(n).cast(pl.Float64).fill_null(float("nan")) for n in (*self.numeric, *self.categorical)]
        numeric, ids = columns[: len(self.numeric)], columns[len(self.numeric) :]
        return table.select(*numeric, surface.fill_null(float("nan")), *ids).to_numpy()
