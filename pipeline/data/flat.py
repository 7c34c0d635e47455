"""The other way round: grouped logs as one row a candidate, for baselines, truths and analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from pipeline.data.logs import Dataset
from pipeline.errors import SchemaError
from pipeline.schema import HISTORY_ITEM, REQUEST_ID, TIMESTAMP_MS, USER_ID, WEIGHT, DatasetSchema, Kind, Level


def item_feature(schema: DatasetSchema) -> str:
    """The candidate-level feature that names the item: of the history's vocabulary, or else of the largest one.

    Raises:
        SchemaError: candidates have no single-valued categorical feature.
    """
    names = [f for f in schema.select(level=Level.CANDIDATE, kind=Kind.CATEGORICAL) if not f.multi_valued]
    if not names:
        raise SchemaError("candidates have no single-valued categorical feature that could name the item")
    if schema.has_history:
        shared = [f for f in names if f.vocabulary == schema.feature(HISTORY_ITEM).vocabulary]
        names = shared or names
    return max(names, key=lambda f: schema.vocabulary(f.vocabulary or "").size).name


def impressions(
    dataset: Dataset,
    *,
    surfaces: Sequence[str],
    tasks: Sequence[str],
    days: tuple[str, ...],
    item: str,
    features: Sequence[str] = (),
) -> pl.LazyFrame:
    """One row a candidate: surface, date, request_id, user_id, timestamp_ms, candidate, item, `label_<task>`, weight.

    Args:
        dataset: the log.
        surfaces, tasks, days: which rows and labels.
        item: the candidate feature that names the item.
        features: further single-valued features of request or candidate that every surface has.

    Raises:
        DataError, SchemaError: an unknown day, surface or feature.
    """
    parts = []
    level = {f: dataset.schema.feature(f).level for f in features if f != item}
    lists = [item, *tasks, *([WEIGHT] if dataset.schema.weighted else [])]
    lists += [f for f in level if level[f] is Level.CANDIDATE]
    single = [f for f in level if level[f] is Level.REQUEST]
    for surface in surfaces:
        for partition in dataset.partitions(surface, days):
            files = [str(dataset.root / f.path) for f in partition.files]
            parts.append(
                pl.scan_parquet(files, hive_partitioning=False)
                .select(REQUEST_ID, USER_ID, TIMESTAMP_MS, *single, *lists)
                .with_columns(candidate=pl.int_ranges(0, pl.col(tasks[0]).list.len().cast(pl.Int64), dtype=pl.Int32))
                .explode([*lists, "candidate"], empty_as_null=False)
                .with_columns(surface=pl.lit(surface), date=pl.lit(partition.date))
            )
    return pl.concat(parts).rename({t: f"label_{t}" for t in tasks})


def seen_users(
    dataset: Dataset, *, surfaces: Sequence[str], training: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, str], set[int]]:
    """Users with a request on a surface in training, by (test day, surface).

    Args:
        dataset: the log.
        surfaces: which.
        training: test day -> the days that were trained on for it.

    Raises:
        DataError: an unknown day or surface.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for day, days in training.items():
        for surface in surfaces:
            files = [str(dataset.root / f.path) for p in dataset.partitions(surface, days) for f in p.files]
            users = pl.scan_parquet(files, hive_partitioning=False).select(USER_ID).unique().collect()
            found[day, surface] = set(users[USER_ID])
    return found
