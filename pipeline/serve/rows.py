"""From whatever rows a caller has to a block of requests, by the code that the loader uses too.

Rows come in two forms, told apart by whether candidate columns are lists:

- *grouped*: one row a request, as in the logs (`pipeline.data.logs`); labels are not needed;
- *flat*: one row a candidate, request and history columns repeated. Rows of one request are those of the same
  `request_id`; without that column, those whose request and history columns are all equal. They may lie anywhere.

Columns that the artifact does not read are ignored, so features of other surfaces may be there or not. Null means
absent. In pandas frames NaN means null; elsewhere it is an error.

Shape letters: N rows given, R requests, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.block import RequestBlock, block_from_arrow
from pipeline.data.check import check_table
from pipeline.data.stream import newest
from pipeline.errors import DataError, unknown
from pipeline.schema import REQUEST_ID, Level
from pipeline.serve.signature import Signature

if TYPE_CHECKING:
    import pandas as pd

Rows = Union[pa.Table, "pd.DataFrame", pl.DataFrame, str, Path]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Rows as requests, and the way back.

    Args:
        block: R requests with C candidates.
        order: int64 [C], for flat rows: the given row of each candidate of the block; None for grouped rows.
    """

    block: RequestBlock
    order: np.ndarray | None


def as_arrow(rows: Rows) -> tuple[pa.Table, str]:
    """Any of the accepted kinds as an Arrow table, and what to call it in errors.

    Raises:
        DataError: not one of the kinds, or a file that cannot be read.
    """
    if isinstance(rows, pa.Table):
        return rows, "the given table"
    if isinstance(rows, pl.DataFrame):
        return rows.to_arrow(), "the given frame"
    if isinstance(rows, str | Path):
        try:
            with pq.ParquetFile(rows) as file:
                return file.read(), str(rows)
        except FileNotFoundError as error:
            raise DataError("there is no such file", file=str(rows)) from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"the file is not readable Parquet: {error}", file=str(rows)) from error
    if type(rows).__module__.split(".")[0] == "pandas":
        try:
            return pa.Table.from_pandas(rows, preserve_index=False), "the given frame"
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"a column holds values of several types: {error}", file="the given frame") from error
    raise DataError(
        f"rows are a {type(rows).__name__}; give an Arrow table, a pandas or Polars frame or a Parquet file"
    )


def to_requests(table: pa.Table, signature: Signature, source: str) -> Requests:
    """Checked requests of one surface.

    Args:
        table: grouped or flat rows.
        signature: of the artifact.
        source: what to call the table in errors.

    Raises:
        DataError: a column is missing, of another type or holds what it must not; or rows of one request differ.
    """
    request = signature.columns(Level.REQUEST) | signature.columns(Level.HISTORY)
    candidate = signature.columns(Level.CANDIDATE)
    for name in [*request, *candidate]:
        if name not in table.column_names:
            raise DataError(_missing(name, table, signature), file=source, column=name)
    grouped = _is_grouped(table, signature)
    if not grouped:
        candidate = {name: of.value_type for name, of in candidate.items()}
    columns = {name: _cast(table[name], of, name, source) for name, of in (request | candidate).items()}
    order = None
    if not grouped:
        columns, order = _group(table, columns, list(request), list(candidate), source)
    requests = pa.table(columns)
    check_table(requests, signature.schema, signature.surface, file=source)
    for name in signature.layout.candidate_sequences:
        if pc.list_flatten(requests[name]).null_count:
            raise DataError("a candidate lacks its id, which this feature must have", file=source, column=name)
    return Requests(block=newest(block_from_arrow(requests, signature.schema), signature.history_length), order=order)


def _missing(name: str, table: pa.Table, signature: Signature) -> str:
    return f"the artifact of surface {signature.surface!r} wants a column that is not there; " + unknown(
        "column", name, table.column_names
    )


def _is_grouped(table: pa.Table, signature: Signature) -> bool:
    for f in signature.schema.select(level=Level.CANDIDATE, surface=signature.surface):
        of = table.schema.field(f.name).type
        return _is_list(of.value_type) if f.multi_valued and _is_list(of) else _is_list(of) and not f.multi_valued
    return False


def _is_list(of: pa.DataType) -> bool:
    return pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of)


def _cast(column: pa.ChunkedArray, to: pa.DataType, name: str, source: str) -> pa.Array:
    """The column as one array of the log's type; numbers of any width are accepted where no value changes."""
    given = column.type
    array = column.combine_chunks()
    if given == to:
        return array
    a, b = given, to
    while _is_list(a) and _is_list(b):
        a, b = a.value_type, b.value_type
    number = pa.types.is_integer(a) or pa.types.is_floating(a) or pa.types.is_null(a)
    if not number or _is_list(b):
        raise DataError(f"the column has type {given}, it must be {to}", file=source, column=name)
    try:
        return pc.cast(array, to)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"the column has type {given} and holds values that are no {to}: {error}", file=source, column=name
        ) from error


def _group(
    table: pa.Table, columns: dict[str, pa.Array], request: list[str], candidate: list[str], source: str
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """Grouped columns of flat ones, and the row of each candidate."""
    known = REQUEST_ID in table.column_names
    frame = pl.from_arrow(pa.table({name: columns[name] for name in request}))
    assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
    if known:
        if table[REQUEST_ID].null_count:
            raise DataError(
                "the column holds nulls; rows without a request cannot be scored", file=source, column=REQUEST_ID
            )
        keys = pl.DataFrame(pl.Series(REQUEST_ID, table[REQUEST_ID].combine_chunks()))
    else:
        keys = frame
    rows = pl.Series("row", np.arange(table.num_rows))
    groups = (
        keys.with_columns(rows).group_by(keys.columns, maintain_order=True).agg(pl.col("row").alias("rows"))["rows"]
    )
    order = groups.explode().to_numpy()
    counts = groups.list.len().to_numpy().astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    first = order[starts[:-1]]
    if known:
        _check_same(frame, order, np.repeat(first, counts), table[REQUEST_ID], source)
    offsets = pa.array(starts, type=pa.int32())
    out = {name: columns[name].take(pa.array(first)) for name in request}
    out |= {name: pa.ListArray.from_arrays(offsets, columns[name].take(pa.array(order))) for name in candidate}
    return out, order


def _check_same(frame: pl.DataFrame, order: np.ndarray, first: np.ndarray, ids: pa.ChunkedArray, source: str) -> None:
    for name in frame.columns:
        differ = np.flatnonzero(~frame[name][order].eq_missing(frame[name][first]).to_numpy())
        if differ.size:
            raise DataError(
                f"rows {int(first[differ[0]])} and {int(order[differ[0]])} have the same request_id "
                f"{ids[int(first[differ[0]])].as_py()} and different values; a request has one value",
                file=source,
                column=name,
            )
