"""Columns of the simulated log."""

from __future__ import annotations

from pipeline.data.simulate.config import SimulationConfig
from pipeline.schema import HISTORY_ITEM, DatasetSchema, Feature, Kind, Level, Vocabulary

TASKS = ("click", "long_click", "save", "hide")
CLICK, LONG_CLICK, SAVE, HIDE = range(len(TASKS))
AGES, COUNTRIES, DEVICES, FORMATS, HOURS = 6, 10, 3, 4, 24
GENERIC_TERMS = 20  # query terms that belong to no topic


def simulation_schema(config: SimulationConfig) -> DatasetSchema:
    """Features, id spaces and tasks of a simulated log; a function of the configuration alone.

    Ids start at 1 in every vocabulary; 0 is left to whoever reads the log. `query` and `match_score` exist
    where the surface's context is a query, `related_item` where it is a related item.
    """
    names = tuple(s.name for s in config.surfaces)
    query = tuple(s.name for s in config.surfaces if s.context == "query")
    related = tuple(s.name for s in config.surfaces if s.context == "related")
    vocabularies = {
        "user": config.users,
        "age_bucket": AGES,
        "country": COUNTRIES,
        "device": DEVICES,
        "hour": HOURS,
        "item": config.items,
        "advertiser": config.advertisers,
        "category": config.topics,
        "topic": config.topics,
        "format": FORMATS,
        "query_term": config.topics * config.terms_per_topic + GENERIC_TERMS,
    }
    with_history = config.history_length > 0
    features = [
        *(_ids(name, Level.REQUEST, name, names) for name in ("user", "age_bucket", "country", "device", "hour")),
        *(_number(name, Level.REQUEST, names) for name in ("tenure_days", "hours_since_last", "session_position")),
        *([_ids("query", Level.REQUEST, "query_term", query, multi_valued=True)] if query else []),
        *([_ids("related_item", Level.REQUEST, "item", related)] if related else []),
        *(_ids(name, Level.CANDIDATE, name, names) for name in ("item", "advertiser", "category")),
        _ids("topics", Level.CANDIDATE, "topic", names, multi_valued=True),
        _ids("format", Level.CANDIDATE, "format", names),
        *(_number(name, Level.CANDIDATE, names) for name in ("price", "ad_age_days", "creative_score")),
        *([_number("match_score", Level.CANDIDATE, query)] if query else []),
        *([_ids(HISTORY_ITEM, Level.HISTORY, "item", names)] if with_history else []),
        *([_ids("history_category", Level.HISTORY, "category", names)] if with_history else []),
        *([_ids("history_advertiser", Level.HISTORY, "advertiser", names)] if with_history else []),
    ]
    used = {f.vocabulary for f in features}
    return DatasetSchema(
        surfaces=names,
        tasks=TASKS,
        vocabularies=tuple(Vocabulary(name=n, size=1 + size) for n, size in vocabularies.items() if n in used),
        features=tuple(features),
        history_length=config.history_length,
        label_delay_ms=config.label_delay_ms,
    )


def _ids(name: str, level: Level, vocabulary: str, surfaces: tuple[str, ...], *, multi_valued: bool = False) -> Feature:
    return Feature(
        name=name,
        level=level,
        kind=Kind.CATEGORICAL,
        surfaces=surfaces,
        vocabulary=vocabulary,
        multi_valued=multi_valued,
    )


def _number(name: str, level: Level, surfaces: tuple[str, ...]) -> Feature:
    return Feature(name=name, level=level, kind=Kind.NUMERIC, surfaces=surfaces)
