"""Columns of a table of requests, each taken apart once: by it they are checked, and by it they become tensors."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

ABSENT = -1
_DTYPES = {
    pa.int8(): torch.int8,
    pa.int32(): torch.int32,
    pa.int64(): torch.int64,
    pa.float32(): torch.float32,
}


class Column:
    """One column.

    Attributes:
        nulls: rows without a value or list.
        bounds: of each level of lists, the outermost first: where each list starts, and the end. int32 [n + 1], from 0
        given: values of all rows one after another, with nulls.
        absent: nulls among them.
        values: the values, absent ids as -1 and absent numbers as NaN.
        numbers: the same as an array, read-only.
    """

    def __init__(self, array: pa.Array) -> None:
        self.nulls = array.null_count
        self.bounds: list[np.ndarray] = []
        while isinstance(array, pa.ListArray):
            bounds, array = _inside(array)
            self.bounds.append(bounds)
        self.given = array
        self.absent = array.null_count
        self.values = _filled(array) if self.absent else array
        self.numbers = self.values.to_numpy()

    @property
    def tensor(self) -> Tensor:
        """`values`; nothing may write to it."""
        # DLPack shares Arrow's read-only buffer without a copy. A capsule spares torch's questions about devices.
        if len(self.values):
            return torch.from_dlpack(self.values.__dlpack__())
        return torch.empty(0, dtype=_DTYPES[self.values.type])

    def lengths(self, level: int = 0) -> Tensor:
        """Entries of each list of a level. int64 [n]"""
        return torch.from_numpy(np.diff(self.bounds[level]).astype(np.int64))


def _filled(array: pa.Array) -> pa.Array:
    """The values with those that are null as -1 or NaN; several times quicker than `fill_null`."""
    validity, data = array.buffers()
    there = np.unpackbits(np.frombuffer(validity, np.uint8), count=array.offset + len(array), bitorder="little")
    values = np.frombuffer(data, array.type.to_pandas_dtype())[array.offset : array.offset + len(array)]
    absent = np.nan if values.dtype.kind == "f" else ABSENT
    return pa.array(np.where(there[array.offset :].view(bool), values, values.dtype.type(absent)))


def _inside(array: pa.ListArray) -> tuple[np.ndarray, pa.Array]:
    """Bounds of the lists, and their values one after another."""
    if array.null_count:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), array.flatten()
    bounds, values = array.offsets.to_numpy(), array.values
    # `flatten` gives these values too, through Arrow's compute functions, which cost more than all else here.
    first, last = bounds[0], bounds[-1]
    if first or last != len(values):
        return bounds - first, values.slice(first, last - first)
    return bounds, values


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array; without a copy where it is one already."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def columns_of_table(table: pa.RecordBatch | pa.Table, names: Container[str] | None = None) -> dict[str, Column]:
    """The columns of a table by name, all or those of `names`."""
    return {
        name: Column(one_array(table.column(i)))
        for i, name in enumerate(table.schema.names)
        if names is None or name in names
    }
