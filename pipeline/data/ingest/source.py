"""Flat files as lazy Polars frames: the spec's expressions checked against each file's columns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from pipeline.data.ingest.spec import Earlier, Explode, FeatureSpec, Files, Table
from pipeline.errors import DataError, unknown

_TYPES = {"int": pl.Int64, "float": pl.Float64, "text": pl.String}
ROW = "_row"  # number of the row in its file, from 1, a header left out


def find_files(files: Files, what: str) -> list[Path]:
    """The files that the paths and globs name, sorted within each glob.

    Raises:
        DataError: one names nothing.
    """
    found: list[Path] = []
    for pattern in files.files:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"no file matches, named under {what}", file=pattern)
        found += [Path(m) for m in matches]
    return list(dict.fromkeys(found))


def is_parquet(files: Files, path: Path) -> bool:
    """Whether a file is Parquet: as the spec says, else by its ending."""
    return files.format == "parquet" or (files.format is None and path.suffix in (".parquet", ".pq"))


def scan(files: Files, path: Path) -> pl.LazyFrame:
    """One file with its exploded and derived columns, and `_row`.

    Raises:
        DataError: the file cannot be read, or lacks a column that an expression names.
    """
    kind = "parquet" if is_parquet(files, path) else "csv"
    try:
        if kind == "parquet":
            frame = pl.scan_parquet(path, row_index_name=ROW, row_index_offset=1, glob=False)
        else:
            frame = pl.scan_csv(
                path,
                separator=files.separator,
                quote_char=files.quote,
                has_header=files.header,
                new_columns=files.column_names,
                null_values=files.null_values or None,
                schema_overrides={c: _TYPES[t] for c, t in files.types.items()},
                infer_schema_length=10_000,
                row_index_name=ROW,
                row_index_offset=1,
                glob=False,
            )
        frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"cannot read this as {kind}: {error}", file=str(path)) from error
    return derived(files, frame, path)


def derived(files: Files, frame: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """A file's rows with its exploded and derived columns.

    Raises:
        DataError: the file lacks a column that an expression names.
    """
    if files.explode is not None:
        frame = _explode(frame, files.explode, path)
    for name, expression in files.derive.items():
        frame = frame.with_columns(evaluate(frame, expression, path, f"derive.{name}").alias(name))
    return frame


def _explode(frame: pl.LazyFrame, how: Explode, path: Path) -> pl.LazyFrame:
    schema = frame.collect_schema()
    if how.column not in schema:
        raise DataError("explode: " + unknown("column", how.column, schema), file=str(path), column=how.column)
    entries = pl.col(how.column)
    if how.separator is not None:
        entries = entries.str.split(how.separator)
    elif not isinstance(schema[how.column], pl.List):
        raise DataError(
            f"explode: the column is {schema[how.column]}, not a list; give a separator if it is text",
            file=str(path),
            column=how.column,
        )
    frame = frame.with_columns(entries.alias(how.name))
    # Rows without impressions carry none; exploding would make one null impression of them.
    frame = frame.filter(pl.col(how.name).list.len() > 0)
    if how.position is None:
        return frame.explode(how.name)
    return frame.with_columns(pl.int_ranges(pl.col(how.name).list.len()).alias(how.position)).explode(
        how.name, how.position
    )


def evaluate(frame: pl.LazyFrame, expression: str, path: Path, what: str) -> pl.Expr:
    """A spec's expression, checked against the frame's columns.

    Args:
        frame: what it will be evaluated on.
        expression: Polars SQL.
        path, what: file and field of the spec, for the message.

    Raises:
        DataError: it cannot be parsed, or names a column that the file does not have.
    """
    schema = frame.collect_schema()
    try:
        result = pl.col(expression) if expression in schema else pl.sql_expr(expression)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{what}: cannot parse the expression {expression!r}: {error}", file=str(path)) from error
    for root in result.meta.root_names():
        if root not in schema:
            raise DataError(f"{what}: " + unknown("column", root, schema), file=str(path), column=root)
    try:
        frame.select(result.alias("x")).collect_schema()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{what}: cannot evaluate {expression!r}: {error}", file=str(path)) from error
    return result


def text(expression: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Keys as text, the same whatever type a file stores them in: 7, 7.0 and "7" are one key.

    Empty text is null.
    """
    if dtype.is_float():
        whole = expression.cast(pl.Int64, strict=False)
        return pl.when(expression == whole).then(whole.cast(pl.String)).otherwise(expression.cast(pl.String))
    if dtype == pl.String:
        return pl.when(expression != "").then(expression)
    return expression.cast(pl.String)


def text_column(frame: pl.LazyFrame, expression: str, path: Path, what: str) -> pl.Expr:
    """An expression of the spec as keys (see `text`)."""
    value = evaluate(frame, expression, path, what)
    return text(value, frame.select(value.alias("x")).collect_schema()["x"])


def number_column(frame: pl.LazyFrame, expression: str, path: Path, what: str) -> pl.Expr:
    """An expression of the spec as float64; what is not a number becomes null, and so does NaN."""
    value = evaluate(frame, expression, path, what).cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def raw_feature(frame: pl.LazyFrame, f: FeatureSpec, zone: str, path: Path) -> pl.Expr:
    """The raw value of a feature: keys as text, lists of them, or a number (of an age: milliseconds since 1970)."""
    what = f"feature {f.name}"
    value = evaluate(frame, f.column, path, what)
    dtype = frame.select(value.alias("x")).collect_schema()["x"]
    if f.is_multi:
        if f.separator is not None:
            return (
                text(value, dtype)
                .str.split(f.separator)
                .list.eval(pl.element().str.strip_chars().replace("", None).drop_nulls())
            )
        if not isinstance(dtype, pl.List):
            raise DataError(
                f"{what} is multi_valued, yet the column is {dtype}; give a separator if it is text",
                file=str(path),
                column=f.column,
            )
        return value.list.eval(text(pl.element(), dtype.inner).drop_nulls())  # type: ignore[arg-type]
    if f.vocabulary is not None:
        return text(value, dtype)
    if f.age is not None and (f.age.format is not None or dtype.is_temporal()):
        return milliseconds(value, dtype, f.age.format, zone)
    return number_column(frame, f.column, path, what)


def milliseconds(value: pl.Expr, dtype: pl.DataType, form: str | None, zone: str) -> pl.Expr:
    """Local times, as text in `form` or as dates, as milliseconds since 1970, UTC; null where not readable."""
    if dtype == pl.String:
        value = value.str.to_datetime(form, time_unit="ms", strict=False)
    elif dtype == pl.Date:
        value = value.cast(pl.Datetime("ms"))
    if getattr(dtype, "time_zone", None) is None:
        value = value.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
    return value.dt.epoch("ms").cast(pl.Float64)


def stable_hash(keys: pl.Series) -> pl.Series:
    """63-bit FNV-1a of the UTF-8 text of each key, the same in every version and language.

    Works byte place by byte place over all keys at once. Null stays null.

    Source: http://www.isthe.com/chongo/tech/comp/fnv/ (offset basis and prime of the 64-bit form).

    >>> stable_hash(pl.Series(["a"])).item() == 0xAF63DC4C8601EC8C >> 1
    True
    """
    import numpy as np

    unique = keys.drop_nulls().unique()
    encoded = np.array([k.encode() for k in unique.to_list()], dtype=np.bytes_)
    lengths = unique.str.len_bytes().to_numpy()
    state = np.full(len(unique), 0xCBF29CE484222325, dtype=np.uint64)
    if len(unique):
        letters = encoded.view(np.uint8).reshape(len(unique), -1)
        for place in range(letters.shape[1]):
            inside = lengths > place
            state[inside] = (state[inside] ^ letters[inside, place]) * np.uint64(0x100000001B3)
    table = pl.DataFrame({"key": unique, "hash": (state >> np.uint64(1)).astype(np.int64)})
    return pl.DataFrame({"key": keys}).join(table, on="key", how="left", maintain_order="left")["hash"]


def read_table(table: Table, name: str, features: Iterable[FeatureSpec], zone: str) -> pl.DataFrame:
    """A side table in memory: `_key` as text and a raw column for each feature.

    Raises:
        DataError: a key stands twice, or a file or column is amiss.
    """
    parts = []
    for path in find_files(table, f"tables.{name}"):
        frame = scan(table, path)
        parts.append(
            frame.select(
                text_column(frame, table.key, path, f"tables.{name}.key").alias("_key"),
                *(raw_feature(frame, f, zone, path).alias(f.name) for f in features),
            ).collect()
        )
    whole = pl.concat(parts, how="vertical_relaxed").filter(pl.col("_key").is_not_null())
    twice = whole.filter(pl.col("_key").is_duplicated())
    if len(twice):
        raise DataError(
            f"key {twice['_key'][0]!r} stands more than once in table {name!r}; a side table has one row a key",
            file=", ".join(table.files),
            column=table.key,
        )
    return whole


def scan_earlier(earlier: Earlier, frame: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """Earlier events of one file: `_row`, `_user` (text), `_item` (text), `_time` (ms or null), `_place` from 0.

    Args:
        frame: as `scan` makes it of `path`.
    """
    items = evaluate(frame, earlier.items, path, "history.earlier.items")
    dtype = frame.select(items.alias("x")).collect_schema()["x"]
    if earlier.item_separator is not None:
        items = text(items, dtype).str.split(earlier.item_separator)
        inner: pl.DataType = pl.String()
    elif isinstance(dtype, pl.List):
        inner = dtype.inner  # type: ignore[assignment]
    else:
        raise DataError(
            f"history.earlier.items is {dtype}, not a list; give item_separator if it is text",
            file=str(path),
            column=earlier.items,
        )
    time = pl.lit(None, dtype=pl.Int64)
    if earlier.last_time is not None:
        time = evaluate(frame, earlier.last_time, path, "history.earlier.last_time").cast(pl.Int64)
    lists = frame.select(
        pl.col(ROW).cast(pl.Int64),
        text_column(frame, earlier.user, path, "history.earlier.user").alias("_user"),
        items.alias("_item"),
        time.alias("_time"),
    ).filter(pl.col("_user").is_not_null() & (pl.col("_item").list.len() > 0))
    lists = lists.unique("_user", keep="first", maintain_order=True)
    return (
        lists.with_columns(pl.int_ranges(pl.col("_item").list.len()).alias("_place"))
        .explode("_item", "_place")
        .with_columns(text(pl.col("_item"), inner))
    )
