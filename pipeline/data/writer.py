"""Writing a log: tables to Parquet files, checked as every reader checks them, and `dataset.json` last."""

from __future__ import annotations

import os
from datetime import date as calendar_date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.check import check_table
from pipeline.data.logs import (
    DESCRIPTION,
    Dataset,
    Description,
    LogFile,
    NumericStatistics,
    Partition,
    arrow_schema,
    description_bytes,
)
from pipeline.data.seal import sealed
from pipeline.errors import DataError
from pipeline.schema import DatasetSchema, Kind


class LogWriter:
    """Writes a log: tables go to `part-*.parquet` files, `close` writes `dataset.json` last.

    A folder without `dataset.json` is an unfinished log, which no reader opens.

    Args:
        root: folder to write; must not yet hold a log.
        schema: what the columns mean.
        row_group_requests: requests in a row group; readers keep a few row groups in memory.

    Raises:
        DataError: the folder already holds a log.
    """

    def __init__(self, root: str | Path, schema: DatasetSchema, *, row_group_requests: int = 2048) -> None:
        self.root = Path(root)
        self.schema = schema
        self.row_group_requests = row_group_requests
        self._files: dict[tuple[str, str], list[LogFile]] = {}
        self._moments: dict[tuple[str, str], dict[str, NumericStatistics]] = {}
        if (self.root / DESCRIPTION).exists():
            raise DataError("the folder already holds a log; choose another, or remove it first", file=str(self.root))
        self.root.mkdir(parents=True, exist_ok=True)

    def write(self, surface: str, date: str, table: pa.Table) -> None:
        """Write one file of requests of one surface and day; rows must be in the order they shall have.

        Args:
            surface: a surface of the schema.
            date: ISO day, such as 2026-01-31.
            table: columns of `arrow_schema(schema, surface)`; other columns are an error.

        Raises:
            SchemaError: unknown surface.
            DataError: columns are missing, too many or of the wrong type, lists of a row differ in length,
                a label lies outside [0, 1], or an id outside its vocabulary.
        """
        calendar_date.fromisoformat(date)
        files = self._files.setdefault((surface, date), [])
        relative = f"surface={surface}/date={date}/part-{len(files):05d}.parquet"
        expected = arrow_schema(self.schema, surface)
        table = _conform(table, expected, relative)
        check_table(table, self.schema, surface, file=relative)
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        # Checksums of pages: without them a flipped bit is mostly a wrong value that nobody notices.
        pq.write_table(
            table,
            path,
            row_group_size=self.row_group_requests,
            compression="zstd",
            use_dictionary=True,
            write_page_checksum=True,
        )
        groups = pq.read_metadata(path)
        moments = self._moments.setdefault((surface, date), {})
        for feature in self.schema.select(surface=surface, kind=Kind.NUMERIC):
            moments[feature.name] = _add_moments(moments.get(feature.name), table[feature.name])
        files.append(
            LogFile(
                path=relative,
                row_group_rows=tuple(groups.row_group(i).num_rows for i in range(groups.num_row_groups)),
                impressions=_impressions(table, self.schema),
                bytes=path.stat().st_size,
            )
        )

    def adopt(self, part: Dataset) -> None:
        """Move in the files of a log of the same schema on the same disk; `part` is a log no more.

        Raises:
            DataError: both have files of one surface and day.
        """
        for p in part.description.partitions:
            if (p.surface, p.date) in self._files:
                raise DataError(f"there already are files of {p.surface} on {p.date}", file=str(part.root))
            for file in p.files:
                (self.root / file.path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part.root / file.path, self.root / file.path)
            self._files[p.surface, p.date] = list(p.files)
            self._moments[p.surface, p.date] = p.numeric

    def close(self, provenance: dict[str, Any]) -> Dataset:
        """Write `dataset.json` and open the log.

        Args:
            provenance: how the log was made; anything that JSON can hold.

        Raises:
            DataError: nothing was written.
        """
        if not self._files:
            raise DataError("the log holds no request at all", file=str(self.root))
        description = Description(
            format_version=1,
            schema=self.schema,
            partitions=tuple(
                Partition(surface=s, date=d, files=tuple(files), numeric=self._moments[s, d])
                for (s, d), files in sorted(self._files.items())
            ),
            provenance=provenance,
        )
        path = self.root / DESCRIPTION
        temporary = path.with_suffix(".json.tmp")
        temporary.write_bytes(sealed(description_bytes(description)))
        os.replace(temporary, path)
        return Dataset.open(self.root)


def _conform(table: pa.Table, expected: pa.Schema, file: str) -> pa.Table:
    extra = [c for c in table.column_names if c not in expected.names]
    if extra:
        raise DataError("the table has a column that the schema does not declare", file=file, column=extra[0])
    for name in expected.names:
        if name not in table.column_names:
            raise DataError("the table lacks a column", file=file, column=name)
        if table.schema.field(name).type != expected.field(name).type:
            raise DataError(
                f"the column has type {table.schema.field(name).type}, it must be {expected.field(name).type}",
                file=file,
                column=name,
            )
    return table.select(expected.names).cast(expected)


def _add_moments(before: NumericStatistics | None, column: pa.ChunkedArray) -> NumericStatistics:
    array = column.combine_chunks()
    if pa.types.is_list(array.type):
        array = array.flatten()
    values = array.drop_null().to_numpy(zero_copy_only=False).astype("float64")
    before = before or NumericStatistics(count=0, sum=0.0, sum_of_squares=0.0)
    return NumericStatistics(
        count=before.count + values.size,
        sum=before.sum + float(values.sum()),
        sum_of_squares=before.sum_of_squares + float((values * values).sum()),
    )


def _impressions(table: pa.Table, schema: DatasetSchema) -> int:
    return int(pc.sum(pc.list_value_length(table[schema.tasks[0]])).as_py() or 0)
