"""What every table of requests must satisfy, whoever made it: one pass, one clear error.

Used by the writer on what it is given, by the loader on what it reads, and by `inspect` on a whole log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.data.block import entries, one_array
from pipeline.data.logs import arrow_schema
from pipeline.errors import DataError
from pipeline.schema import (
    HISTORY_ACTION,
    HISTORY_SURFACE,
    HISTORY_TIME_MS,
    REQUEST_ID,
    TIMESTAMP_MS,
    USER_ID,
    WEIGHT,
    DatasetSchema,
    Feature,
    Kind,
    Level,
)


def check_columns(
    present: pa.Schema, schema: DatasetSchema, surface: str, columns: Iterable[str] | None = None, *, file: str
) -> None:
    """Check that a file has columns, with their types.

    Args:
        present: the file's columns.
        schema: of the log.
        surface: whose file this is.
        columns: check only these; None checks all of the surface.
        file: for the message.

    Raises:
        DataError: a column is missing or has another type.
    """
    for fault in column_faults(present, schema, surface, columns, file=file):
        raise fault


def column_faults(
    present: pa.Schema, schema: DatasetSchema, surface: str, columns: Iterable[str] | None = None, *, file: str
) -> Iterator[DataError]:
    """Every column that is missing or has another type; see `check_columns`."""
    expected = arrow_schema(schema, surface)
    for name in expected.names if columns is None else columns:
        if name not in present.names:
            yield DataError(
                f"the file lacks a column that dataset.json declares for surface {surface!r}", file=file, column=name
            )
        elif present.field(name).type != expected.field(name).type:
            yield DataError(
                f"the column has type {present.field(name).type}, it must be {expected.field(name).type}",
                file=file,
                column=name,
            )


def check_table(
    table: pa.Table | pa.RecordBatch,
    schema: DatasetSchema,
    surface: str,
    *,
    file: str,
    row_group: int | None = None,
    columns: frozenset[str] | None = None,
) -> None:
    """Check the values of a table whose columns and types are right.

    Args:
        table: requests of one surface.
        schema: what the columns mean.
        surface: the surface whose features are looked at.
        file: for the message.
        row_group: for the message.
        columns: check only these; None checks all that the table has.

    Raises:
        DataError: null where none may be, lists of unequal length within a row, a label or weight out of
            range, NaN or infinity, an id outside its vocabulary, or a history event that was not yet known
            at the request's time.
    """
    for fault in table_faults(table, schema, surface, file=file, row_group=row_group, columns=columns):
        raise fault


def table_faults(
    table: pa.Table | pa.RecordBatch,
    schema: DatasetSchema,
    surface: str,
    *,
    file: str,
    row_group: int | None = None,
    columns: frozenset[str] | None = None,
) -> Iterator[DataError]:
    """Every fault of a table, at most a few a column; see `check_table`."""
    at = _Where(file, row_group)
    given = zip(table.schema.names, table.columns, strict=True)
    arrays = {name: one_array(column) for name, column in given if columns is None or name in columns}
    for name in (REQUEST_ID, USER_ID, TIMESTAMP_MS):
        if name in arrays and arrays[name].null_count:
            yield at.error("the column holds nulls", name)
    features = schema.select(surface=surface)
    for f in features:
        if f.name in arrays:
            yield from _value_faults(_flat(arrays[f.name]), f, schema, at)
    candidate = [f.name for f in features if f.level is Level.CANDIDATE]
    history = [f.name for f in schema.select(level=Level.HISTORY)]
    history += [HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS]
    unequal: set[str] = set()
    for names in ([*schema.tasks, WEIGHT, *candidate], history):
        for fault in _length_faults({c: arrays[c] for c in names if c in arrays}, at):
            unequal.add(fault.column or "")
            yield fault
    for task in schema.tasks:
        if task in arrays:
            yield from _range_faults(_flat(arrays[task]), 0.0, 1.0, "label", task, at)
    if WEIGHT in arrays:
        yield from _range_faults(_flat(arrays[WEIGHT]), 0.0, np.inf, "weight", WEIGHT, at)
    for name, codes in ((HISTORY_ACTION, schema.action_count), (HISTORY_SURFACE, 1 + len(schema.surfaces))):
        if name in arrays:
            yield from _id_faults(_flat(arrays[name]), codes, "codes", name, at)
    if HISTORY_TIME_MS in arrays and TIMESTAMP_MS in arrays and HISTORY_TIME_MS not in unequal:
        yield from _history_time_faults(arrays[HISTORY_TIME_MS], arrays[TIMESTAMP_MS], schema, at)


class _Where:
    def __init__(self, file: str, row_group: int | None) -> None:
        self.file = file
        self.row_group = row_group

    def error(self, problem: str, column: str) -> DataError:
        return DataError(problem, file=self.file, row_group=self.row_group, column=column)


def _flat(array: pa.Array) -> pa.Array:
    while isinstance(array, pa.ListArray):
        array = entries(array)
    return array


def _length_faults(lists: dict[str, pa.Array], at: _Where) -> Iterator[DataError]:
    """Null lists, and rows whose lists differ in length from those of the first column."""
    first: np.ndarray | None = None
    first_name = ""
    for name, array in lists.items():
        if array.null_count:
            yield at.error("the column holds null lists; an empty list is the way to say 'nothing'", name)
            continue
        offsets = array.offsets.to_numpy()
        if first is None:
            first, first_name = offsets, name
        elif not np.array_equal(offsets - offsets[0] if array.offset else offsets, first - first[0]):
            lengths, wanted = np.diff(offsets), np.diff(first)
            row = int(np.flatnonzero(lengths != wanted)[0])
            yield at.error(
                f"row {row} has {int(lengths[row])} entries where {first_name!r} has {int(wanted[row])}; "
                "the lists of a row must have equal lengths",
                name,
            )


def _value_faults(flat: pa.Array, feature: Feature, schema: DatasetSchema, at: _Where) -> Iterator[DataError]:
    if feature.kind is Kind.CATEGORICAL:
        size = schema.vocabulary(feature.vocabulary or "").size
        if feature.level is Level.HISTORY and flat.null_count:
            yield at.error("a history event lacks its id", feature.name)
        if feature.level is Level.CANDIDATE and flat.null_count and schema.is_shared(feature):
            yield at.error(
                f"a candidate lacks its id; vocabulary {feature.vocabulary!r} is used at several levels, where every "
                "candidate needs one: give it an id that stands for the unknown",
                feature.name,
            )
        yield from _id_faults(flat, size, f"ids of vocabulary {feature.vocabulary!r}", feature.name, at)
    elif len(flat) and not np.isfinite(_numbers(flat)).all():
        yield at.error("the column holds NaN or infinity; null is the way to say 'absent'", feature.name)


def _numbers(flat: pa.Array) -> np.ndarray:
    return (flat.drop_null() if flat.null_count else flat).to_numpy(zero_copy_only=False)


def _id_faults(flat: pa.Array, size: int, what: str, column: str, at: _Where) -> Iterator[DataError]:
    if len(flat) == flat.null_count:
        return
    values = _numbers(flat)
    # Seen as unsigned, a negative id is larger than any size: one pass finds both kinds.
    if int(values.view(f"u{values.dtype}").max()) >= size:
        bad = int(values.min()) if values.min() < 0 else int(values.max())
        yield at.error(f"the column holds {bad}; {what} lie in [0, {size})", column)


def _range_faults(flat: pa.Array, low: float, high: float, what: str, column: str, at: _Where) -> Iterator[DataError]:
    values = _numbers(flat)
    # A comparison with NaN is false, and the extremes of values with a NaN are NaN.
    if values.size and not (low <= values.min() and (most := values.max()) <= high and most < np.inf):
        wrong = values[~((values >= low) & (values <= high) & (values < np.inf))][0]
        yield at.error(f"the column holds {what} {wrong}; it must lie in [{low:g}, {high:g}]", column)


def _history_time_faults(
    history: pa.Array, timestamp: pa.Array, schema: DatasetSchema, at: _Where
) -> Iterator[DataError]:
    """The events of a request are in order, and the last of them was known at its time."""
    if history.null_count or timestamp.null_count:
        return
    times = entries(history).to_numpy(zero_copy_only=False)
    offsets = history.offsets.to_numpy()
    offsets = offsets - offsets[0]
    back = times[1:] < times[:-1]
    # A step back in time is sound only where the events of the next request begin.
    begins = offsets[(offsets > 0) & (offsets < times.size)]
    back[begins - 1] = False
    if back.any():
        row = int(np.searchsorted(offsets, 1 + back.argmax(), side="right")) - 1
        yield at.error(f"the history of row {row} is not in order of time, oldest first", HISTORY_TIME_MS)
        return
    some = np.flatnonzero(np.diff(offsets))
    newest = times[offsets[1:][some] - 1]
    known_until = timestamp.to_numpy()[some] - schema.label_delay_ms
    late = np.flatnonzero(newest >= known_until)
    if late.size:
        i = int(late[0])
        yield at.error(
            f"row {int(some[i])} has a history event at {int(newest[i])} ms, not before the request's time less "
            f"the label delay, {int(known_until[i])} ms: the history leaks the future",
            HISTORY_TIME_MS,
        )
