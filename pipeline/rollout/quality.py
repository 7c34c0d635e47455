"""How good artifacts are on the evaluation days, as served: scores, differences to the champion, calibration by slice.

Letters: N rows, U users, K slices, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.flat import impressions, item_feature
from pipeline.data.logs import Dataset
from pipeline.evaluate.bootstrap import Estimate, UserBootstrap, estimate
from pipeline.evaluate.compare import compare
from pipeline.evaluate.metrics import decile_of
from pipeline.evaluate.predictions import CANDIDATE, DATE, SURFACE, Predictions
from pipeline.rollout.measurements import Interval, Slice, TaskMeasurements
from pipeline.schema import REQUEST_ID, TIMESTAMP_MS, USER_ID, WEIGHT
from pipeline.serve.scorer import Scorer

NEW_USER, NEW_AD = "new_user", "new_ad"
CHAMPION, CHALLENGER = "champion", "challenger"


def score_days(
    scorer: Scorer,
    dataset: Dataset,
    days: tuple[str, ...],
    *,
    alter: Callable[[pa.Table], pa.Table] | None = None,
) -> Predictions:
    """What an artifact says of every candidate of its surface on these days, with the item's id beside it.

    Args:
        scorer: of the surface.
        dataset: the log.
        days: to score.
        alter: what becomes of rows on their way to the scorer; labels are taken from the rows as they are.
    """
    signature = scorer.signature
    surface, tasks, schema = signature.surface, signature.tasks, dataset.schema
    item = item_feature(schema)
    lists = list(dict.fromkeys([item, *tasks, *([WEIGHT] if schema.weighted else [])]))
    parts = []
    for partition in dataset.partitions(surface, days):
        for file in partition.files:
            with pq.ParquetFile(dataset.root / file.path, page_checksum_verification=True) as opened:
                for group in range(opened.num_row_groups):
                    rows = opened.read_row_group(group)
                    scores = scorer.score_frame(rows if alter is None else alter(rows)).rename(
                        {t: f"p_{t}" for t in tasks}
                    )
                    keys = pl.DataFrame(pl.from_arrow(rows.select([REQUEST_ID, USER_ID, TIMESTAMP_MS, *lists])))
                    parts.append(keys.hstack(scores).with_columns(pl.lit(partition.date).alias(DATE)))
    grouped = pl.concat(parts).with_columns(
        pl.int_ranges(0, pl.col(tasks[0]).list.len().cast(pl.Int64), dtype=pl.Int32).alias(CANDIDATE)
    )
    flat = grouped.explode([*lists, *(f"p_{t}" for t in tasks), CANDIDATE], empty_as_null=False).with_columns(
        pl.lit(surface).alias(SURFACE), *([] if schema.weighted else [pl.lit(1.0, pl.Float32).alias(WEIGHT)])
    )
    return Predictions.of(flat.rename({t: f"label_{t}" for t in tasks} | {item: "item"}))


def with_items(predictions: Predictions, dataset: Dataset) -> Predictions:
    """The rows of a trainer's predictions with the item's id beside them, as `mark_new` wants it."""
    item = item_feature(dataset.schema)
    keys = [SURFACE, REQUEST_ID, CANDIDATE]
    rows = impressions(
        dataset,
        surfaces=predictions.surfaces,
        tasks=predictions.tasks[:1],
        days=predictions.dates,
        item=item,
    ).select(*keys, pl.col(item).alias("item"))
    return Predictions(predictions.table.join(rows.collect(), on=keys, how="left", maintain_order="left"))


def mark_new(predictions: Predictions, dataset: Dataset, training_days: tuple[str, ...]) -> Predictions:
    """The rows of one surface with `new_user` and `new_ad`: not seen on any surface in training."""
    schema = dataset.schema
    item = item_feature(schema)
    seen = impressions(dataset, surfaces=schema.surfaces, tasks=schema.tasks[:1], days=training_days, item=item)
    users, items = pl.collect_all(
        [seen.select(USER_ID).unique(), seen.select(pl.col(item).alias("item")).unique()], engine="streaming"
    )
    table = predictions.table.with_columns(
        (~pl.col(USER_ID).is_in(users[USER_ID].implode())).alias(NEW_USER),
        (~pl.col("item").is_in(items["item"].implode())).alias(NEW_AD),
    )
    return Predictions(table)


def task_measurements(
    challenger: Predictions, champion: Predictions, tasks: Sequence[str], *, resamples: int, seed: int = 0
) -> dict[str, TaskMeasurements]:
    """Measurements of each task on one surface, but for tasks that one of the two does not predict.

    Args:
        challenger: rows of one surface, from `mark_new`.
        champion: the same rows, scored by the champion.
        tasks: to measure.
        resamples: of users behind each interval.
        seed: of the resamples.
    """
    (surface,) = challenger.surfaces
    both = [t for t in tasks if t in challenger.tasks and t in champion.tasks]
    found = compare({CHAMPION: champion, CHALLENGER: challenger}, resamples=resamples, seed=seed)
    measured = {}
    for task in both:
        own = found.scores[CHALLENGER][surface][task]
        difference = found.differences[CHALLENGER][surface][task]
        measured[task] = TaskMeasurements(
            auc=interval(own["auc"]),
            ne=interval(own["ne"]),
            auc_difference=interval(difference["auc"]),
            ne_difference=interval(difference["ne"]),
            calibration=interval(own["calibration"]),
            slices=calibration_slices(challenger, task, resamples=resamples, seed=seed),
        )
    return measured


def calibration_slices(
    predictions: Predictions, task: str, *, resamples: int, seed: int = 0
) -> dict[str, dict[str, Slice]]:
    """Calibration of the parts of one surface's rows, with intervals over users.

    Parts: score deciles (their edges do not move with resamples), new and known users and ads, days.
    """
    table = predictions.table.filter(pl.col(f"label_{task}").is_not_null())
    p = table[f"p_{task}"].to_numpy()
    weight = table[WEIGHT].cast(pl.Float64).to_numpy()
    label = table[f"label_{task}"].cast(pl.Float64).to_numpy()
    parts: dict[str, np.ndarray] = {
        "decile": np.array([f"{d + 1:02d}" for d in decile_of(p, weight)]),
        "users": np.where(table[NEW_USER].to_numpy(), "new", "known"),
        "ads": np.where(table[NEW_AD].to_numpy(), "new", "known"),
        "day": table[DATE].to_numpy().astype(str),
    }
    users, row_user = np.unique(table[USER_ID].to_numpy(), return_inverse=True)
    bootstrap = UserBootstrap(users, resamples=resamples, seed=seed)
    columns: list[np.ndarray] = []
    places: list[tuple[str, str, np.ndarray]] = []
    for kind, of_row in parts.items():
        for name in np.unique(of_row):
            mask = (of_row == name).astype(np.float64)
            places.append((kind, str(name), mask))
            for values in (p, label):
                columns.append(np.bincount(row_user, weights=mask * weight * values, minlength=users.size))
    if not columns:
        return {}
    sums_UK = np.stack(columns, axis=1)
    totals = np.concatenate([counts @ sums_UK for counts in bootstrap.counts(sums_UK.shape[0])])
    found: dict[str, dict[str, Slice]] = {}
    for k, (kind, name, mask) in enumerate(places):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = totals[:, 2 * k] / totals[:, 2 * k + 1]
        positives = int((mask * (label > 0.5)).sum())
        found.setdefault(kind, {})[name] = Slice(
            positives=positives,
            rows=int(mask.sum()),
            calibration=interval(estimate(np.where(np.isfinite(ratio), ratio, np.nan))) if positives else None,
        )
    return found


def differences(
    runs: Mapping[str, Predictions], *, reference: str, resamples: int, seed: int = 0
) -> dict[str, dict[str, dict[str, Interval]]]:
    """Surface -> task -> metric -> difference of the other run to the reference, where both predict the task."""
    (other,) = [name for name in runs if name != reference]
    found = compare(runs, reference=reference, resamples=resamples, seed=seed).differences[other]
    return {
        surface: {task: {m: interval(of[m]) for m in ("auc", "ne")} for task, of in tasks.items()}
        for surface, tasks in found.items()
    }


def interval(of: Estimate) -> Interval:
    """An estimate as the gates take it."""
    return Interval(value=of.value, low=of.low, high=of.high)
