"""The boosted-tree rival on a log: the same days, rows, features and predictions file as a run of a model."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

import polars as pl

from pipeline.config import RunConfig
from pipeline.data.flat import impressions, item_feature
from pipeline.data.logs import Dataset
from pipeline.evaluate.boosted_trees import BoostedTrees, BoostedTreesConfig
from pipeline.evaluate.predictions import WEIGHT, Predictions
from pipeline.schema import DatasetSchema, Feature, Kind, Level
from pipeline.train.days import split_days

# Larger id spaces overfit as categories of a tree (on KuaiRand 1,024 cost .012 of AUC against 16); what they are
# worth reaches trees as rates.
MOST_CATEGORIES = 16


def tree_features(schema: DatasetSchema, config: RunConfig) -> tuple[list[str], list[str]]:
    """Numeric and categorical features of a run that trees can read: single-valued, of requests and candidates, on
    every surface of the run, ids of small vocabularies only."""

    def usable(f: Feature) -> bool:
        excluded = any(fnmatch(f.name, pattern) for pattern in config.exclude)
        everywhere = set(config.surfaces) <= set(f.surfaces)
        return everywhere and not excluded and not f.multi_valued and f.level is not Level.HISTORY

    features = [f for f in schema.features if usable(f)]
    numeric = [f.name for f in features if f.kind is Kind.NUMERIC]
    categorical = [f.name for f in features if f.vocabulary and schema.vocabulary(f.vocabulary).size <= MOST_CATEGORIES]
    return numeric, categorical


def boosted_tree_predictions(
    config: RunConfig, dataset: Dataset, settings: BoostedTreesConfig
) -> tuple[Predictions, int]:
    """Fit on the training days, choose the number of trees on the validation days, score both held-out splits.

    Args:
        config: days, surfaces, tasks, features and seed.
        dataset: the log.
        settings: of the trees; the seed is the run's.

    Returns predictions of validation and test days, and the number of training rows.

    Raises:
        ConfigError: LightGBM is not installed, or the days do not fit the log.
    """
    numeric, categorical = tree_features(dataset.schema, config)
    days = split_days(dataset, config.days)

    def rows(chosen: tuple[str, ...]) -> pl.DataFrame:
        table = impressions(
            dataset,
            surfaces=config.surfaces,
            tasks=config.tasks,
            days=chosen,
            item=item_feature(dataset.schema),
            features=[*numeric, *categorical],
        ).collect()
        return table if WEIGHT in table.columns else table.with_columns(pl.lit(1.0).alias(WEIGHT))

    training, validation = rows(days.train), rows(days.validation)
    trees = BoostedTrees(numeric=numeric, categorical=categorical, config=replace(settings, seed=config.seed))
    trees.fit(training, validation)
    held = pl.concat([validation, rows(days.test)]).with_columns(pl.lit(0.5).alias(f"p_{t}") for t in config.tasks)
    return trees.judge(Predictions.of(held)), training.height
