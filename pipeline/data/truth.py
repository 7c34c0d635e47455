"""True probabilities of a simulated log, which lie beside it and which no loader reads as a feature.

    ROOT/surface=hf/date=2026-01-05/part-00000.parquet          the log
    ROOT/truth/surface=hf/date=2026-01-05/part-00000.parquet    its truths: request_id, and a list for each task

The rows of a file of truths are those of the file of the log of the same name. A truth is the probability
of the logged label given everything the simulator knows at the request; that of a label which only exists
after another outcome (a long click after a click) is conditional on that outcome.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import polars as pl
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


def with_truth(table: pl.DataFrame, dataset: Dataset, tasks: tuple[str, ...]) -> pl.DataFrame:
    """The table with `truth_<task>` where the log was simulated; unchanged otherwise.

    Args:
        table: one row a candidate: surface, date, request_id, candidate (its place in the request) and more.
        dataset: the log that the rows come from.
        tasks: whose truths to join.

    Raises:
        DataError: as `read_truth`, and when a row has no truth.
    """
    if not has_truth(dataset):
        return table
    parts = []
    for surface in table["surface"].unique(maintain_order=True).to_list():
        days = tuple(table.filter(pl.col("surface") == surface)["date"].unique().sort().to_list())
        truth = pl.DataFrame(pl.from_arrow(read_truth(dataset, surface, days))).select(REQUEST_ID, *tasks)
        parts.append(
            truth.with_columns(
                surface=pl.lit(surface),
                candidate=pl.int_ranges(0, pl.col(tasks[0]).list.len().cast(pl.Int64), dtype=pl.Int32),
            )
            .explode([*tasks, "candidate"], empty_as_null=False)
            .rename({t: f"truth_{t}" for t in tasks})
            .with_columns(pl.col(f"truth_{t}").cast(pl.Float64) for t in tasks)
        )
    keys = ["surface", REQUEST_ID, "candidate"]
    joined = table.join(pl.concat(parts), on=keys, how="left", maintain_order="left")
    if joined.height != table.height or joined[f"truth_{tasks[0]}"].null_count():
        raise DataError("truths do not match the log's requests; simulate the log anew", file=str(dataset.root))
    return joined
