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
from pipeline.data.columns import one_array
from pipeline.data.rowgroups import newest
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
        grouped: whether the rows were requests.
        order: int64 [C], for flat rows: the given row of each candidate of the block; None where they lie as given.
    """

    block: RequestBlock
    grouped: bool
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
    place = {name: i for i, name in enumerate(table.column_names)}
    request = {**signature.columns(Level.REQUEST), **signature.columns(Level.HISTORY)}
    candidate = dict(signature.columns(Level.CANDIDATE))
    for name in (*request, *candidate):
        if name not in place:
            raise DataError(_missing(name, table, signature), file=source, column=name)
    grouped = _is_grouped(table, signature)
    if not grouped:
        candidate = {name: of.value_type for name, of in candidate.items()}
    wanted = request | candidate
    columns = {name: _cast(table.column(place[name]), of, name, source) for name, of in wanted.items()}
    order = None
    if not grouped:
        columns, order = _group(table, columns, list(request), list(candidate), source)
    requests = pa.record_batch(columns)
    block = block_from_arrow(requests, signature.schema)
    # What the bulk check does not answer for is looked at column by column, for an error that says where.
    doubtful = _doubtful(columns, block, signature)
    check_table(requests, signature.schema, signature.surface, file=source, columns=doubtful)
    for name in signature.layout.candidate_sequences:
        if name in doubtful and pc.list_flatten(requests[name]).null_count:
            raise DataError("a candidate lacks its id, which this feature must have", file=source, column=name)
    return Requests(block=newest(block, signature.history_length), grouped=grouped, order=order)


def _doubtful(columns: dict[str, pa.Array], block: RequestBlock, signature: Signature) -> frozenset[str]:
    """Columns that one pass over all values of a level does not show to be right: all, where something may be wrong."""
    everything = frozenset(columns)
    if not len(block):
        return everything
    for level in (Level.CANDIDATE, Level.HISTORY):
        lists = [columns[name] for name in signature.columns(level)]
        if any(a.null_count or a.offset for a in lists):
            return everything
        bounds = [a.offsets.to_numpy() for a in lists]
        if any(not np.array_equal(b, bounds[0]) for b in bounds[1:]):
            return everything
    values = {Level.REQUEST: block.scalars, Level.CANDIDATE: block.candidates, Level.HISTORY: block.history}
    for level, names in signature.single_ids.items():
        if names:
            ids = np.stack([values[level][name].numpy() for name in names])
            if (ids.max(1, initial=-1) >= signature.sizes[level]).any():
                return everything
            # A null became -1; more of them than nulls were given as such.
            absent = int(np.count_nonzero(ids < 0))
            if absent and (level is Level.HISTORY or absent != sum(_nulls(columns[name]) for name in names)):
                return everything
    for name in signature.layout.candidate_sequences:
        if _nulls(columns[name]):
            return everything
    for of, names in signature.tensors.numeric.items():
        present = [name for name in names if name in columns]
        if present:
            numbers = np.stack([values[Level(of)][name].numpy() for name in present])
            missing = int(numbers.size - np.count_nonzero(np.isfinite(numbers)))
            if missing and missing != sum(_nulls(columns[name]) for name in present):
                return everything
    return everything - signature.bulk_checked


def _nulls(array: pa.Array) -> int:
    return array.values.null_count if pa.types.is_list(array.type) else array.null_count


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
    array = one_array(column)
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
) -> tuple[dict[str, pa.Array], np.ndarray | None]:
    """Grouped columns of flat ones, and the row of each candidate; None where they lie as given.

    Rows of one request nearly always follow each other. So each row is compared with the one before it, all at once,
    which gives runs of rows; only the first rows of runs, about one a request, are then looked at by value.
    """
    differs = np.ones(table.num_rows, bool)
    differs[1:] = False
    changed = {name: _changes(columns[name]) for name in request}
    known = REQUEST_ID in table.column_names
    if known:
        ids = one_array(table[REQUEST_ID])
        if ids.null_count:
            raise DataError(
                "the column holds nulls; rows without a request cannot be scored", file=source, column=REQUEST_ID
            )
        changed_id = ids.slice(1).to_numpy(zero_copy_only=False) != ids[:-1].to_numpy(zero_copy_only=False)
        for name, change in changed.items():
            wrong = np.flatnonzero(change & ~changed_id)
            if wrong.size:
                raise _unlike(int(wrong[0]), int(wrong[0]) + 1, ids, name, source)
        differs[1:] = changed_id
    else:
        for change in changed.values():
            differs[1:] |= change
    heads = np.flatnonzero(differs)
    counts = np.diff(np.append(heads, table.num_rows))
    firsts = {name: columns[name] if heads.size == table.num_rows else columns[name].take(heads) for name in request}
    keys = pa.table({REQUEST_ID: ids.take(heads)} if known else firsts)
    group = _groups(keys)
    order = None
    if group is not None:
        first_run = np.full(int(group.max()) + 1, -1)
        first_run[group[::-1]] = np.arange(group.size)[::-1]
        if known:
            _check_same(firsts, first_run[group], heads, ids, source)
        order = np.argsort(np.repeat(group, counts), kind="stable")
        counts = np.bincount(group, weights=counts).astype(np.int64)
        firsts = {name: array.take(first_run) for name, array in firsts.items()}
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), type=pa.int32())
    values = {name: columns[name] if order is None else columns[name].take(order) for name in candidate}
    return firsts | {name: pa.ListArray.from_arrays(offsets, v) for name, v in values.items()}, order


def _changes(array: pa.Array) -> np.ndarray:
    """Bool [N - 1]: whether each row but the first has another value than the row before it."""
    rows = max(len(array) - 1, 0)
    if not pa.types.is_list(array.type):
        values = _comparable(array)
        return values[1:] != values[:-1]
    bounds = array.offsets.to_numpy()
    lengths = np.diff(bounds)
    changed = lengths[1:] != lengths[:-1]
    if array.null_count:
        missing = array.is_null().to_numpy(zero_copy_only=False)
        changed = changed | (missing[1:] != missing[:-1])
    values = _comparable(array.values[bounds[0] : bounds[-1]])
    first = int(lengths[0]) if rows else 0
    if rows and not (lengths != first).any():
        # All of one length: rows side by side.
        side = values.reshape(rows + 1, first)
        return (side[1:] != side[:-1]).any(1)
    same = np.append(False, ~changed) if rows else np.zeros(len(array), bool)
    # An entry is held against the one a row's length before it; rows of other lengths are known to differ.
    compared = np.flatnonzero(np.repeat(same, lengths))
    back = compared - np.repeat(lengths, lengths)[compared]
    unlike = np.repeat(np.arange(len(array)), lengths)[compared[values[compared] != values[back]]]
    changed = changed.copy()
    changed[unlike - 1] = True
    return changed


def _comparable(array: pa.Array) -> np.ndarray:
    """Values of which equal ones are those that stand for the same: null is a value of its own."""
    if pa.types.is_list(array.type):
        # Rare: several values a row. Rows are numbered by their content.
        frame = pl.DataFrame(pl.Series("v", pl.from_arrow(array))).with_row_index()
        return frame.select(pl.col("index").first().over("v")).to_series().to_numpy()
    if pa.types.is_floating(array.type):
        missing = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
        values = array.fill_null(0.0).to_numpy(zero_copy_only=False) if array.null_count else array.to_numpy()
        bits = (values + 0.0).view(f"i{values.itemsize}").astype(np.int64)
        return bits if missing is None else np.where(missing, np.iinfo(np.int64).min, bits)
    if array.null_count:
        array = array.fill_null(pa.scalar(np.iinfo(array.type.to_pandas_dtype()).min, array.type))
    return array.to_numpy(zero_copy_only=False)


def _groups(keys: pa.Table) -> np.ndarray | None:
    """Number of the group of equal rows that each row is in, by first appearance; None where all rows differ."""
    if keys.num_rows < 2:
        return None
    frame = pl.from_arrow(keys)
    assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
    index = pl.Series("row", np.arange(keys.num_rows))
    lists = frame.with_columns(index).group_by(frame.columns, maintain_order=True).agg("row")["row"]
    if len(lists) == keys.num_rows:
        return None
    group = np.empty(keys.num_rows, np.int64)
    group[lists.explode().to_numpy()] = np.repeat(np.arange(len(lists)), lists.list.len().to_numpy())
    return group


def _check_same(
    firsts: dict[str, pa.Array], first_run: np.ndarray, heads: np.ndarray, ids: pa.Array, source: str
) -> None:
    """Runs of one request_id have the same request columns as the first of them."""
    for name, array in firsts.items():
        series = pl.Series(pl.from_arrow(array))
        differ = np.flatnonzero(~series.eq_missing(series[first_run]).to_numpy())
        if differ.size:
            run = int(differ[0])
            raise _unlike(int(heads[first_run[run]]), int(heads[run]), ids, name, source)


def _unlike(first: int, row: int, ids: pa.Array, name: str, source: str) -> DataError:
    return DataError(
        f"rows {first} and {row} have the same request_id {ids[row].as_py()} and different values; "
        "a request has one value",
        file=source,
        column=name,
    )
