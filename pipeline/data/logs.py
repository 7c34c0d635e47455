"""The log format: request-grouped Parquet, hive-partitioned, described by one `dataset.json`.

    ROOT/dataset.json
    ROOT/surface=hf/date=2026-01-31/part-00000.parquet

One row is one request. What belongs to the request stands once; what belongs to its candidates and its
history stands in lists of equal length. `DatasetSchema` says what a column means, this module how it lies
on disk. Rows of a file are in time order. Pages of files carry checksums, and so does the description (`seal`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.data.contradictions import contradictions
from pipeline.data.seal import unsealed
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


def description_bytes(description: Description) -> bytes:
    """Content of `dataset.json`."""
    return _DESCRIPTION.dump_json(description, indent=1)
