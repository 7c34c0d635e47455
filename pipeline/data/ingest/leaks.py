"""Whether features know what only the future knows, found by changing the future."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from pipeline.data.ingest.load import load_spec
from pipeline.data.ingest.run import ingest
from pipeline.data.ingest.spec import TurnedSpec
from pipeline.data.logs import Dataset
from pipeline.errors import ConfigError, DataError
from pipeline.schema import REQUEST_ID, TIMESTAMP_MS, USER_ID


def find_leaks(
    spec: str | Path, params: Mapping[str, str] | None = None, *, at: int, memory_gb: float = 4.0, jobs: int = 1
) -> dict[str, int]:
    """Columns that change for requests up to a time when the outcomes they cannot know change.

    Ingests twice, the second time with every outcome turned round that is not known at `at` under the label delay,
    and compares all that is there of requests at or before `at`, but for their labels. Needs the time and, in a
    temporary folder, the disk of two ingests.

    Args:
        spec, params, memory_gb, jobs: as for `ingest`.
        at: milliseconds since 1970; best in the middle of the log.

    Returns:
        Requests in which each leaking column differs, by the name of the column. Empty: none leaks.

    Raises:
        ConfigError, DataError: as `ingest` does; or no request lies at or before `at`.
    """
    loaded = load_spec(spec, params)
    turned = TurnedSpec.model_construct(**dict(loaded), turned_from_ms=at - loaded.delay_ms)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            ingest(how, Path(folder) / name, memory_gb=memory_gb, jobs=jobs)
            for name, how in (("as it is", loaded), ("turned", turned))
        )
        changed: dict[str, int] = {}
        compared = 0
        for surface in first.schema.surfaces:
            for partition in first.partitions(surface):
                one, other = (_rows(log, surface, partition.date, at) for log in (first, second))
                compared += one.height
                for name in one.columns:
                    if unlike := int(one[name].ne_missing(other[name]).sum()):
                        changed[name] = changed.get(name, 0) + unlike
    if not compared:
        raise ConfigError(f"no request lies at or before {at} ms since 1970; choose a time within the log")
    return changed


def refuse_leaks(
    spec: str | Path, params: Mapping[str, str] | None = None, *, at: int, memory_gb: float = 4.0, jobs: int = 1
) -> None:
    """Raise where `find_leaks` finds one.

    Raises:
        ConfigError: as `find_leaks`.
        DataError: as `find_leaks`; or a column leaks.
    """
    if changed := find_leaks(spec, params, at=at, memory_gb=memory_gb, jobs=jobs):
        told = ", ".join(f"{name} (in {n} requests)" for name, n in sorted(changed.items(), key=lambda x: -x[1])[:5])
        raise DataError(
            f"{len(changed)} columns know outcomes that are not known at their request less the label delay: {told}; "
            "no model of this log can be trusted. Please report this as a defect of ingest",
            column=next(iter(changed)),
        )


def _rows(log: Dataset, surface: str, day: str, at: int) -> pl.DataFrame:
    """Requests of a surface and day up to a time without their labels, in an order that labels do not change."""
    files = [log.root / f.path for p in log.partitions(surface, (day,)) for f in p.files]
    rows = pl.read_parquet(files, hive_partitioning=False).filter(pl.col(TIMESTAMP_MS) <= at)
    return rows.sort(TIMESTAMP_MS, USER_ID, REQUEST_ID).drop(*log.schema.tasks)
