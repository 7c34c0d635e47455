"""The gate of every export: the artifact's scores against the trainer's, on rows that were not trained on.

Bounds by the type of table values:

- fp32: 1e-5 at most. The arithmetic is the same but for the order of sums.
- fp16: rounding is 2^-11 of a value, through a model of moderate gain; 0.005 at most, 0.0005 on average.
- int8: a value is off by up to 1/230 of its row's largest, at random, so that errors mostly cancel in dense layers.
  0.02 at most, which is a shift of 0.08 in the logit where the probability is steepest; 0.002 on average.
- int4: steps are 18 times as wide; ten times the bounds.

A quantised artifact must also keep each task's mean probability to 1 % (int4: 2 %): rare outcomes have probabilities so
small that no absolute bound guards them, and a shifted mean is what an auction would feel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.logs import Dataset
from pipeline.errors import ArtifactError, DataError
from pipeline.evaluate.metrics import TaskMetrics, evaluate
from pipeline.evaluate.predictions import Predictions
from pipeline.schema import REQUEST_ID, TIMESTAMP_MS, USER_ID
from pipeline.serve.tables import TableDtype

_MOST_ROW_GROUPS = 16  # looked at for held-out rows, evenly over the days


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bounds on differences of probabilities.

    Args:
        largest: of any row.
        mean: over rows.
        drift: of the mean probability, relative; None for no bound.
    """

    largest: float
    mean: float
    drift: float | None


TOLERANCES: dict[TableDtype, Tolerance] = {
    "fp32": Tolerance(largest=1e-5, mean=1e-5, drift=None),
    "fp16": Tolerance(largest=5e-3, mean=5e-4, drift=1e-2),
    "int8": Tolerance(largest=2e-2, mean=2e-3, drift=1e-2),
    "int4": Tolerance(largest=2e-1, mean=2e-2, drift=2e-2),
}


def held_out(dataset: Dataset, surface: str, days: tuple[str, ...], candidates: int) -> pa.Table:
    """About that many candidates of a surface, whole requests, from row groups spread evenly over the days.

    Raises:
        DataError: the surface has no request on these days, or a file cannot be read.
    """
    groups = [
        (f.path, g) for p in dataset.partitions(surface, days) for f in p.files for g in range(len(f.row_group_rows))
    ]
    if not groups:
        raise DataError(
            f"surface {surface!r} has no request on {', '.join(days)}; give other days for the parity check",
            file=str(dataset.root),
        )
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), _MOST_ROW_GROUPS)).astype(int))
    parts, share = [], -(-candidates // chosen.size)
    for path, group in (groups[i] for i in chosen):
        try:
            with pq.ParquetFile(dataset.root / path, page_checksum_verification=True) as file:
                table = file.read_row_group(group)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"the file cannot be decoded: {error}", file=path, row_group=group) from error
        counts = np.cumsum(pa.compute.list_value_length(table[dataset.schema.tasks[0]]).to_numpy())
        parts.append(table.slice(0, int(np.searchsorted(counts, share)) + 1))
    return pa.concat_tables(parts)


def compare(tasks: tuple[str, ...], trainer_CT: np.ndarray, artifact_CT: np.ndarray) -> dict[str, dict[str, float]]:
    """Differences by task: largest, mean, and relative drift of the mean probability."""
    found = {}
    for t, task in enumerate(tasks):
        a, b = trainer_CT[:, t].astype(np.float64), artifact_CT[:, t].astype(np.float64)
        found[task] = {
            "largest_difference": float(np.abs(a - b).max(initial=0.0)),
            "mean_difference": float(np.abs(a - b).mean()) if a.size else 0.0,
            "mean_drift": float(b.mean() / a.mean() - 1) if a.size else 0.0,
            "mean_probability": float(a.mean()) if a.size else 0.0,
        }
    return found


def check(differences: dict[str, dict[str, float]], dtype: TableDtype) -> None:
    """Hold differences against the bounds of `dtype`.

    Raises:
        ArtifactError: one is beyond its bound, or is not a number; every such is named.
    """
    bound = TOLERANCES[dtype]
    limits = {"largest_difference": bound.largest, "mean_difference": bound.mean, "mean_drift": bound.drift}
    problems = [
        f"{task}: {name} is {values[name]:.3g}, at most {limit:g} is allowed"
        for task, values in differences.items()
        for name, limit in limits.items()
        if limit is not None and not abs(values[name]) <= limit
    ]
    if problems:
        raise ArtifactError(
            f"the {dtype} artifact disagrees with its trainer:\n  - "
            + "\n  - ".join(problems)
            + "\nNothing was written. A wider type of table values (fp16, fp32) is closer to the trainer"
        )


def judge(table: pa.Table, surface: str, tasks: tuple[str, ...], scores_CT: np.ndarray) -> dict[str, TaskMetrics]:
    """Metrics of scores by task; rows as `held_out` gives them."""
    frame = pl.from_arrow(table.select([REQUEST_ID, USER_ID, TIMESTAMP_MS, *tasks]))
    assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
    frame = frame.filter(pl.col(tasks[0]).list.len() > 0).with_columns(
        candidate=pl.int_ranges(pl.col(tasks[0]).list.len(), dtype=pl.Int32)
    )
    frame = frame.explode("candidate", *tasks).rename({t: f"label_{t}" for t in tasks})
    frame = frame.with_columns(
        *(pl.Series(f"p_{t}", scores_CT[:, i].astype(np.float64)) for i, t in enumerate(tasks)),
        surface=pl.lit(surface),
        date=pl.from_epoch(TIMESTAMP_MS, time_unit="ms").dt.date().cast(pl.String),
        weight=pl.lit(1.0, dtype=pl.Float32),
    )
    return dict(evaluate(Predictions.of(frame))[surface])


def report(
    *,
    dtype: TableDtype,
    source: dict[str, object],
    differences: dict[str, dict[str, float]],
    trainer: dict[str, TaskMetrics] | None,
    artifact: dict[str, TaskMetrics] | None,
) -> dict[str, object]:
    """Content of `parity.json`."""
    tasks = {
        task: {
            **values,
            **{
                f"auc_{who}": metrics[task]["auc"]
                for who, metrics in (("trainer", trainer), ("artifact", artifact))
                if metrics is not None
            },
        }
        for task, values in differences.items()
    }
    return {"passed": True, "dtype": dtype, "tolerance": asdict(TOLERANCES[dtype]), "rows": source, "tasks": tasks}
