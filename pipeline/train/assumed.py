"""The log of a recipe that has none: the tables that it assumes, for plans of what is not there yet."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.schema import HISTORY_ITEM, DatasetSchema, Feature, Kind, Level, Vocabulary


def assumed_schema(config: RunConfig) -> DatasetSchema:
    """A log with the tables that the run assumes, one feature a table, for plans without a log.

    Raises:
        ConfigError: the run assumes no tables, or a history without a shared table.
    """
    workload = config.sharding.workload
    if not workload.tables:
        raise ConfigError(
            f"the recipe {config.name!r} names no tables of its own: give --data LOG, or sharding.workload.tables"
        )
    vocabularies, features = [], []
    shared: list[str] = []
    for table in workload.tables:
        for i in range(table.count):
            name = table.name if table.count == 1 else f"{table.name}_{i:03d}"
            vocabularies.append(Vocabulary(name=name, size=table.rows))
            level = Level.REQUEST if table.level == "request" else Level.CANDIDATE
            features.append(
                Feature(name=name, level=level, kind=Kind.CATEGORICAL, surfaces=config.surfaces, vocabulary=name)
            )
            if table.level == "shared":
                shared.append(name)
    if bool(shared) != bool(workload.history_length):
        raise ConfigError(
            "sharding.workload: a history needs both history_length above 0 and a table of level shared; "
            f"history_length is {workload.history_length}, shared tables: {', '.join(shared) or 'none'}"
        )
    for i, name in enumerate(shared):
        history = HISTORY_ITEM if i == 0 else f"history_{name}"
        features.append(
            Feature(name=history, level=Level.HISTORY, kind=Kind.CATEGORICAL, surfaces=config.surfaces, vocabulary=name)
        )
    return DatasetSchema(
        surfaces=config.surfaces,
        tasks=config.tasks,
        vocabularies=tuple(vocabularies),
        features=tuple(features),
        history_length=workload.history_length,
    )
