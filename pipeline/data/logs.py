"""The log format: request-grouped Parquet, hive-partitioned, described by one `dataset.json`.

    ROOT/dataset.json
    ROOT/surface=hf/date=2026-01-31/part-00000.parquet

One row is one request. What belongs to the request stands once; what belongs to its candidates and its
history stands in lists of equal length. `DatasetSchema` says what a column means, this module how it lies
on disk. Rows of a file are in time order. Pages of files carry checksums, and so does the description (`seal`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import date as calendar_date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.data.contradictions import contradictions
from pipeline.data.seal import sealed, unsealed
from pipeline.errors import DataError, SchemaError, unknown
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
from pipeline.texts import is_file, is_inside, parse_json

FORMAT_VERSION = 1
DESCRIPTION = "dataset.json"
_STRICT = ConfigDict(extra="forbid")


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class LogFile:
    """One Parquet file.

    Args:
        path: relative to the data set's root, with forward slashes.
        row_group_rows: requests of each row group; the number of steps of an epoch follows from these.
        impressions: candidates in the file.
        bytes: size of the file.
    """

    path: str
    row_group_rows: tuple[int, ...]
    impressions: int
    bytes: int

    @property
    def requests(self) -> int:
        return sum(self.row_group_rows)


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class NumericStatistics:
    """Moments of a numeric feature in one partition, absent values left out."""

    count: int
    sum: float
    sum_of_squares: float


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Partition:
    """The files of one surface on one day."""

    surface: str
    date: str
    files: tuple[LogFile, ...]
    numeric: dict[str, NumericStatistics]

    @property
    def requests(self) -> int:
        return sum(f.requests for f in self.files)

    @property
    def impressions(self) -> int:
        return sum(f.impressions for f in self.files)


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Description:
    """Content of `dataset.json`.

    Args:
        format_version: version of this layout; readers refuse what they do not know.
        schema: what the columns mean.
        partitions: surfaces and days, ordered by (surface, date).
        provenance: how the log was made (command, spec, seed, source files), for people.
    """

    format_version: Literal[1]
    schema: DatasetSchema
    partitions: tuple[Partition, ...]
    provenance: dict[str, Any]


_DESCRIPTION = TypeAdapter(Description)


def column_type(feature: Feature) -> pa.DataType:
    """Arrow type of a feature's column."""
    value = pa.int64() if feature.kind is Kind.CATEGORICAL else pa.float32()
    if feature.multi_valued:
        value = pa.list_(value)
    return value if feature.level is Level.REQUEST else pa.list_(value)


def arrow_schema(schema: DatasetSchema, surface: str) -> pa.Schema:
    """Columns of a file of `surface`, in order.

    Raises:
        SchemaError: there is no such surface.
    """
    schema.surface_index(surface)
    columns = [
        pa.field(REQUEST_ID, pa.int64(), nullable=False),
        pa.field(USER_ID, pa.int64(), nullable=False),
        pa.field(TIMESTAMP_MS, pa.int64(), nullable=False),
    ]
    columns += [pa.field(f.name, column_type(f)) for f in schema.select(surface=surface)]
    if schema.has_history:
        columns += [
            pa.field(HISTORY_ACTION, pa.list_(pa.int8())),
            pa.field(HISTORY_SURFACE, pa.list_(pa.int8())),
            pa.field(HISTORY_TIME_MS, pa.list_(pa.int64())),
        ]
    columns += [pa.field(task, pa.list_(pa.float32())) for task in schema.tasks]
    if schema.weighted:
        columns.append(pa.field(WEIGHT, pa.list_(pa.float32())))
    return pa.schema(columns)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An opened log: its description, and where it lies."""

    root: Path
    description: Description
    fingerprint: str

    @staticmethod
    def open(root: str | Path, *, check_files: bool = True) -> Dataset:
        """Read and check `dataset.json` and that every file it names is there.

        Args:
            root: folder of the log.
            check_files: False looks at the description alone.

        Raises:
            DataError: the folder, the description or a file is missing or damaged, or of another version.
        """
        root = Path(root)
        path = root / DESCRIPTION
        if not root.is_dir():
            raise DataError(
                "there is no such data folder; make one with `trefoil simulate` or `trefoil ingest`", file=str(root)
            )
        if not path.is_file():
            raise DataError(
                f"the folder holds no {DESCRIPTION}: it is not a Trefoil log, or its writing did not finish",
                file=str(path),
            )
        try:
            text = unsealed(path.read_bytes())
        except ValueError as error:
            raise DataError(f"the description cannot be trusted: {error}", file=str(path)) from error
        description = _parse_description(text, path)
        for partition in description.partitions:
            for file in partition.files if check_files else ():
                check_file(root, file)
        return Dataset(root=root, description=description, fingerprint=hashlib.sha256(text).hexdigest()[:16])

    @property
    def schema(self) -> DatasetSchema:
        return self.description.schema

    @cached_property
    def days(self) -> tuple[str, ...]:
        """Every day on which some surface has requests, in order."""
        return tuple(sorted({p.date for p in self.description.partitions}))

    def partitions(self, surface: str, days: tuple[str, ...] | None = None) -> tuple[Partition, ...]:
        """Partitions of a surface in order of date, of the given days or of all.

        Raises:
            SchemaError: there is no such surface.
            DataError: a day that no surface has.
        """
        self.schema.surface_index(surface)
        for day in days or ():
            if day not in self.days:
                raise DataError(unknown("day", day, self.days), file=str(self.root))
        return tuple(
            p for p in self.description.partitions if p.surface == surface and (days is None or p.date in days)
        )

    def candidates_per_request(self, surfaces: tuple[str, ...]) -> float:
        """Mean candidates of a request on these surfaces, all days; 0 without requests."""
        partitions = [p for s in surfaces for p in self.partitions(s)]
        requests = sum(p.requests for p in partitions)
        return sum(p.impressions for p in partitions) / requests if requests else 0.0

    def numeric_moments(self, feature: str, days: tuple[str, ...] | None = None) -> tuple[float, float]:
        """Mean and standard deviation of a numeric feature over all surfaces; (0, 1) if never present."""
        parts = [
            p.numeric[feature]
            for p in self.description.partitions
            if feature in p.numeric and (days is None or p.date in days)
        ]
        count = sum(p.count for p in parts)
        if count == 0:
            return 0.0, 1.0
        mean = sum(p.sum for p in parts) / count
        variance = max(sum(p.sum_of_squares for p in parts) / count - mean * mean, 0.0)
        return mean, variance**0.5 or 1.0


def _parse_description(text: bytes, path: Path) -> Description:
    try:
        version = parse_json(text).get("format_version")
    except (ValueError, AttributeError) as error:
        raise DataError(f"the description is not a JSON object: {error}", file=str(path)) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"format_version is {version!r}, this version of Trefoil reads {FORMAT_VERSION}; write the log anew",
            file=str(path),
        )
    try:
        description = _DESCRIPTION.validate_json(text)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        raise DataError("the description is not valid: " + "; ".join(lines), file=str(path)) from error
    except SchemaError as error:
        raise DataError(str(error), file=str(path)) from error
    if problems := list(contradictions(description))[:5]:
        raise DataError("the description contradicts itself: " + "; ".join(problems), file=str(path))
    return description


def check_file(root: Path, file: LogFile) -> None:
    """Check that a file of the description is there, whole, and inside the folder.

    Raises:
        DataError: it is not.
    """
    path = root / file.path
    if Path(file.path).is_absolute() or ".." in Path(file.path).parts or not is_inside(path, root):
        raise DataError("the description names a file outside its folder", file=file.path)
    if not is_file(path):
        raise DataError("the description names a file that is not there; write the log anew", file=str(path))
    size = path.stat().st_size
    if size != file.bytes:
        raise DataError(
            f"the file has {size} bytes, the description says {file.bytes}; write the log anew", file=str(path)
        )


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
        from pipeline.data.check import check_table

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
        temporary.write_bytes(sealed(_DESCRIPTION.dump_json(description, indent=1)))
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
    import pyarrow.compute as pc

    return int(pc.sum(pc.list_value_length(table[schema.tasks[0]])).as_py() or 0)
