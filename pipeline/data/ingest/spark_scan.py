"""The flat files read by Spark: rows become events batch by batch, through the code of the embedded engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import polars as pl
import pyarrow as pa

from pipeline.data.ingest.events import bucket_of, read_earlier, read_events, refuse_row
from pipeline.data.ingest.reading import Inputs
from pipeline.data.ingest.row_wise import is_row_wise
from pipeline.data.ingest.source import ROW, derived, is_parquet
from pipeline.data.ingest.spec import Files, IngestSpec
from pipeline.errors import ConfigError, DataError

FILE, PLACE = "_file", "_n"  # which file a row is of, and which of its exploded rows
_PATH, _INDEX = "_path", "_index"
Read = Callable[[IngestSpec, pl.LazyFrame, Path], pl.LazyFrame]


def refuse_what_spark_cannot(spec: IngestSpec, inputs: Inputs) -> None:
    """Say which parts of a spec need the embedded engine.

    Args:
        inputs: the files that the spec names.

    Raises:
        ConfigError: some do: flat files that are not Parquet (Spark guesses the types of CSV otherwise than
            Polars does), or an expression whose value depends on other rows.
    """
    problems: list[str] = []
    named: list[tuple[str, Files, list[Path]]] = [("log", spec.log, inputs.logs)]
    if spec.history is not None and spec.history.earlier is not None:
        named.append(("history.earlier", spec.history.earlier, inputs.earlier))
    for what, files, paths in named:
        if not all(is_parquet(files, p) for p in paths):
            problems.append(f"{what}.files: must be Parquet (CSV has no types, and Spark guesses them in its own way)")
    for what, expression in _expressions(spec):
        if not is_row_wise(expression):
            problems.append(f"{what}: {expression!r} looks at more than one row, or may")
    if problems:
        raise ConfigError(
            f"spec {spec.name} cannot run on Spark; use `trefoil ingest`, or change:\n  - " + "\n  - ".join(problems)
        )


def _expressions(spec: IngestSpec) -> Iterator[tuple[str, str]]:
    yield from ((f"log.derive.{n}", e) for n, e in spec.log.derive.items())
    yield from ((f"tasks.{n}", e) for n, e in spec.tasks.items())
    yield from ((f"features.{f.name}.column", f.column) for f in spec.features if f.table is None)
    yield from ((f"tables.{n}.log_key", t.log_key) for n, t in spec.tables.items())
    single = {"user": spec.user, "item": spec.item, "time.column": spec.time.column, "weight": spec.weight}
    single |= {"surface.column": spec.surface.column, "request.id": spec.request.id}
    single |= {"request.position": spec.request.position}
    if spec.history is not None:
        single["history.where"] = spec.history.where
        if (earlier := spec.history.earlier) is not None:
            yield from ((f"history.earlier.derive.{n}", e) for n, e in earlier.derive.items())
            single |= {f"history.earlier.{n}": getattr(earlier, n) for n in ("user", "items", "last_time")}
    yield from ((name, e) for name, e in single.items() if e is not None)


def scan_on_spark(spec: IngestSpec, files: Files, paths: list[Path], read: Read, buckets: int, session: Any) -> Any:
    """A Spark frame of events with `_bucket`, `_file` (index in `paths`) and `_n`, not yet in any order.

    Args:
        files: what of the spec the paths belong to.
        paths: the flat files, at the same path on every machine.
        read: `read_events` or `read_earlier`.

    Raises:
        DataError: a file cannot be read or lacks a column.
    """
    known = {str(p.resolve()): i for i, p in enumerate(paths)}
    groups: dict[tuple[tuple[str, pl.DataType], ...], list[Path]] = {}
    for path in paths:
        try:
            columns = pl.read_parquet_schema(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"cannot read this as parquet: {error}", file=str(path)) from error
        groups.setdefault(tuple(columns.items()), []).append(path)
    whole = None
    for group, members in groups.items():
        schema = _needed(spec, files, dict(group), members[0], read)
        event = partial(_events, spec=spec, files=files, schema=schema, known=known, read=read, buckets=buckets)
        empty = _frame(spec, files, pl.DataFrame(schema={**schema, ROW: pl.Int64}), members[0], read, buckets)
        rows = session.read.parquet(*(f"file://{p.resolve()}" for p in members))
        names = [f"`{c}`" for c in schema]
        rows = rows.selectExpr(*names, f"_metadata.file_path as {_PATH}", f"_metadata.row_index as {_INDEX}")
        made = rows.mapInArrow(event, _spark_schema(empty))
        whole = made if whole is None else whole.unionByName(made)
    return whole


def _needed(
    spec: IngestSpec, files: Files, schema: dict[str, pl.DataType], path: Path, read: Read
) -> dict[str, pl.DataType]:
    """The columns without which the spec cannot be read."""
    kept = dict(schema)
    for name in schema:
        less = {n: t for n, t in kept.items() if n != name}
        try:
            _frame(spec, files, pl.DataFrame(schema={**less, ROW: pl.Int64}), path, read, 1)
        except (DataError, pl.exceptions.PolarsError):
            continue
        kept = less
    return kept


def _frame(spec: IngestSpec, files: Files, rows: pl.DataFrame, path: Path, read: Read, buckets: int) -> pl.DataFrame:
    events = read(spec, derived(files, rows.lazy(), path), path)
    events = events.with_columns(
        bucket_of(pl.col("_user"), buckets), pl.int_range(pl.len(), dtype=pl.Int64).alias(PLACE)
    )
    return events.with_columns(pl.lit(0, dtype=pl.Int32).alias(FILE)).collect()


def _events(
    batches: Iterable[pa.RecordBatch],
    *,
    spec: IngestSpec,
    files: Files,
    schema: dict[str, pl.DataType],
    known: dict[str, int],
    read: Read,
    buckets: int,
) -> Iterator[pa.RecordBatch]:
    """On an executor: batches of flat rows to batches of events."""
    for batch in batches:
        frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
        for (name,), part in frame.partition_by(_PATH, as_dict=True, include_key=False).items():
            path = unquote(urlsplit(str(name)).path)
            rows = part.with_columns(pl.col(_INDEX).cast(pl.Int64) + 1).rename({_INDEX: ROW})
            found = _frame(spec, files, rows.cast(pl.Schema({**schema, ROW: pl.Int64()})), Path(path), read, buckets)
            found = found.with_columns(pl.lit(known[path], dtype=pl.Int32).alias(FILE))
            yield from _plain(found.to_arrow()).to_batches()


def _plain(table: pa.Table) -> pa.Table:
    """Without the types of 64-bit offsets, which not every reader has."""

    def plain(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            return pa.string()
        if pa.types.is_large_list(kind) or pa.types.is_list(kind):
            return pa.list_(plain(kind.value_type))
        return kind

    return table.cast(pa.schema([(f.name, plain(f.type)) for f in table.schema]))


def _spark_schema(frame: pl.DataFrame) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(_plain(frame.to_arrow()).schema)


def refuse_bad_rows(spec: IngestSpec, events: Any, paths: list[Path]) -> None:
    """Raise for the first bad row of the first file that has one, as `write_events` does.

    Raises:
        DataError: there is one.
    """
    first = events.filter("_bad > 0").orderBy(FILE, ROW, "_place").limit(1).toArrow()
    if first.num_rows:
        refuse_row(spec, pl.DataFrame(pl.from_arrow(first)), paths[first[FILE][0].as_py()])


def lay_events(batches: Iterable[pa.RecordBatch], root: Path, name: str) -> list[int]:
    """Write events to `root/BUCKET/NAME-00000/_bucket=BUCKET/`, in the order of the files; the buckets that came."""
    found: set[int] = set()
    for i, batch in enumerate(batches):
        frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
        for (bucket,), part in frame.partition_by("_bucket", as_dict=True, include_key=False).items():
            folder = root / str(bucket) / "arrived"
            folder.mkdir(parents=True, exist_ok=True)
            part.write_parquet(folder / f"{i:08d}.parquet")
            found.add(int(str(bucket)))
    for bucket in found:
        arrived = root / str(bucket) / "arrived"
        events = pl.concat([pl.read_parquet(p) for p in sorted(arrived.iterdir())]).sort(FILE, ROW, PLACE)
        if name == "earlier":  # the first row that has a user counts
            first = events.unique("_user", keep="first", maintain_order=True).select("_user", FILE, ROW)
            events = events.join(first, on=["_user", FILE, ROW], how="semi", maintain_order="left")
        folder = root / str(bucket) / f"{name}-00000" / f"_bucket={bucket}"
        folder.mkdir(parents=True)
        events.drop(FILE, PLACE).write_parquet(folder / "part.parquet")
        for path in arrived.iterdir():
            path.unlink()
    return sorted(found)


READ_EVENTS: Read = read_events
READ_EARLIER: Read = read_earlier
