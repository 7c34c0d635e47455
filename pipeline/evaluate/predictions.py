"""What a model said of each candidate, beside what happened: the file between scoring and judging.

One row is one candidate. Columns: `surface`, `date` (strings), `request_id`, `user_id`, `timestamp_ms`
(int64), `candidate` (int32, index within the request), `weight` (float32); for each task `label_<task>`
(float32 in [0, 1], null = not observed) and `p_<task>` (float64, calibrated probability), and optionally
`raw_<task>` (before calibration) and `truth_<task>` (the true probability, from a simulator). Further
columns are carried along and not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.errors import DataError, unknown
from pipeline.schema import REQUEST_ID, TIMESTAMP_MS, USER_ID, WEIGHT

SURFACE, DATE, CANDIDATE = "surface", "date", "candidate"
KEY = (SURFACE, REQUEST_ID, CANDIDATE)  # what makes a row unique
BASE_COLUMNS = {
    SURFACE: pl.String(),
    DATE: pl.String(),
    REQUEST_ID: pl.Int64(),
    USER_ID: pl.Int64(),
    TIMESTAMP_MS: pl.Int64(),
    CANDIDATE: pl.Int32(),
    WEIGHT: pl.Float32(),
}
_LABEL, _P, _RAW, _TRUTH = "label_", "p_", "raw_", "truth_"
_VALUES = {_LABEL: pl.Float32(), _P: pl.Float64(), _RAW: pl.Float64(), _TRUTH: pl.Float64()}


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The rows of one surface whose outcome of one task was observed. N rows, all arrays [N].

    Args:
        label: float64 in [0, 1].
        p: float64, the probability under judgement.
        weight: float64, not negative.
        user_id: int64.
    """

    label: np.ndarray
    p: np.ndarray
    weight: np.ndarray
    user_id: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """A validated table of predictions, rows in the order of the file.

    Build it with `Predictions.of` or `read_predictions`, which check and cast.
    """

    table: pl.DataFrame

    @classmethod
    def of(cls, table: pl.DataFrame, *, file: str | None = None) -> Predictions:
        """Check a table and cast its columns to the dtypes of the module's docstring.

        A NaN label is an error: write null for an outcome that was not observed.

        Raises:
            DataError: a column is missing or of another kind, a value is out of range, or two rows are
                the same candidate; names `file` and the column.
        """
        return cls(_check_keys(_check_values(_cast(table, file), file), file))

    @classmethod
    def concat(cls, parts: Iterable[Predictions]) -> Predictions:
        """One set of several: of models that each serve one surface, or of the days of a backtest.

        Columns that some part lacks are dropped.

        Raises:
            DataError: there is no part, or two parts predict the same candidate.
        """
        tables = [part.table for part in parts]
        if not tables:
            raise DataError("no predictions to put together; give at least one set")
        shared = [name for name in tables[0].columns if all(name in t.columns for t in tables)]
        return cls.of(pl.concat([t.select(shared) for t in tables]))

    def __len__(self) -> int:
        return self.table.height

    @cached_property
    def surfaces(self) -> tuple[str, ...]:
        """Surfaces in order of first appearance."""
        return tuple(self.table[SURFACE].unique(maintain_order=True).to_list())

    @cached_property
    def dates(self) -> tuple[str, ...]:
        """Dates, sorted."""
        return tuple(self.table[DATE].unique().sort().to_list())

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in order of their columns."""
        return _tasks(self.table)

    def has(self, which: str) -> bool:
        """Whether every task has a `which` ("raw" or "truth") column."""
        return all(f"{which}_{task}" in self.table.columns for task in self.tasks)

    def using(self, which: str) -> Predictions:
        """The same rows with `raw` or `truth` as the probability under judgement.

        `using("truth")` is the oracle of simulated logs: no model does better, but for luck.

        Raises:
            DataError: these predictions hold no such column.
        """
        if which not in ("raw", "truth"):
            raise DataError(unknown("kind of probability", which, ["raw", "truth"]))
        for task in self.tasks:
            if f"{which}_{task}" not in self.table.columns:
                raise DataError(f"no {which} probability was written for task {task!r}", column=f"{which}_{task}")
        return Predictions(self.table.with_columns(pl.col(f"{which}_{t}").alias(_P + t) for t in self.tasks))

    def select(self, *, surfaces: Sequence[str] | None = None, dates: Sequence[str] | None = None) -> Predictions:
        """Only the rows of the given surfaces and dates.

        Raises:
            DataError: a surface or date has no rows here.
        """
        table = self.table
        for column, wanted, known in ((SURFACE, surfaces, self.surfaces), (DATE, dates, self.dates)):
            if wanted is None:
                continue
            for name in wanted:
                if name not in known:
                    raise DataError(unknown(column, name, known), column=column)
            table = table.filter(pl.col(column).is_in(list(wanted)))
        return Predictions(table)

    def rows(self, surface: str, task: str, *, date: str | None = None) -> TaskRows:
        """Numpy columns of the rows of `surface` (and `date`) whose `task` was observed.

        Raises:
            DataError: there is no such task.
        """
        if task not in self.tasks:
            raise DataError(unknown("task", task, self.tasks))
        keep = (pl.col(SURFACE) == surface) & pl.col(_LABEL + task).is_not_null()
        if date is not None:
            keep &= pl.col(DATE) == date
        part = self.table.filter(keep)
        return TaskRows(
            label=part[_LABEL + task].cast(pl.Float64).to_numpy(),
            p=part[_P + task].to_numpy(),
            weight=part[WEIGHT].cast(pl.Float64).to_numpy(),
            user_id=part[USER_ID].to_numpy(),
        )


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read and check a predictions file.

    Raises:
        DataError: the file is missing or no Parquet, or its content breaks the contract of this module.
    """
    file = str(path)
    if not Path(file).is_file():
        raise DataError("there is no such predictions file; write one with `trefoil evaluate`", file=file)
    try:
        table = pl.read_parquet(file, hive_partitioning=False)
    except (pl.exceptions.PolarsError, OSError) as cause:
        raise DataError(f"this is no whole Parquet file: {cause}", file=file) from cause
    return Predictions.of(table, file=file)


def write_predictions(path: str | os.PathLike[str], predictions: Predictions | pl.DataFrame) -> Predictions:
    """Check predictions and write them; a reader sees the whole file or none. Returns what was written.

    Raises:
        DataError: the table breaks the contract of this module; nothing is written.
    """
    target = Path(path)
    checked = predictions if isinstance(predictions, Predictions) else Predictions.of(predictions)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        checked.table.write_parquet(beside, compression="zstd")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return checked


def _tasks(table: pl.DataFrame) -> tuple[str, ...]:
    return tuple(name.removeprefix(_P) for name in table.columns if name.startswith(_P))


def _cast(table: pl.DataFrame, file: str | None) -> pl.DataFrame:
    tasks = _tasks(table)
    if not tasks:
        raise DataError("no column p_<task> holds a probability; there is nothing to judge", file=file)
    wanted: dict[str, pl.DataType] = dict(BASE_COLUMNS)
    for task in tasks:
        wanted |= {_LABEL + task: _VALUES[_LABEL], _P + task: _VALUES[_P]}
        wanted |= {k + task: _VALUES[k] for k in (_RAW, _TRUTH) if k + task in table.columns}
    for name in table.columns:
        if name.startswith(_LABEL) and name.removeprefix(_LABEL) not in tasks:
            raise DataError(
                f"a label without its probability; add {_P}{name.removeprefix(_LABEL)}", file=file, column=name
            )
    casts = []
    for name, dtype in wanted.items():
        if name not in table.columns:
            raise DataError(f"the column is missing; predictions need {', '.join(wanted)}", file=file, column=name)
        have = table.schema[name]
        text = (pl.String, pl.Categorical, pl.Enum)
        fits = have in text if dtype == pl.String else have.is_integer() or (dtype.is_float() and have.is_float())
        if not fits and have != pl.Null:
            raise DataError(f"the column holds {have}, not {dtype}", file=file, column=name)
        casts.append(pl.col(name).cast(dtype, strict=False))
    cast = table.with_columns(casts)
    for name, dtype in wanted.items():
        lost = cast[name].null_count() - table[name].null_count()
        if lost:
            raise DataError(f"{lost} values do not fit into {dtype}", file=file, column=name)
    return cast


def _check_values(table: pl.DataFrame, file: str | None) -> pl.DataFrame:
    rules: list[tuple[str, pl.Expr, str]] = [(name, pl.col(name).is_null(), "are null") for name in BASE_COLUMNS]
    weight = pl.col(WEIGHT)
    rules.append((WEIGHT, ~weight.is_finite() | (weight < 0), "are not a finite number >= 0"))
    for task in _tasks(table):
        for prefix in _VALUES:
            name = prefix + task
            if name not in table.columns:
                continue
            if prefix != _LABEL:
                rules.append((name, pl.col(name).is_null(), "are null"))
            # NaN compares false with `is_between`, so it is caught here too.
            rules.append((name, pl.col(name).is_nan() | ~pl.col(name).is_between(0, 1), "lie outside [0, 1]"))
    bad = table.select(rule.fill_null(False).sum().alias(str(i)) for i, (_, rule, _) in enumerate(rules)).row(0)
    for count, (name, _, what) in zip(bad, rules, strict=True):
        if count:
            raise DataError(f"{count} of {table.height} values {what}", file=file, column=name)
    return table


def _check_keys(table: pl.DataFrame, file: str | None) -> pl.DataFrame:
    repeated = table.height - table.select(pl.struct(KEY).n_unique()).item() if table.height else 0
    if repeated:
        raise DataError(
            f"{repeated} of {table.height} rows repeat a candidate; each ({', '.join(KEY)}) may stand once",
            file=file,
            column=CANDIDATE,
        )
    return table
