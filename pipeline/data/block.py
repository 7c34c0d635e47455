"""Requests of one surface as flat tensors: what a row group becomes before it becomes part of a batch.

Lists that share their lengths (all candidate columns, all history columns) share them here too. Rows are
copied row by row, never entry by entry: a row of a list is one short `memcpy`. Absent ids are -1 and absent
numbers NaN inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.columns import Column, columns_of_table
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

# What `permute_1D_sparse_data` copies on CPU.
_PERMUTED = (torch.int32, torch.int64, torch.float32, torch.float64)


def offsets(lengths: Tensor) -> Tensor:
    """Where each row starts, and the end: [n] to [n + 1]."""
    out = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=out[1:])
    return out


def take_rows(values: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """The entries of the given rows, row after row.

    Args:
        values: [sum of lengths, ...], entries of all rows one after another.
        lengths: int64 [n], entries of each row.
        rows: int32 [m], rows to take; repeats allowed.

    Returns:
        [sum of the taken lengths, ...]; narrow integers come back as int32.
    """
    if values.dtype not in _PERMUTED:
        values = values.int()
    width = values.shape[1] if values.dim() > 1 else 1
    if values.numel() == 0 or rows.numel() == 0:
        return values.new_empty(int(lengths[rows].sum()), *values.shape[1:])
    entries = lengths * width if width != 1 else lengths
    taken = torch.ops.fbgemm.permute_1D_sparse_data(rows, entries, values.flatten(), None, None)[1]
    return taken.view(-1, *values.shape[1:])


@dataclass
class Jagged:
    """Rows of several values: `values` of all rows one after another, `lengths` of each row."""

    values: Tensor
    lengths: Tensor

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each row starts, and the end. [n + 1]"""
        return offsets(self.lengths).numpy()

    def slice(self, start: int, stop: int) -> Jagged:
        """Rows [start, stop) as views."""
        first, last = self.starts[start].item(), self.starts[stop].item()
        return Jagged(self.values[first:last], self.lengths[start:stop])

    def take(self, rows: Tensor) -> Jagged:
        """The given rows (int32), in the given order."""
        return Jagged(take_rows(self.values, self.lengths, rows), self.lengths[rows])

    def to(self, dtype: torch.dtype) -> Jagged:
        """The same rows with values of another type."""
        return Jagged(self.values.to(dtype), self.lengths)

    @staticmethod
    def cat(parts: list[Jagged]) -> Jagged:
        return Jagged(torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts]))


@dataclass
class RequestBlock:
    """Requests of one surface.

    Args:
        scalars: one entry a request.
        lists: several values a request (multi-valued request features).
        candidate_counts: int64 [R].
        candidates: one entry a candidate: features, labels, weights.
        candidate_lists: several values a candidate.
        history_lengths: int64 [R].
        history: one entry an event.
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

    @cached_property
    def _candidate_starts(self) -> np.ndarray:
        return offsets(self.candidate_counts).numpy()

    @cached_property
    def _history_starts(self) -> np.ndarray:
        return offsets(self.history_lengths).numpy()

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        jagged = [t for j in (*self.lists.values(), *self.candidate_lists.values()) for t in (j.values, j.lengths)]
        dense = [*self.scalars.values(), *self.candidates.values(), *self.history.values()]
        return sum(t.nbytes for t in [*jagged, *dense, self.candidate_counts, self.history_lengths])

    def take(self, rows: Tensor) -> RequestBlock:
        """The given rows, in the given order."""
        rows = rows.int()
        return RequestBlock(
            {k: v[rows] for k, v in self.scalars.items()},
            {k: v.take(rows) for k, v in self.lists.items()},
            self.candidate_counts[rows],
            {k: take_rows(v, self.candidate_counts, rows) for k, v in self.candidates.items()},
            {k: self._take_candidates(v, rows) for k, v in self.candidate_lists.items()},
            self.history_lengths[rows],
            {k: take_rows(v, self.history_lengths, rows) for k, v in self.history.items()},
        )

    def _take_candidates(self, lists: Jagged, rows: Tensor) -> Jagged:
        """Lists of all candidates of the given requests: all values of a request are moved at once."""
        per_request = torch.from_numpy(np.diff(lists.starts[self._candidate_starts]))
        return Jagged(take_rows(lists.values, per_request, rows), take_rows(lists.lengths, self.candidate_counts, rows))

    def slice(self, start: int, stop: int) -> RequestBlock:
        """Rows [start, stop) as views; like slices of lists, it ends where the rows end."""
        stop = min(stop, len(self))
        start = min(start, stop)
        c0, c1 = self._candidate_starts[start].item(), self._candidate_starts[stop].item()
        h0, h1 = self._history_starts[start].item(), self._history_starts[stop].item()
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
    return block_of(columns_of_table(table), schema, table.num_rows)


def block_of(columns: dict[str, Column], schema: DatasetSchema, rows: int) -> RequestBlock:
    """Requests of one surface as tensors, of columns that were taken apart; see `block_from_arrow`."""
    zero = torch.zeros(rows, dtype=torch.int64)
    block = RequestBlock({}, {}, zero, {}, {}, zero, {})
    for name, column in columns.items():
        _add_column(block, name, column, schema)
    return block


def _add_column(block: RequestBlock, name: str, column: Column, schema: DatasetSchema) -> None:
    if not column.bounds:
        block.scalars[name] = column.tensor
        return
    if name in schema.tasks or name == WEIGHT:
        level, several = Level.CANDIDATE, False
    elif name in (HISTORY_ACTION, HISTORY_SURFACE, HISTORY_TIME_MS):
        level, several = Level.HISTORY, False
    else:
        feature = schema.feature(name)
        level, several = feature.level, feature.multi_valued
    if level is Level.REQUEST:
        block.lists[name] = Jagged(column.tensor, column.lengths())
    elif level is Level.HISTORY:
        # Columns of a level share their lengths: those of the first do.
        if not block.history:
            block.history_lengths = column.lengths()
        block.history[name] = column.tensor
    elif several:
        block.candidate_lists[name] = Jagged(column.tensor, column.lengths(1))
    else:
        if not block.candidates:
            block.candidate_counts = column.lengths()
        block.candidates[name] = column.tensor


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
