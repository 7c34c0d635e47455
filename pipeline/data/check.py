"""What every table of requests must satisfy, whoever made it: one pass, one clear error.

Used by the writer on what it is given, by the loader on what it reads, and by `inspect` on a whole log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.data.columns import Column, columns_of_table
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

# The unsigned type as wide as each type of ids.
_UNSIGNED = {np.dtype(f"i{n}"): np.dtype(f"u{n}") for n in (1, 2, 4, 8)}


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
    return value_faults(columns_of_table(table, columns), schema, surface, file=file, row_group=row_group)


def value_faults(
    columns: dict[str, Column], schema: DatasetSchema, surface: str, *, file: str, row_group: int | None = None
) -> Iterator[DataError]:
    """Every fault of columns that were taken apart, at most a few a column; see `check_table`."""
    at = _Where(file, row_group)
    for name in (REQUEST_ID, USER_ID, TIMESTAMP_MS):
        if name in columns and columns[name].nulls:
            yield at.error("the column holds nulls", name)
    features = schema.select(surface=surface)
    for f in features:
        if f.name in columns:
            yield from _feature_faults(columns[f.name], f, schema, at)
    candidate = [f.name for f in features if f.level is Level.CANDIDATE]
    history = [f.name for f in schema.select(level=Level.HISTORY)]
    history += [HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS]
    unequal: set[str] = set()
    for names in ([*schema.tasks, WEIGHT, *candidate], history):
        for fault in _length_faults({c: columns[c] for c in names if c in columns}, at):
            unequal.add(fault.column or "")
            yield fault
    for task in schema.tasks:
        if task in columns:
            yield from _range_faults(columns[task], 0.0, 1.0, "label", task, at)
    if WEIGHT in columns:
        yield from _range_faults(columns[WEIGHT], 0.0, np.inf, "weight", WEIGHT, at)
    for name, codes in ((HISTORY_ACTION, schema.action_count), (HISTORY_SURFACE, 1 + len(schema.surfaces))):
        if name in columns:
            yield from _id_faults(columns[name], codes, "codes", name, at)
    for name, what in ((HISTORY_ACTION, "action"), (HISTORY_SURFACE, "surface"), (HISTORY_TIME_MS, "time")):
        if name in columns and columns[name].absent:
            yield at.error(f"a history event lacks its {what}", name)
    if HISTORY_TIME_MS in columns and TIMESTAMP_MS in columns and HISTORY_TIME_MS not in unequal:
        yield from _history_time_faults(columns[HISTORY_TIME_MS], columns[TIMESTAMP_MS], schema, at)


class _Where:
    def __init__(self, file: str, row_group: int | None) -> None:
        self.file = file
        self.row_group = row_group

    def error(self, problem: str, column: str) -> DataError:
        return DataError(problem, file=self.file, row_group=self.row_group, column=column)


def _length_faults(lists: dict[str, Column], at: _Where) -> Iterator[DataError]:
    """Null lists, and rows whose lists differ in length from those of the first column."""
    first: np.ndarray | None = None
    first_name = ""
    for name, column in lists.items():
        if column.nulls:
            yield at.error("the column holds null lists; an empty list is the way to say 'nothing'", name)
            continue
        bounds = column.bounds[0]
        if first is None:
            first, first_name = bounds, name
        elif not np.array_equal(bounds, first):
            lengths, wanted = np.diff(bounds), np.diff(first)
            row = int(np.flatnonzero(lengths != wanted)[0])
            yield at.error(
                f"row {row} has {int(lengths[row])} entries where {first_name!r} has {int(wanted[row])}; "
                "the lists of a row must have equal lengths",
                name,
            )


def _feature_faults(column: Column, feature: Feature, schema: DatasetSchema, at: _Where) -> Iterator[DataError]:
    if feature.kind is Kind.CATEGORICAL:
        size = schema.vocabulary(feature.vocabulary or "").size
        if feature.level is Level.HISTORY and column.absent:
            yield at.error("a history event lacks its id", feature.name)
        if feature.level is Level.CANDIDATE and column.absent and schema.is_shared(feature):
            yield at.error(
                f"a candidate lacks its id; vocabulary {feature.vocabulary!r} is used at several levels, where every "
                "candidate needs one: give it an id that stands for the unknown",
                feature.name,
            )
        yield from _id_faults(column, size, f"ids of vocabulary {feature.vocabulary!r}", feature.name, at)
    elif np.count_nonzero(np.isfinite(column.numbers)) != column.numbers.size - column.absent:
        yield at.error("the column holds NaN or infinity; null is the way to say 'absent'", feature.name)


def _id_faults(column: Column, size: int, what: str, name: str, at: _Where) -> Iterator[DataError]:
    values = column.numbers
    if not values.size:
        return
    if column.absent:
        # What is absent reads -1; more negative ids than that were given as such.
        wrong = int(values.max()) >= size or np.count_nonzero(values < 0) != column.absent
    else:
        # Seen as unsigned, a negative id is larger than any size: one pass finds both kinds.
        wrong = int(values.view(_UNSIGNED[values.dtype]).max()) >= size
    if wrong:
        given = column.given.drop_null().to_numpy()
        bad = int(given.min()) if given.min() < 0 else int(given.max())
        yield at.error(f"the column holds {bad}; {what} lie in [0, {size})", name)


def _range_faults(column: Column, low: float, high: float, what: str, name: str, at: _Where) -> Iterator[DataError]:
    values = column.numbers
    # A comparison with NaN is false: absent values, which read NaN, and those that are NaN fail it alike.
    sound = np.count_nonzero((values >= low) & (values <= high) & (values < np.inf))
    if sound != values.size - column.absent:
        given = column.given.drop_null().to_numpy()
        wrong = given[~((given >= low) & (given <= high) & (given < np.inf))][0]
        yield at.error(f"the column holds {what} {wrong}; it must lie in [{low:g}, {high:g}]", name)


def _history_time_faults(history: Column, timestamp: Column, schema: DatasetSchema, at: _Where) -> Iterator[DataError]:
    """The events of a request are in order, and the last of them was known at its time."""
    if history.nulls or timestamp.nulls:
        return
    times, bounds = history.numbers, history.bounds[0]
    back = times[1:] < times[:-1]
    # A step back in time is sound only where the events of the next request begin.
    begins = bounds[(bounds > 0) & (bounds < times.size)]
    back[begins - 1] = False
    if back.any():
        row = int(np.searchsorted(bounds, 1 + back.argmax(), side="right")) - 1
        yield at.error(f"the history of row {row} is not in order of time, oldest first", HISTORY_TIME_MS)
        return
    some = np.flatnonzero(np.diff(bounds))
    newest = times[bounds[1:][some] - 1]
    known_until = timestamp.numbers[some] - schema.label_delay_ms
    late = np.flatnonzero(newest >= known_until)
    if late.size:
        i = int(late[0])
        yield at.error(
            f"row {int(some[i])} has a history event at {int(newest[i])} ms, not before the request's time less "
            f"the label delay, {int(known_until[i])} ms: the history leaks the future",
            HISTORY_TIME_MS,
        )
