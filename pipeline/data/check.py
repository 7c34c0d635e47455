"""What every table of requests must satisfy, whoever made it: one pass, one clear error.

Used by the writer on what it is given and by the loader on what it reads.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    at = _Where(file, row_group)
    present = [c for c in table.schema.names if columns is None or c in columns]
    for name in (REQUEST_ID, USER_ID, TIMESTAMP_MS):
        if name in present and table[name].null_count:
            raise at.error("the column holds nulls", name)
    for f in schema.select(surface=surface):
        if f.name in present:
            _check_values(_flat(table[f.name]), f, schema, at)
    _check_lengths(table, [c for c in schema.tasks if c in present] + [WEIGHT] * (WEIGHT in present), at)
    candidate = [f.name for f in schema.select(surface=surface, level=Level.CANDIDATE) if f.name in present]
    _check_lengths(table, [c for c in schema.tasks if c in present][:1] + candidate, at)
    history = [f.name for f in schema.select(level=Level.HISTORY)]
    history = [c for c in [*history, HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS] if c in present]
    _check_lengths(table, history, at)
    for task in schema.tasks:
        if task in present:
            _check_range(_flat(table[task]), 0.0, 1.0, "label", task, at)
    if WEIGHT in present:
        _check_range(_flat(table[WEIGHT]), 0.0, np.inf, "weight", WEIGHT, at)
    for name, codes in ((HISTORY_ACTION, schema.action_count), (HISTORY_SURFACE, 1 + len(schema.surfaces))):
        if name in present:
            _check_ids(_flat(table[name]), codes, "codes", name, at)
    if HISTORY_TIME_MS in present:
        _check_history_time(table, schema, at)


class _Where:
    def __init__(self, file: str, row_group: int | None) -> None:
        self.file = file
        self.row_group = row_group

    def error(self, problem: str, column: str) -> DataError:
        return DataError(problem, file=self.file, row_group=self.row_group, column=column)


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array


def _check_lengths(table: pa.Table | pa.RecordBatch, names: list[str], at: _Where) -> None:
    first: np.ndarray | None = None
    for name in names:
        if table[name].null_count:
            raise at.error("the column holds null lists; an empty list is the way to say 'nothing'", name)
        lengths = (
            pc.list_value_length(table[name]).to_numpy(zero_copy_only=False)
            if isinstance(table[name], pa.Array)
            else pc.list_value_length(table[name]).combine_chunks().to_numpy(zero_copy_only=False)
        )
        if first is None:
            first = lengths
        elif (differ := np.flatnonzero(lengths != first)).size:
            row = int(differ[0])
            raise at.error(
                f"row {row} has {int(lengths[row])} entries where {names[0]!r} has {int(first[row])}; "
                "the lists of a row must have equal lengths",
                name,
            )


def _check_values(flat: pa.Array, feature: Feature, schema: DatasetSchema, at: _Where) -> None:
    if feature.kind is Kind.CATEGORICAL:
        size = schema.vocabulary(feature.vocabulary or "").size
        if feature.level is Level.HISTORY and flat.null_count:
            raise at.error("a history event lacks its id", feature.name)
        _check_ids(flat, size, f"ids of vocabulary {feature.vocabulary!r}", feature.name, at)
    elif len(flat):
        values = flat.drop_null().to_numpy(zero_copy_only=False)
        if not np.isfinite(values).all():
            raise at.error("the column holds NaN or infinity; null is the way to say 'absent'", feature.name)


def _check_ids(flat: pa.Array, size: int, what: str, column: str, at: _Where) -> None:
    if len(flat) == flat.null_count:
        return
    bounds = pc.min_max(flat).as_py()
    if bounds["min"] < 0 or bounds["max"] >= size:
        bad = bounds["min"] if bounds["min"] < 0 else bounds["max"]
        raise at.error(f"the column holds {bad}; {what} lie in [0, {size})", column)


def _check_range(flat: pa.Array, low: float, high: float, what: str, column: str, at: _Where) -> None:
    values = flat.drop_null().to_numpy(zero_copy_only=False)
    wrong = values[~((values >= low) & (values <= high))]
    if wrong.size:
        raise at.error(f"the column holds {what} {wrong[0]}; it must lie in [{low:g}, {high:g}]", column)


def _check_history_time(table: pa.Table | pa.RecordBatch, schema: DatasetSchema, at: _Where) -> None:
    column = table[HISTORY_TIME_MS]
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    times = array.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    known_until = table[TIMESTAMP_MS].to_numpy() - schema.label_delay_ms
    row = np.repeat(np.arange(lengths.size), lengths)
    late = np.flatnonzero(times >= known_until[row])
    if late.size:
        i = int(late[0])
        raise at.error(
            f"row {int(row[i])} has a history event at {int(times[i])} ms, not before the request's time less "
            f"the label delay, {int(known_until[row[i]])} ms: the history leaks the future",
            HISTORY_TIME_MS,
        )
    if times.size and (np.diff(times)[np.diff(row) == 0] < 0).any():
        raise at.error("the history of a request is not in order of time, oldest first", HISTORY_TIME_MS)
