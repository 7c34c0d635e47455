"""From prepared events to rows of requests, and from the buckets' rows to the finished log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.ingest.events import label
from pipeline.data.ingest.history import HistoryBuilder, ranges
from pipeline.data.ingest.spec import IngestSpec
from pipeline.data.logs import arrow_schema
from pipeline.data.writer import LogWriter
from pipeline.errors import DataError
from pipeline.schema import REQUEST_ID, TIMESTAMP_MS, USER_ID, WEIGHT, DatasetSchema, Level

_CHUNK_BYTES = 16 << 20  # requests made into lists at a time take about this much
_FILE_BYTES = 24 << 20  # requests of one file of the log take about this much in memory
_ID_BITS = 40  # a request's id is its day times 2**40 plus its rank in (surface, day)


def request_bytes(schema: DatasetSchema) -> int:
    """About how much memory a request with one candidate takes; a matter of the schema alone."""
    event = 10 + 8 * (1 + len(schema.select(level=Level.HISTORY)))
    return 8 * (4 + len(schema.features) + len(schema.tasks)) + schema.history_length * event


def file_requests(schema: DatasetSchema) -> int:
    """Most requests of one file of the log, but for ties in time."""
    return max(_FILE_BYTES // request_bytes(schema), 2048)


def iso_day(day: int) -> str:
    """ISO day of a number of days since 1970."""
    return str(np.datetime64(int(day), "D"))


class RequestRows:
    """The requests of one bucket of prepared events, ready to be cut into tables.

    Args:
        spec: the ingest spec.
        schema: of the log to be.
        events: as `prepare` makes them, with every feature of the schema as a column.
        history: the bucket's histories, or None.
    """

    def __init__(
        self, spec: IngestSpec, schema: DatasetSchema, events: pl.DataFrame, history: HistoryBuilder | None
    ) -> None:
        self._spec, self._schema, self._history = spec, schema, history
        request = events["_request"].to_numpy()
        rows = np.flatnonzero(request >= 0)
        self._rows = rows[np.argsort(request[rows], kind="stable")]
        self._starts = np.flatnonzero(np.diff(request[self._rows], prepend=-1))
        self._ends = np.append(self._starts[1:], self._rows.size)
        self._first = self._rows[self._starts]
        self._chunk = max(_CHUNK_BYTES // request_bytes(schema), 256)
        # Lists are made of few columns at a time: those of candidates, and those that stand once a request.
        internal = [c for c in ("_user", "_code", "_day", "_request_time", "_given") if c in events.columns]
        candidate = [f.name for f in schema.select(level=Level.CANDIDATE)] + [label(t) for t in schema.tasks]
        self._of_request = events.select(internal + [f.name for f in schema.select(level=Level.REQUEST)])
        self._of_candidate = events.select(candidate + [c for c in ("_weight",) if c in events.columns])

    def write(self, out: Path, name: str) -> None:
        """Write `out/surface=S/date=D/NAME.parquet`, each in order of time."""
        first = self._of_request[self._first]
        code, day, time = (first[c].to_numpy() for c in ("_code", "_day", "_request_time"))
        for s, surface in enumerate(self._schema.surfaces):
            for d in np.unique(day[code == 1 + s]):
                mine = np.flatnonzero((code == 1 + s) & (day == d))
                mine = mine[np.lexsort((mine, time[mine]))]
                path = out / f"surface={surface}" / f"date={iso_day(d)}" / f"{name}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                columns = arrow_schema(self._schema, surface)
                with pq.ParquetWriter(path, columns, compression="zstd") as writer:
                    for at in range(0, mine.size, self._chunk):
                        writer.write_table(self._table(mine[at : at + self._chunk], surface, columns))

    def _table(self, requests: np.ndarray, surface: str, columns: pa.Schema) -> pa.Table:
        first = self._of_request[self._first[requests]]
        offsets, flat = ranges(self._starts[requests], self._ends[requests])
        candidates = self._of_candidate[self._rows[flat]]
        at = pa.array(offsets.astype(np.int32))
        values: dict[str, pa.Array] = {
            REQUEST_ID: (first["_given"] if "_given" in first.columns else pl.zeros(len(first), pl.Int64, eager=True)),
            USER_ID: first["_user"],
            TIMESTAMP_MS: first["_request_time"],
        }
        values = {name: _arrow(v, columns.field(name).type) for name, v in values.items()}
        for f in self._schema.select(surface=surface):
            if f.level is Level.REQUEST:
                values[f.name] = _arrow(first[f.name], columns.field(f.name).type)
            elif f.level is Level.CANDIDATE:
                inner = _arrow(candidates[f.name], columns.field(f.name).type.value_type)
                values[f.name] = pa.ListArray.from_arrays(at, inner)
        if self._history is not None:
            values |= self._history.lists(first["_user"].to_numpy(), first["_request_time"].to_numpy())
        for task in self._schema.tasks:
            values[task] = pa.ListArray.from_arrays(at, _arrow(candidates[label(task)], pa.float32()))
        if self._spec.weight is not None:
            values[WEIGHT] = pa.ListArray.from_arrays(at, _arrow(candidates["_weight"], pa.float32()))
        return pa.table([values[c].cast(columns.field(c).type) for c in columns.names], schema=columns)


def _arrow(values: pl.Series, to: pa.DataType) -> pa.Array:
    return values.to_arrow().cast(to)


def merge(spec: IngestSpec, buckets: list[Path], writer: LogWriter, progress: Callable[[str], None], size: int) -> None:
    """Write the log: the buckets' rows of each surface and day together, in order of time, requests numbered.

    Args:
        buckets: folders that `RequestRows.write` filled.
        size: most requests of a file, but for ties in time.

    Raises:
        DataError: a given request id stands twice on a surface and day.
    """
    days = sorted({p.relative_to(b).parent for b in buckets for p in b.rglob("*.parquet")})
    for day in days:
        surface, date = (part.split("=", 1)[1] for part in day.parts)
        progress(f"writing {surface} {date}")
        paths = [p for b in buckets for p in sorted((b / day).glob("*.parquet"))]
        times = np.sort(np.concatenate([_column(p, TIMESTAMP_MS) for p in paths]))
        if spec.request.id is not None:
            _refuse_repeated(np.concatenate([_column(p, REQUEST_ID) for p in paths]), spec, f"{surface} {date}")
        number = int(np.datetime64(date, "D").astype(np.int64)) << _ID_BITS
        for low, high in _cuts(times, size):
            table = _between(paths, low, high)
            if spec.request.id is None:
                ids = pa.array(np.arange(number, number + table.num_rows, dtype=np.int64))
                table = table.set_column(0, table.schema.field(0), ids)
                number += table.num_rows
            writer.write(surface, date, table)
            del table  # not to hold two files' rows at a time


def _column(path: Path, name: str) -> np.ndarray:
    return pq.read_table(path, columns=[name], partitioning=None)[name].to_numpy()


def _cuts(times: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Spans [low, high) of time with about `size` requests each."""
    edges = np.unique(times[::size])
    return list(zip(edges.tolist(), [*edges[1:].tolist(), int(times[-1]) + 1], strict=True))


def _between(paths: list[Path], low: int, high: int) -> pa.Table:
    span = (pc.field(TIMESTAMP_MS) >= low) & (pc.field(TIMESTAMP_MS) < high)
    parts = [pq.read_table(p, partitioning=None, filters=span, use_threads=False) for p in paths]
    table = pa.concat_tables(parts).combine_chunks()
    del parts
    # A user's rows all come from one bucket, in order: a stable sort makes the result the same for any buckets.
    order = np.lexsort((np.arange(table.num_rows), table[USER_ID].to_numpy(), table[TIMESTAMP_MS].to_numpy()))
    return table.take(pa.array(order))


def _refuse_repeated(ids: np.ndarray, spec: IngestSpec, where: str) -> None:
    ids = np.sort(ids)
    twice = ids[1:][np.diff(ids) == 0]
    if twice.size:
        raise DataError(
            f"request id {int(twice[0])} belongs to several users on {where}; it must name one request",
            column=spec.request.id,
        )
