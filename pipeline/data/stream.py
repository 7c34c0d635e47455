"""One surface's requests in the global order, read window by window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pipeline.data.block import RequestBlock
from pipeline.data.order import SurfaceOrder
from pipeline.data.rowgroups import RowGroups, newest

__all__ = ["RowGroups", "SurfaceReader", "SurfaceStream", "newest"]


class SurfaceStream:
    """What one rank reads of a surface's epoch, by position.

    Holds the rows of one block (see `SurfaceOrder.block_rows`), in order, and those decoded row groups that the next
    block goes on with, so that a row group is decoded once where blocks follow each other.

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
        self._coming_block = -1
        self._coming = (self._positions, self._positions, self._positions)

    @property
    def bytes(self) -> int:
        """Size of what is held, decoded row groups and rows of the block together."""
        held = [*self._decoded.values(), *([self._rows] if self._rows is not None else [])]
        return sum(block.bytes for block in held)

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
        positions, units, rows = self._coming if self._coming_block == block else self._block_rows(block)
        needed = np.unique(units).tolist()
        self._decoded = {u: self._decoded[u] for u in needed if u in self._decoded}
        self._decoded |= self.groups.read([u for u in needed if u not in self._decoded])
        # A row group in quarantine is an empty block: its rows leave smaller batches.
        if gone := [u for u in needed if not len(self._decoded[u])]:
            there = np.isin(units, gone, invert=True)
            self.groups.count_left_out(int(there.size - there.sum()))
            positions, units, rows = positions[there], units[there], rows[there]
        self._positions = positions
        if units.size:
            self._rows = self._in_order(units, rows)
            self._rows, pieces = self.groups.bound(self._rows)
            self._positions = self._positions if pieces is None else np.repeat(self._positions, pieces)
        self._coming_block, self._coming = block + 1, self._block_rows(block + 1)
        self._decoded = {u: self._decoded[u] for u in np.unique(self._coming[1]).tolist() if u in self._decoded}

    def _block_rows(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, row groups and rows within them of what this rank holds of a block."""
        positions, virtual = self.order.block_rows(block, self.rank, self.world_size)
        return positions, *self.order.locate(virtual)

    def _in_order(self, units: np.ndarray, rows: np.ndarray) -> RequestBlock:
        """The given rows of decoded row groups: of each, only the stretch in use is copied together first."""
        parts, index, base = [], np.empty(rows.size, np.int64), 0
        for unit in np.unique(units).tolist():
            own = units == unit
            first, last = int(rows[own].min()), int(rows[own].max())
            parts.append(self._decoded[unit].slice(first, last + 1))
            index[own] = rows[own] - first + base
            base += last + 1 - first
        return RequestBlock.cat(parts).take(torch.from_numpy(index))


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

    @property
    def bytes(self) -> int:
        """Size of what is held."""
        return 0 if self._stream is None else self._stream.bytes

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
