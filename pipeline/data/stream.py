"""One surface's requests in the global order, read window by window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data.block import RequestBlock, block_from_arrow
from pipeline.data.check import check_table
from pipeline.data.logs import Partition, arrow_schema
from pipeline.data.order import SurfaceOrder
from pipeline.errors import DataError
from pipeline.schema import DatasetSchema


class RowGroups:
    """Decoded row groups of one surface.

    Args:
        root: of the data set.
        schema: of the data set.
        surface: whose files these are.
        partitions: the days to read.
        columns: names of the columns to read.
        history_length: keep at most this many of the newest events of a history.
    """

    def __init__(
        self,
        *,
        root: Path,
        schema: DatasetSchema,
        surface: str,
        partitions: tuple[Partition, ...],
        columns: list[str],
        history_length: int,
    ) -> None:
        self.root = root
        self.schema = schema
        self.surface = surface
        self.columns = columns
        self.history_length = history_length
        self._index = [(f.path, g) for p in partitions for f in p.files for g in range(len(f.row_group_rows))]
        self.rows = tuple(n for p in partitions for f in p.files for n in f.row_group_rows)

    def empty(self) -> RequestBlock:
        """A block of these columns without a request."""
        return block_from_arrow(arrow_schema(self.schema, self.surface).empty_table().select(self.columns), self.schema)

    def read(self, unit: int) -> RequestBlock:
        """All requests of a row group.

        Raises:
            DataError: the file is gone, damaged, or holds what it must not.
        """
        path, group = self._index[unit]
        table = self._table(path, group)
        if table.num_rows != self.rows[unit]:
            raise DataError(
                f"the row group has {table.num_rows} requests, dataset.json says {self.rows[unit]}; write it anew",
                file=path,
                row_group=group,
            )
        check_table(table, self.schema, self.surface, file=path, row_group=group)
        return newest(block_from_arrow(table, self.schema), self.history_length)

    def _table(self, path: str, group: int) -> pa.Table:
        try:
            with pq.ParquetFile(self.root / path) as file:
                present = file.schema_arrow
                self._check_columns(present, path)
                return file.read_row_group(group, columns=self.columns, use_threads=False)
        except FileNotFoundError as error:
            raise DataError("the file is gone; write the log anew or restore it", file=path) from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"the file cannot be decoded: {error}", file=path, row_group=group) from error

    def _check_columns(self, present: pa.Schema, path: str) -> None:
        expected = arrow_schema(self.schema, self.surface)
        for name in self.columns:
            if name not in present.names:
                raise DataError("the file lacks a column that dataset.json declares", file=path, column=name)
            if present.field(name).type != expected.field(name).type:
                raise DataError(
                    f"the column has type {present.field(name).type}, it must be {expected.field(name).type}",
                    file=path,
                    column=name,
                )


def newest(block: RequestBlock, length: int) -> RequestBlock:
    """The block with histories cut to their newest `length` events."""
    if not block.history or not block.history_lengths.numel() or int(block.history_lengths.max()) <= length:
        return block
    kept = block.history_lengths.clamp_max(length)
    ends = torch.cumsum(block.history_lengths, 0)
    start = ends - kept
    base = torch.cumsum(kept, 0) - kept
    total = int(kept.sum())
    index = torch.repeat_interleave(start - base, kept, output_size=total) + torch.arange(total)
    block.history = {k: v[index] for k, v in block.history.items()}
    block.history_lengths = kept
    return block


class SurfaceStream:
    """What one rank reads of a surface's epoch, by position.

    Holds the decoded rows of one block (see `SurfaceOrder.block_rows`) and the row groups that the last
    block used, so that a row group is decoded once where blocks follow each other.

    Args:
        groups: where rows come from.
        order: which row stands where.
        rank, world_size: which lanes are this rank's.
    """

    def __init__(self, groups: RowGroups, order: SurfaceOrder, rank: int, world_size: int) -> None:
        self.groups = groups
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self._decoded: dict[int, RequestBlock] = {}
        self._block = -1
        self._rows: RequestBlock | None = None
        self._positions = np.empty(0, np.int64)

    def read(self, start: int, stop: int) -> list[RequestBlock]:
        """This rank's requests of positions [start, stop), in order; possibly none.

        Raises:
            DataError: a file is gone, damaged, or holds what it must not.
        """
        per_block = self.order.lanes * self.order.window
        out = []
        for block in range(start // per_block, -(-stop // per_block)):
            self._load(block)
            a, b = np.searchsorted(self._positions, [start, stop])
            if b > a and self._rows is not None:
                out.append(self._rows.slice(int(a), int(b)))
        return out

    def _load(self, block: int) -> None:
        if block == self._block:
            return
        self._block = block
        self._rows = None
        self._positions, virtual = self.order.block_rows(block, self.rank, self.world_size)
        units, rows = self.order.locate(virtual)
        needed = np.unique(units)
        self._decoded = {
            unit: self._decoded[unit] if unit in self._decoded else self.groups.read(unit) for unit in needed.tolist()
        }
        if needed.size:
            starts = np.concatenate([[0], np.cumsum([len(self._decoded[u]) for u in needed.tolist()])])
            index = starts[np.searchsorted(needed, units)] + rows
            self._rows = RequestBlock.cat(list(self._decoded.values())).take(torch.from_numpy(index))


class SurfaceReader:
    """A surface's requests across passes: with the policy "repeat", positions run on past the epoch's end.

    Args:
        groups: where rows come from.
        order_of: the order of each pass.
        rank, world_size: which lanes are this rank's.
    """

    def __init__(
        self, groups: RowGroups, order_of: Callable[[int], SurfaceOrder], *, rank: int, world_size: int
    ) -> None:
        self.groups = groups
        self.order_of = order_of
        self.rank = rank
        self.world_size = world_size
        self._empty = groups.empty()
        self._pass = -1
        self._stream: SurfaceStream | None = None

    def read(self, start: int, stop: int) -> RequestBlock:
        """This rank's requests of positions [start, stop), counted over passes; possibly none."""
        size = sum(self.groups.rows)
        parts = []
        while start < stop:
            number = start // size
            if self._stream is None or number != self._pass:
                self._pass = number
                self._stream = SurfaceStream(self.groups, self.order_of(number), self.rank, self.world_size)
            end = min(stop, (number + 1) * size)
            parts += self._stream.read(start - number * size, end - number * size)
            start = end
        return RequestBlock.cat(parts) if parts else self._empty
