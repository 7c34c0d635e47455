"""One bucket of events made ready: in order, grouped to requests, every feature a number or an id."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from pipeline.data.ingest.events import join_key, label, raw
from pipeline.data.ingest.ids import Ids, list_parts, list_series
from pipeline.data.ingest.load import timezone
from pipeline.data.ingest.source import ROW, read_table
from pipeline.data.ingest.spec import FeatureSpec, IngestSpec
from pipeline.errors import DataError
from pipeline.schema import HISTORY_ITEM

SURFACES = "_surface"  # the internal vocabulary of raw surface values; base rates are kept for each
_AGE_MS = {"day": 86_400_000.0, "hour": 3_600_000.0}


def day_number(day: str) -> int:
    """Days since 1970 of an ISO day."""
    return int(np.datetime64(day, "D").astype(np.int64))


@dataclass(frozen=True)
class Encoders:
    """Everything that turns raw values into numbers: id spaces, and side tables already encoded.

    Args:
        ids: by vocabulary, and `SURFACES`.
        tables: by side table: `_key` and the encoded features.
        shared: vocabularies used at several levels, where a candidate must have exactly one id.
    """

    ids: dict[str, Ids]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()


def shared_vocabularies(spec: IngestSpec) -> frozenset[str]:
    """Vocabularies that meet across levels: there a candidate must have exactly one id."""
    levels: dict[str, set[str]] = {}
    for f in spec.features:
        if f.vocabulary_name is not None:
            levels.setdefault(f.vocabulary_name, set()).add(f.level)
    for feature in spec.history.features.values() if spec.history else ():
        levels.setdefault(spec.feature(feature).vocabulary_name or "", set()).add("history")
    return frozenset(v for v, at in levels.items() if len(at) > 1 or "history" in at)


def read_tables(spec: IngestSpec) -> dict[str, pl.DataFrame]:
    """The side tables with raw values."""
    return {
        name: read_table(table, name, [f for f in spec.features if f.table == name], timezone(spec).key)
        for name, table in spec.tables.items()
    }


def encode_feature(f: FeatureSpec, values: pl.Series, ids: dict[str, Ids]) -> pl.Series:
    """Raw values to ids or numbers; an age stays a point in time until the request is known."""
    if f.vocabulary is not None:
        try:
            return ids[f.vocabulary].encode_lists(values) if f.is_multi else ids[f.vocabulary].encode(values)
        except DataError as error:
            raise DataError(f"feature {f.name}: {error.problem}", column=f.column) from error
    return values if f.age is not None else _finish_number(f, values)


def _finish_number(f: FeatureSpec, values: pl.Series) -> pl.Series:
    if f.log1p:
        values = pl.select(pl.lit(values.clip(lower_bound=0.0)).log1p()).to_series()
    if f.buckets is None:
        return values.cast(pl.Float32)
    known = values.to_numpy()
    # side="right" counts the edges at or below the value
    ids = 1 + np.searchsorted(np.array(f.buckets), known, side="right")
    return pl.Series(ids).cast(pl.Int64).set(values.is_null(), None)


def encode_tables(spec: IngestSpec, tables: dict[str, pl.DataFrame], ids: dict[str, Ids]) -> dict[str, pl.DataFrame]:
    """Side tables with encoded values."""
    return {
        name: table.select(
            "_key", *(encode_feature(f, table[f.name], ids).alias(f.name) for f in spec.features if f.table == name)
        )
        for name, table in tables.items()
    }


def prepare(spec: IngestSpec, events: pl.DataFrame, encoders: Encoders) -> pl.DataFrame:
    """Sort a bucket's raw events, group them to requests and encode their features.

    Args:
        events: of whole users; a column `fresh` tells candidates-to-be from events of an earlier ingest.

    Returns:
        user, time, day, surface (code of the raw value), code (0 = not mapped, else 1 + surface), request
        (index within the bucket in order of first rows; -1 = not a candidate), request_time, given,
        weight, outcomes, features by name.
    """
    # The content decides before the place in the file does, so that the order of input rows matters to equals alone.
    order = ["_user", "_time", "_surface", "_place", "_item", *(label(t) for t in spec.tasks), ROW]
    events = events.sort(order, maintain_order=True)
    codes = {raw_value: 1 + spec.surfaces.index(s) for raw_value, s in spec.surface.map.items()}
    code = pl.col("_surface").replace_strict(codes, default=0, return_dtype=pl.Int8)
    out = events.select(
        "_user",
        "_time",
        "_day",
        pl.Series("_surface", encoders.ids[SURFACES].encode(events["_surface"])),
        code.alias("_code"),
        "_fresh",
        *(c for c in ("_given", "_weight", "_in_history") if c in events.columns),
        *(pl.col(label(t)).cast(pl.Float32) for t in spec.tasks),
    )
    request, request_time = _requests(spec, out)
    out = out.with_columns(pl.Series("_request", request), pl.Series("_request_time", request_time))
    return out.with_columns(_features(spec, events, encoders, request_time))


def _features(spec: IngestSpec, events: pl.DataFrame, encoders: Encoders, now: np.ndarray) -> list[pl.Series]:
    joined = {
        name: events.select(pl.col(join_key(name)).alias("_key")).join(
            table, on="_key", how="left", maintain_order="left"
        )
        for name, table in encoders.tables.items()
    }
    columns = []
    for f in spec.features:
        if f.table is None:
            values = encode_feature(f, events[raw(f.name)], encoders.ids)
        else:
            values = joined[f.table][f.name]
            if f.is_multi:
                values = list_series(*_without_nulls(values))
        if f.age is not None:
            since = pl.Series(now.astype(np.float64)) - values
            values = _finish_number(f, since.clip(lower_bound=0.0) / _AGE_MS[f.age.unit])
        if f.level == "candidate" and f.vocabulary_name in encoders.shared:
            values = values.fill_null(0)
        columns.append(values.alias(f.name))
    return columns


def _without_nulls(values: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    offsets, flat = list_parts(values)
    return offsets, flat.to_numpy().astype(np.int64)


def _requests(spec: IngestSpec, events: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Request of each row (-1 for rows that are no candidates) and the time its features look back from."""
    day = events["_day"].to_numpy()
    is_candidate = (events["_code"].to_numpy() > 0) & events["_fresh"].to_numpy()
    if spec.days.candidates_from is not None:
        is_candidate &= day >= day_number(spec.days.candidates_from)
    time = events["_time"].to_numpy()
    rows = np.flatnonzero(is_candidate)
    request = np.full(len(events), -1, np.int64)
    request_time = time.copy()
    if not rows.size:
        return request, request_time
    user, code = events["_user"].to_numpy()[rows], events["_code"].to_numpy()[rows]
    if spec.request.id is not None:
        given = _given_ids(spec, events, rows)
        order = np.lexsort((rows, given, code, user))
        starts = _changes(order, user, code, given)
        two_days = _changes(order, day[rows]) & ~starts
        if two_days.any():
            i = int(order[np.flatnonzero(two_days)[0]])
            raise DataError(
                f"request {int(given[i])} of user {int(user[i])} has impressions on two days; an id must name one "
                "request, so join the day to it, or give all its impressions the time of the request",
                column=spec.request.id,
            )
    else:
        order = np.lexsort((rows, code, user))
        gap = np.diff(time[rows][order], prepend=0) > (spec.request.gap_s or 0) * 1000
        starts = _changes(order, user, code, day[rows]) | gap | (spec.request.gap_s == 0)
    sorted_rows = rows[order]
    starts[0] = True
    first = sorted_rows[starts][np.cumsum(starts) - 1]
    # Number requests by their first row, so that they come in order of user and time.
    request[sorted_rows] = np.searchsorted(np.unique(first), first)
    request_time[sorted_rows] = time[first]
    return request, request_time


def _given_ids(spec: IngestSpec, events: pl.DataFrame, rows: np.ndarray) -> np.ndarray:
    """The spec's request ids of candidate rows."""
    given = events["_given"][rows]
    if given.null_count():
        first = events[int(rows[int(given.is_null().arg_max() or 0)])]
        raise DataError(
            f"the impression of user {first['_user'][0]} at {first['_time'][0]} ms has no request id",
            column=spec.request.id,
        )
    return given.to_numpy()


def _changes(order: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Where a row, in `order`, differs from the one before in some column."""
    changed = np.zeros(order.size, bool)
    for column in columns:
        changed[1:] |= np.diff(column[order]) != 0
    return changed


def prepare_earlier(spec: IngestSpec, earlier: pl.DataFrame, events: pl.DataFrame, encoders: Encoders) -> pl.DataFrame:
    """Earlier events (`history.earlier`) of a bucket: user, time, and the history features, in order.

    Times: all events of a user at the time of the newest, the latest that each can have; where the table
    has no time, just early enough for the user's first event to see them.
    """
    assert spec.history is not None
    first = events.group_by("_user").agg(pl.col("_time").min().alias("_first"))
    out = earlier.join(first, on="_user", how="inner", maintain_order="left").with_columns(
        pl.col("_time").fill_null(pl.col("_first") - spec.delay_ms - 1)
    )
    out = out.sort("_user", "_place", maintain_order=True)
    columns = {}
    for name, feature in spec.history.features.items():
        f = spec.feature(feature)
        if name == HISTORY_ITEM:
            values = encode_feature(f, out["_item"], encoders.ids)
        elif f.table is not None and spec.tables[f.table].log_key == spec.item:
            keyed = out.select(pl.col("_item").alias("_key"))
            values = keyed.join(encoders.tables[f.table], on="_key", how="left", maintain_order="left")[f.name]
        else:
            values = pl.zeros(len(out), dtype=pl.Int64, eager=True)
        columns[name] = values.fill_null(0)
    return out.select("_user", "_time").with_columns(**columns)
