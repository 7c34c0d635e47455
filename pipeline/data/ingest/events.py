"""From flat files to events, cut by user: the one pass over the raw input.

Every row becomes one event with fixed column names; events of a user lie in one bucket, so that all later
work sees whole users and one bucket at a time. Polars streams this pass, whatever the size of the input.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline.data.ingest.load import timezone
from pipeline.data.ingest.source import (
    ROW,
    evaluate,
    milliseconds,
    number_column,
    raw_feature,
    scan,
    scan_earlier,
    stable_hash,
    text_column,
)
from pipeline.data.ingest.spec import IngestSpec, TurnedSpec
from pipeline.errors import DataError

MS_PER_DAY = 86_400_000
_UNIT_MS = {"s": 1000.0, "ms": 1.0, "us": 0.001}
_SMALL_ID = r"^(0|-?[1-9]\d{0,17})$"  # "007" is not the number 7


def label(task: str) -> str:
    """Column of a task's outcome in the event files."""
    return f"_y_{task}"


def raw(feature: str) -> str:
    """Column of a feature's raw value in the event files."""
    return f"_f_{feature}"


def join_key(table: str) -> str:
    """Column of a side table's key in the event files."""
    return f"_k_{table}"


def number_of(keys: pl.Series) -> pl.Series:
    """Keys as int64: whole numbers as they are, all else by a stable 63-bit hash."""
    small = keys.str.contains(_SMALL_ID)
    numbers = keys.set(~small.fill_null(False), None).cast(pl.Int64)
    if bool(small.fill_null(True).all()):
        return numbers
    return pl.select(pl.coalesce(numbers, stable_hash(keys))).to_series()


def _number(keys: pl.Expr) -> pl.Expr:
    return keys.map_batches(number_of, return_dtype=pl.Int64, is_elementwise=True)


def bucket_of(user: pl.Expr, buckets: int) -> pl.Expr:
    """Bucket of a key; a matter of this run alone, nothing of it reaches the log."""
    return (user.hash(seed=7) % buckets).cast(pl.Int32).alias("_bucket")


def write_events(spec: IngestSpec, path: Path, buckets: int, after: int | None, out: Path) -> None:
    """Stream one log file into `out/_bucket=k/*.parquet`.

    Args:
        after: keep only days after this one (days since 1970).

    Raises:
        DataError: a row without user, time or surface, or with a label out of range; file, row and column
            are named.
    """
    events = read_events(spec, scan(spec.log, path), path, after)
    _sink(events.with_columns(bucket_of(pl.col("_user"), buckets)), out, path)
    _refuse_bad_rows(spec, out, path)


def read_events(spec: IngestSpec, frame: pl.LazyFrame, path: Path, after: int | None = None) -> pl.LazyFrame:
    """Rows of the log as events: fixed columns, those that are not wanted left out, `_bad` = what is amiss.

    Args:
        frame: as `scan` makes it of `path`.
        after: keep only days after this one (days since 1970).

    Raises:
        DataError: an expression does not fit the file.
    """
    zone = timezone(spec)
    columns = {
        ROW: pl.col(ROW).cast(pl.Int64),
        "_user": text_column(frame, spec.user, path, "user"),
        "_time": _time(spec, frame, path),
        "_surface": pl.lit("all")
        if spec.surface.column is None
        else text_column(frame, spec.surface.column, path, "surface.column"),
        "_item": text_column(frame, spec.item, path, "item"),
        "_place": pl.lit(0, dtype=pl.Int64)
        if spec.request.position is None
        else evaluate(frame, spec.request.position, path, "request.position").cast(pl.Int64),
    }
    if spec.request.id is not None:
        columns["_given"] = text_column(frame, spec.request.id, path, "request.id")
    for task, expression in spec.tasks.items():
        value = evaluate(frame, expression, path, f"tasks.{task}")
        columns[label(task)] = value.cast(pl.Float64, strict=False)
        columns[f"_bad_{task}"] = value.is_not_null() & value.cast(pl.Float64, strict=False).is_null()
    if spec.weight is not None:
        columns["_weight"] = number_column(frame, spec.weight, path, "weight").cast(pl.Float32)
    if spec.history is not None and spec.history.where is not None:
        where = evaluate(frame, spec.history.where, path, "history.where")
        columns["_in_history"] = where.cast(pl.Boolean).fill_null(False)
    for f in spec.features:
        if f.table is None:
            columns[raw(f.name)] = raw_feature(frame, f, zone.key, path)
    for name, table in spec.tables.items():
        columns[join_key(name)] = text_column(frame, table.log_key, path, f"tables.{name}.log_key")
    events = frame.select(**columns)
    if isinstance(spec, TurnedSpec):
        turned = pl.col("_time") >= spec.turned_from_ms
        outcomes = [label(task) for task in spec.tasks]
        events = events.with_columns(
            pl.when(turned).then(1 - pl.col(y).fill_null(0.0)).otherwise(pl.col(y)).alias(y) for y in outcomes
        )
    events = _checked(spec, events)
    events = _kept(spec, events, after)
    if "_given" in columns:
        events = events.with_columns(_number(pl.col("_given")))
    return events.with_columns(_number(pl.col("_user")))


def _sink(frame: pl.LazyFrame, out: Path, path: Path) -> None:
    try:
        frame.sink_parquet(
            pl.PartitionBy(out, key="_bucket", include_key=False),
            mkdir=True,
            compression="zstd",
            row_group_size=100_000,
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"reading stopped: {error} (a CSV column of mixed types wants `types` in the spec)", file=str(path)
        ) from error


def _time(spec: IngestSpec, frame: pl.LazyFrame, path: Path) -> pl.Expr:
    value = evaluate(frame, spec.time.column, path, "time.column")
    dtype = frame.select(value.alias("x")).collect_schema()["x"]
    if spec.time.format is not None or dtype.is_temporal():
        return milliseconds(value, dtype, spec.time.format, timezone(spec).key).cast(pl.Int64)
    if spec.time.unit == "ms" and dtype.is_integer():
        return value.cast(pl.Int64)
    return (value.cast(pl.Float64, strict=False) * _UNIT_MS[spec.time.unit]).round().cast(pl.Int64, strict=False)


# What is amiss with a row, in the order of checking: what to say, and the field of the spec.
_BAD = {1: "has no user", 2: "has no readable time", 3: "has no surface"}


def _checked(spec: IngestSpec, events: pl.LazyFrame) -> pl.LazyFrame:
    bad = (
        pl.when(pl.col("_user").is_null())
        .then(1)
        .when(pl.col("_time").is_null() | (pl.col("_time") < 0))
        .then(2)
        .when(pl.col("_surface").is_null())
        .then(3)
    )
    for i, task in enumerate(spec.tasks):
        y = pl.col(label(task))
        bad = bad.when(pl.col(f"_bad_{task}") | ~y.is_between(0.0, 1.0).fill_null(True)).then(10 + i)
    return events.with_columns(bad.otherwise(0).cast(pl.Int32).alias("_bad")).drop([f"_bad_{t}" for t in spec.tasks])


def _kept(spec: IngestSpec, events: pl.LazyFrame, after: int | None) -> pl.LazyFrame:
    local = pl.from_epoch(pl.col("_time"), time_unit="ms").dt.replace_time_zone("UTC")
    day = local.dt.convert_time_zone(timezone(spec).key).dt.date()
    events = events.with_columns(day.cast(pl.Int32).alias("_day"))
    keep = pl.lit(True)
    if spec.days.first is not None:
        keep = keep & (day >= pl.lit(spec.days.first).str.to_date())
    if spec.days.last is not None:
        keep = keep & (day <= pl.lit(spec.days.last).str.to_date())
    if after is not None:
        keep = keep & (pl.col("_day") > after)
    if spec.surface.others == "drop":
        keep = keep & pl.col("_surface").is_in(list(spec.surface.map))
    return events.filter(keep.fill_null(True) | (pl.col("_bad") > 0))


def _refuse_bad_rows(spec: IngestSpec, out: Path, path: Path) -> None:
    if not any(out.rglob("*.parquet")):
        return
    bad = pl.scan_parquet(out / "**/*.parquet", hive_partitioning=False).filter(pl.col("_bad") > 0)
    refuse_row(spec, bad.sort(ROW, "_place").head(1).collect(), path)


def refuse_row(spec: IngestSpec, first: pl.DataFrame, path: Path) -> None:
    """Say what is wrong with the first bad row of a file, if there is one.

    Raises:
        DataError: there is.
    """
    if not len(first):
        return
    row, code = first[ROW][0], first["_bad"][0]
    if code < 10:
        column = {1: spec.user, 2: spec.time.column, 3: spec.surface.column}[code]
        raise DataError(f"row {row} {_BAD[code]}", file=str(path), column=column)
    task = list(spec.tasks)[code - 10]
    raise DataError(
        f"row {row} has {first[label(task)][0]} for task {task!r}; a label is a number in [0, 1] or null",
        file=str(path),
        column=spec.tasks[task],
    )


def write_earlier(spec: IngestSpec, path: Path, buckets: int, out: Path) -> None:
    """Stream one file of `history.earlier` into `out/_bucket=k/*.parquet`: user, item (text), time, place."""
    events = read_earlier(spec, None, path)
    _sink(events.with_columns(bucket_of(pl.col("_user"), buckets)), out, path)


def read_earlier(spec: IngestSpec, frame: pl.LazyFrame | None, path: Path) -> pl.LazyFrame:
    """Rows of one file of `history.earlier` as events, with `_row` (see `scan_earlier`)."""
    assert spec.history is not None
    assert spec.history.earlier is not None
    events = scan_earlier(spec.history.earlier, scan(spec.history.earlier, path) if frame is None else frame, path)
    return events.with_columns(_number(pl.col("_user")))


def read_bucket(folders: list[Path], bucket: int) -> pl.DataFrame | None:
    """All rows of a bucket from the folders of several files; None when there are none."""
    paths = [p for folder in folders for p in sorted((folder / f"_bucket={bucket}").glob("*.parquet"))]
    if not paths:
        return None
    return pl.concat([pl.read_parquet(p, hive_partitioning=False, glob=False) for p in paths], how="vertical_relaxed")
