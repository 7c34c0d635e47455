"""Requests of one surface as flat tensors: what a row group becomes before it becomes part of a batch.

Lists that share their lengths (all candidate columns, all history columns) share them here too, so that
taking rows computes each gather index once. Absent ids are -1 and absent numbers NaN inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.schema import (
    HISTORY_ACTION,
    HISTORY_SURFACE,
    HISTORY_TIME_MS,
    REQUEST_ID,
    TIMESTAMP_MS,
    USER_ID,
    WEIGHT,
    DatasetSchema,
    Level,
)

ABSENT = -1
_DTYPES = {
    pa.int8(): torch.int8,
    pa.int32(): torch.int32,
    pa.int64(): torch.int64,
    pa.float32(): torch.float32,
}


def offsets(lengths: Tensor) -> Tensor:
    """Where each row starts, and the end: [n] to [n + 1]."""
    out = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=out[1:])
    return out


def gather_index(lengths: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """Positions, in the values, of all entries of `rows`, row by row."""
    taken = lengths[rows]
    ends = torch.cumsum(taken, 0)
    total = int(ends[-1]) if ends.numel() else 0
    shift = starts[rows] - (ends - taken)
    return torch.repeat_interleave(shift, taken, output_size=total) + torch.arange(total)


@dataclass
class Jagged:
    """Rows of several values: `values` of all rows one after another, `lengths` of each row."""

    values: Tensor
    lengths: Tensor

    def take(self, rows: Tensor) -> Jagged:
        index = gather_index(self.lengths, offsets(self.lengths), rows)
        return Jagged(self.values[index], self.lengths[rows])

    def slice(self, start: int, stop: int) -> Jagged:
        first = int(self.lengths[:start].sum())
        lengths = self.lengths[start:stop]
        return Jagged(self.values[first : first + int(lengths.sum())], lengths)

    @staticmethod
    def cat(parts: list[Jagged]) -> Jagged:
        return Jagged(torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts]))


@dataclass
class RequestBlock:
    """Requests of one surface.

    Args:
        scalars: one value a request.
        lists: several values a request (multi-valued request features).
        candidate_counts: int64 [R].
        candidates: one value a candidate: features, labels, weights.
        candidate_lists: several values a candidate.
        history_lengths: int64 [R].
        history: one value an event.
    """

    scalars: dict[str, Tensor]
    lists: dict[str, Jagged]
    candidate_counts: Tensor
    candidates: dict[str, Tensor]
    candidate_lists: dict[str, Jagged]
    history_lengths: Tensor
    history: dict[str, Tensor]

    def __len__(self) -> int:
        return self.candidate_counts.numel()

    def take(self, rows: Tensor) -> RequestBlock:
        """The given rows, in the given order."""
        of_candidate = gather_index(self.candidate_counts, offsets(self.candidate_counts), rows)
        of_history = gather_index(self.history_lengths, offsets(self.history_lengths), rows)
        return RequestBlock(
            {k: v[rows] for k, v in self.scalars.items()},
            {k: v.take(rows) for k, v in self.lists.items()},
            self.candidate_counts[rows],
            {k: v[of_candidate] for k, v in self.candidates.items()},
            {k: v.take(of_candidate) for k, v in self.candidate_lists.items()},
            self.history_lengths[rows],
            {k: v[of_history] for k, v in self.history.items()},
        )

    def slice(self, start: int, stop: int) -> RequestBlock:
        """Rows [start, stop) as views."""
        c0 = int(self.candidate_counts[:start].sum())
        c1 = c0 + int(self.candidate_counts[start:stop].sum())
        h0 = int(self.history_lengths[:start].sum())
        h1 = h0 + int(self.history_lengths[start:stop].sum())
        return RequestBlock(
            {k: v[start:stop] for k, v in self.scalars.items()},
            {k: v.slice(start, stop) for k, v in self.lists.items()},
            self.candidate_counts[start:stop],
            {k: v[c0:c1] for k, v in self.candidates.items()},
            {k: v.slice(c0, c1) for k, v in self.candidate_lists.items()},
            self.history_lengths[start:stop],
            {k: v[h0:h1] for k, v in self.history.items()},
        )

    @staticmethod
    def cat(parts: list[RequestBlock]) -> RequestBlock:
        """All rows of blocks with the same columns."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return RequestBlock(
            {k: torch.cat([p.scalars[k] for p in parts]) for k in first.scalars},
            {k: Jagged.cat([p.lists[k] for p in parts]) for k in first.lists},
            torch.cat([p.candidate_counts for p in parts]),
            {k: torch.cat([p.candidates[k] for p in parts]) for k in first.candidates},
            {k: Jagged.cat([p.candidate_lists[k] for p in parts]) for k in first.candidate_lists},
            torch.cat([p.history_lengths for p in parts]),
            {k: torch.cat([p.history[k] for p in parts]) for k in first.history},
        )


def block_from_arrow(table: pa.RecordBatch | pa.Table, schema: DatasetSchema) -> RequestBlock:
    """Requests of one surface as tensors; columns that are not in the table are left out.

    Args:
        table: checked rows of one surface.
        schema: what the columns mean.

    Raises:
        SchemaError: a column that the schema does not know.
    """
    n = table.num_rows
    zero = torch.zeros(n, dtype=torch.int64)
    block = RequestBlock({}, {}, zero, {}, {}, zero, {})
    for name in table.schema.names:
        column = table[name]
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        _add_column(block, name, array, schema)
    return block


def _add_column(block: RequestBlock, name: str, array: pa.Array, schema: DatasetSchema) -> None:
    if not pa.types.is_list(array.type):
        block.scalars[name] = _values(array)
    elif name in schema.tasks or name == WEIGHT:
        block.candidate_counts = _lengths(array)
        block.candidates[name] = _values(array.flatten())
    elif name in (HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS):
        block.history_lengths = _lengths(array)
        block.history[name] = _values(array.flatten())
    else:
        feature = schema.feature(name)
        if feature.level is Level.REQUEST:
            block.lists[name] = Jagged(_values(array.flatten()), _lengths(array))
        elif feature.level is Level.HISTORY:
            block.history_lengths = _lengths(array)
            block.history[name] = _values(array.flatten())
        elif feature.multi_valued:
            inner = array.flatten()
            block.candidate_lists[name] = Jagged(_values(inner.flatten()), _lengths(inner))
        else:
            block.candidate_counts = _lengths(array)
            block.candidates[name] = _values(array.flatten())


def _lengths(array: pa.ListArray) -> Tensor:
    lengths = pc.list_value_length(array)
    if lengths.null_count:
        lengths = pc.fill_null(lengths, 0)
    return torch.from_numpy(lengths.to_numpy(zero_copy_only=False).astype(np.int64))


def _values(array: pa.Array) -> Tensor:
    if array.null_count:
        absent = float("nan") if pa.types.is_floating(array.type) else ABSENT
        array = pc.fill_null(array, pa.scalar(absent, type=array.type))
    # DLPack shares Arrow's read-only buffer without a copy; nothing writes to the tensors of a block.
    return torch.from_dlpack(array) if len(array) else torch.empty(0, dtype=_DTYPES[array.type])


def columns_of(schema: DatasetSchema, surface: str, features: frozenset[str], tasks: tuple[str, ...]) -> list[str]:
    """Columns that a reader of the given features must load from a surface's files."""
    chosen = [f.name for f in schema.select(surface=surface) if f.name in features]
    history = [HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS]
    has_history = any(schema.feature(c).level is Level.HISTORY for c in chosen)
    return [
        REQUEST_ID,
        USER_ID,
        TIMESTAMP_MS,
        *chosen,
        *(history if has_history else []),
        *tasks,
        *([WEIGHT] if schema.weighted else []),
    ]
