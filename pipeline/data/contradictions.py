"""What a description of a log says that cannot be true, whatever its files hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING

from pipeline.errors import unknown
from pipeline.schema import Kind

# Of a row group; more would not fit any memory.
_MOST_ROWS = 2**31

if TYPE_CHECKING:
    from pipeline.data.logs import Description, LogFile, Partition


def contradictions(description: Description) -> Iterator[str]:
    """Every problem, with its place: a file named twice would be trained on twice, one of no surface not at all."""
    days: set[tuple[str, str]] = set()
    paths: set[str] = set()
    for i, partition in enumerate(description.partitions):
        where = f"partitions.{i}"
        if partition.surface not in description.schema.surfaces:
            yield f"{where}: " + unknown("surface", partition.surface, description.schema.surfaces)
        if not _is_day(partition.date):
            yield f"{where}: {partition.date!r} is not a day such as 2026-01-31"
        if (partition.surface, partition.date) in days:
            yield f"{where}: surface {partition.surface!r} on {partition.date} is described twice"
        days.add((partition.surface, partition.date))
        for file in partition.files:
            if file.path in paths:
                yield f"{where}: file {file.path} is named twice"
            paths.add(file.path)
            yield from _file_problems(where, file)
        yield from _moment_problems(where, partition, description)


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _file_problems(where: str, file: LogFile) -> Iterator[str]:
    for rows in file.row_group_rows:
        if not 0 <= rows < _MOST_ROWS:
            yield f"{where}: file {file.path} has a row group of {rows} requests"
    if file.impressions < 0 or file.bytes < 0:
        yield f"{where}: file {file.path} has {file.impressions} impressions in {file.bytes} bytes"


def _moment_problems(where: str, partition: Partition, description: Description) -> Iterator[str]:
    numeric = {f.name for f in description.schema.select(kind=Kind.NUMERIC)}
    for name, moments in partition.numeric.items():
        if name not in numeric:
            yield f"{where}.numeric: " + unknown("numeric feature", name, numeric)
        sound = moments.count >= 0 and math.isfinite(moments.sum) and math.isfinite(moments.sum_of_squares)
        if not sound or moments.sum_of_squares < 0:
            yield f"{where}.numeric.{name}: {moments} are no moments of values"
