"""What a log holds, per surface and day, and everything that is wrong with it.

Every file is read once, row group by row group. Memory is one row group, 8 bytes for each request of a surface
(request ids, to find those that are there twice), and a sample of its candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.check import column_faults, table_faults
from pipeline.data.columns import one_array
from pipeline.data.giveaways import Giveaway, Sample
from pipeline.data.logs import Dataset, LogFile, arrow_schema, check_file
from pipeline.data.rowgroups import open_parquet, read_row_group
from pipeline.errors import DataError
from pipeline.schema import HISTORY_ITEM, REQUEST_ID, TIMESTAMP_MS, DatasetSchema, Kind

QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class Tally:
    """Counts of one surface on one day; rows of sound row groups only."""

    requests: int = 0
    candidates: dict[int, int] = field(default_factory=dict)
    """Requests by number of candidates."""
    events: dict[int, int] = field(default_factory=dict)
    """Requests by length of history."""
    labels: dict[str, tuple[int, float]] = field(default_factory=dict)
    """For each task: observed labels, and their sum."""
    present: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each feature: values that are there, and places for one."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For each numeric feature with a value: the least and the largest."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.requests + other.requests,
            {k: self.candidates.get(k, 0) + other.candidates.get(k, 0) for k in self.candidates | other.candidates},
            {k: self.events.get(k, 0) + other.events.get(k, 0) for k in self.events | other.events},
            _pairs(self.labels, other.labels),
            _pairs(self.present, other.present),
            {
                k: (min(a[0] for a in found), max(a[1] for a in found))
                for k in self.ranges | other.ranges
                if (found := [t.ranges[k] for t in (self, other) if k in t.ranges])
            },
        )

    def summary(self) -> dict[str, Any]:
        """Numbers for people and machines."""
        return {
            "requests": self.requests,
            "impressions": sum(n * k for n, k in self.candidates.items()),
            "candidates": _distribution(self.candidates),
            "history": _distribution(self.events),
            "label_rates": {t: total / n if n else None for t, (n, total) in self.labels.items()},
            "labels_observed": {t: n for t, (n, _) in self.labels.items()},
        }


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(x + y for x, y in zip(a.get(k, (0, 0)), b.get(k, (0, 0)), strict=True)) for k in a | b}


def _distribution(counts: dict[int, int]) -> dict[str, float] | None:
    """Mean, quantiles (the least value that this share of requests does not pass) and largest."""
    total = sum(counts.values())
    if not total:
        return None
    values = sorted(counts)
    reached = np.cumsum([counts[v] for v in values])
    found: dict[str, float] = {"mean": sum(v * n for v, n in counts.items()) / total}
    for q in QUANTILES:
        found[f"p{round(100 * q)}"] = values[int(np.searchsorted(reached, q * total))]
    return {**found, "max": values[-1]}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found.

    Args:
        schema: of the log.
        tallies: by surface and day.
        faults: everything that is wrong.
        giveaways: features that look as if they were made from an outcome; not wrong by themselves.
    """

    schema: DatasetSchema
    tallies: dict[tuple[str, str], Tally]
    faults: tuple[DataError, ...]
    giveaways: tuple[Giveaway, ...]

    def of_surface(self, surface: str) -> Tally:
        """All days of a surface."""
        return sum((t for (s, _), t in self.tallies.items() if s == surface), Tally())

    def as_dict(self) -> dict[str, Any]:
        """The same for machines."""
        surfaces: dict[str, Any] = {}
        for surface in self.schema.surfaces:
            whole = self.of_surface(surface)
            surfaces[surface] = {
                **whole.summary(),
                "coverage": {f: there / places if places else None for f, (there, places) in whole.present.items()},
                "ranges": {f: list(bounds) for f, bounds in whole.ranges.items()},
                "days": {d: t.summary() for (s, d), t in self.tallies.items() if s == surface},
            }
        faults = [
            {"problem": f.problem, "file": f.file, "row_group": f.row_group, "column": f.column} for f in self.faults
        ]
        return {"surfaces": surfaces, "faults": faults, "giveaways": [asdict(g) for g in self.giveaways]}


def inspect(root: str | Path) -> Inspection:
    """Read a whole log.

    Raises:
        DataError: the folder or its description is missing or damaged; everything else is reported as a fault.
    """
    dataset = Dataset.open(root, check_files=False)
    tallies: dict[tuple[str, str], Tally] = {}
    faults: list[DataError] = []
    giveaways: list[Giveaway] = []
    for surface in dataset.schema.surfaces:
        ids: list[np.ndarray] = []
        sample = Sample()
        for partition in dataset.partitions(surface):
            tally = Tally()
            for file in partition.files:
                try:
                    check_file(dataset.root, file)
                    found, wrong, own = _inspect_file(dataset, surface, file, sample)
                except DataError as fault:
                    faults.append(fault)
                    continue
                tally += found
                faults += wrong
                ids += own
            tallies[surface, partition.date] = tally
        faults += _twice(surface, ids, dataset)
        giveaways += sample.giveaways(dataset.schema, surface)
    return Inspection(schema=dataset.schema, tallies=tallies, faults=tuple(faults), giveaways=tuple(giveaways))


def _inspect_file(
    dataset: Dataset, surface: str, file: LogFile, sample: Sample
) -> tuple[Tally, list[DataError], list[np.ndarray]]:
    """Counts, faults, and request ids of a file."""
    expected = arrow_schema(dataset.schema, surface)
    tally, ids, impressions = Tally(), [], 0
    with closing(open_parquet(dataset.root, file.path)) as parquet:
        present = parquet.schema_arrow
        faults = list(column_faults(present, dataset.schema, surface, file=file.path))
        unknown = {f.column for f in faults}
        faults += [
            DataError("the file has a column that dataset.json does not declare", file=file.path, column=name)
            for name in present.names
            if name not in expected.names
        ]
        columns = [c for c in expected.names if c not in unknown]
        sound = not faults
        last_ms = None
        for group, rows in enumerate(file.row_group_rows):
            try:
                table = read_row_group(parquet, group, columns, rows, path=file.path)
            except DataError as fault:
                faults.append(fault)
                sound = False
                continue
            wrong = list(table_faults(table, dataset.schema, surface, file=file.path, row_group=group))
            if not wrong and not unknown:
                tally += _tally(table, dataset.schema, surface)
                sample.add(table, dataset.schema, surface)
                ids.append(table[REQUEST_ID].to_numpy())
                wrong += _out_of_order(table, last_ms, file.path, group)
                last_ms = table[TIMESTAMP_MS][-1].as_py() if rows else last_ms
            sound = sound and not wrong
            faults += wrong
    impressions = tally.summary()["impressions"]
    if sound and impressions != file.impressions:
        faults.append(
            DataError(f"the file has {impressions} candidates, dataset.json says {file.impressions}", file=file.path)
        )
    return tally, faults, ids


def _out_of_order(table: pa.Table, last_ms: int | None, file: str, group: int) -> Iterator[DataError]:
    times = table[TIMESTAMP_MS].to_numpy()
    back = (np.diff(times) < 0).any() or (last_ms is not None and times.size and times[0] < last_ms)
    if back:
        yield DataError("the rows are not in order of time", file=file, row_group=group, column=TIMESTAMP_MS)


def _twice(surface: str, ids: list[np.ndarray], dataset: Dataset) -> Iterator[DataError]:
    counts = pl.Series(np.concatenate(ids) if ids else np.empty(0, np.int64)).value_counts(name="times")
    several = counts.filter(pl.col("times") > 1)
    if several.height:
        yield DataError(
            f"{several.height} request ids of surface {surface!r} are there more than once, such as "
            f"{several.row(0)[0]}; ids must be unique within a surface",
            file=str(dataset.root),
            column=REQUEST_ID,
        )


def _tally(table: pa.Table, schema: DatasetSchema, surface: str) -> Tally:
    """Counts of sound rows."""
    tally = Tally(requests=table.num_rows, candidates=_lengths(table, schema.tasks[0]))
    if schema.has_history:
        tally.events = _lengths(table, HISTORY_ITEM)
    for task in schema.tasks:
        flat = one_array(table[task]).flatten()
        tally.labels[task] = (len(flat) - flat.null_count, float(pc.sum(flat).as_py() or 0))
    for feature in schema.select(surface=surface):
        flat = one_array(table[feature.name])
        while pa.types.is_list(flat.type) and not (feature.multi_valued and not pa.types.is_list(flat.type.value_type)):
            flat = flat.flatten()
        places, there = len(flat), len(flat) - flat.null_count
        if feature.multi_valued:  # several values a place: none is as good as null
            there = int(pc.sum(pc.greater(pc.fill_null(pc.list_value_length(flat), 0), 0)).as_py() or 0)
        tally.present[feature.name] = (there, places)
        if feature.kind is Kind.NUMERIC and there:
            bounds = pc.min_max(flat).as_py()
            tally.ranges[feature.name] = (bounds["min"], bounds["max"])
    return tally


def _lengths(table: pa.Table, column: str) -> dict[int, int]:
    lengths, counts = np.unique(np.diff(one_array(table[column]).offsets.to_numpy()), return_counts=True)
    return dict(zip(lengths.tolist(), counts.tolist(), strict=True))
