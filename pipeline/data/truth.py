"""True probabilities of a simulated log, which lie beside it and which no loader reads as a feature.

    ROOT/surface=hf/date=2026-01-05/part-00000.parquet          the log
    ROOT/truth/surface=hf/date=2026-01-05/part-00000.parquet    its truths: request_id, and a list for each task

The rows of a file of truths are those of the file of the log of the same name. A truth is the probability
of the logged label given everything the simulator knows at the request; that of a label which only exists
after another outcome (a long click after a click) is conditional on that outcome.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.logs import Dataset
from pipeline.errors import DataError
from pipeline.schema import REQUEST_ID

TRUTH = "truth"


def has_truth(dataset: Dataset) -> bool:
    """Whether truths lie beside the log."""
    return (dataset.root / TRUTH).is_dir()


def read_truth(dataset: Dataset, surface: str, days: tuple[str, ...] | None = None) -> pa.Table:
    """Truths of a surface, rows in the order of the log's files.

    Args:
        dataset: a simulated log.
        surface: one of its surfaces.
        days: of these days; None = of all.

    Returns:
        `request_id` int64, and for each task list<float32>, one entry a candidate.

    Raises:
        SchemaError: there is no such surface.
        DataError: no such day, no truths beside this log, or a file of them is missing or does not fit.
    """
    if not has_truth(dataset):
        raise DataError("the log has no truths beside it: it was not simulated", file=str(dataset.root / TRUTH))
    names = [REQUEST_ID, *dataset.schema.tasks]
    tables = []
    for partition in dataset.partitions(surface, days):
        for file in partition.files:
            path = dataset.root / TRUTH / PurePosixPath(file.path)
            if not path.is_file():
                raise DataError("a file of truths is missing; simulate the log anew", file=str(path))
            table = pq.ParquetFile(path).read(columns=names)
            if table.num_rows != file.requests:
                raise DataError(
                    f"the file of truths has {table.num_rows} rows where the log has {file.requests}; "
                    "simulate the log anew",
                    file=str(path),
                )
            tables.append(table)
    if not tables:
        lists = [pa.field(t, pa.list_(pa.float32())) for t in dataset.schema.tasks]
        return pa.schema([pa.field(REQUEST_ID, pa.int64()), *lists]).empty_table()
    return pa.concat_tables(tables)


def truth_of_requests(
    dataset: Dataset, surface: str, request_id: np.ndarray, days: tuple[str, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Truths of given requests, joined on (surface, request_id).

    Args:
        dataset: a simulated log.
        surface: the surface of all these requests.
        request_id: int64 [R], in any order, repeats allowed.
        days: where to look; None = on all days.

    Returns:
        float32 [C, T], candidates in the order of `request_id` and within a request in the log's order, and
        int64 [R], how many candidates each request has.

    Raises:
        DataError: as `read_truth`, and when a request is not there.
    """
    table = read_truth(dataset, surface, days).combine_chunks()
    known = table[REQUEST_ID].to_numpy()
    order = np.argsort(known, kind="stable")
    if known.size == 0 and request_id.size:
        raise DataError(f"surface {surface!r} has no truths on these days", file=str(dataset.root / TRUTH))
    found = np.minimum(np.searchsorted(known, request_id, sorter=order), max(known.size - 1, 0))
    row = order[found]
    if (wrong := np.flatnonzero(known[row] != request_id)).size:
        raise DataError(
            f"request {int(request_id[wrong[0]])} of surface {surface!r} has no truth on these days",
            file=str(dataset.root / TRUTH),
        )
    columns, offsets = [], None
    for task in dataset.schema.tasks:
        column = table[task].combine_chunks()
        array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        offsets = array.offsets.to_numpy()
        columns.append(array.values.to_numpy())
    assert offsets is not None
    length = np.diff(offsets)[row].astype(np.int64)
    ends = np.cumsum(length)
    at = np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(offsets[:-1][row] - (ends - length), length)
    return np.stack(columns, axis=1)[at], length
