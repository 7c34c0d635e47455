"""From steps' outputs to predictions on disk, and from predictions to the table that a run prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from pipeline.data.flat import impressions, item_feature
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.truth import with_truth
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluate.baseline import TrivialBaseline
from pipeline.evaluate.compare import Comparison, compare
from pipeline.evaluate.predictions import Predictions, write_predictions
from pipeline.evaluate.report import lineup
from pipeline.progress import Progress, untold
from pipeline.schema import REQUEST_ID
from pipeline.train import checkpoint
from pipeline.train.sharding import Ranks
from pipeline.train.task import StepOutputs


class PredictionCollector:
    """Predictions of one rank, step by step.

    Args:
        surfaces, tasks: of the model, in its order.
    """

    def __init__(self, surfaces: tuple[str, ...], tasks: tuple[str, ...]) -> None:
        self.surfaces = surfaces
        self.tasks = tasks
        self._parts: list[pl.DataFrame] = []

    def add(self, day: str, outputs: StepOutputs) -> None:
        """Keep a step's predictions in host memory."""
        batch, inputs = outputs.batch, outputs.batch.inputs
        owner = inputs.request_of_candidate.cpu()
        counts = inputs.candidate_counts.cpu()
        first = torch.cumsum(counts, 0) - counts
        rows = sum(inputs.candidates_per_surface)
        columns: dict[str, object] = {
            "surface": pl.Series(
                [s for s, n in zip(self.surfaces, inputs.candidates_per_surface, strict=True) for _ in range(n)],
                dtype=pl.String,
            ),
            "date": pl.Series([day] * rows, dtype=pl.String),
            REQUEST_ID: batch.request_id.cpu()[owner].numpy(),
            "user_id": batch.user_id.cpu()[owner].numpy(),
            "timestamp_ms": batch.timestamp_ms.cpu()[owner].numpy(),
            "candidate": (torch.arange(rows) - first[owner]).int().numpy(),
            "weight": batch.weights.cpu().numpy(),
        }
        labels = torch.where(batch.label_mask, batch.labels, torch.nan).cpu()
        for i, task in enumerate(self.tasks):
            columns[f"label_{task}"] = pl.Series(labels[:, i].numpy()).fill_nan(None)
            columns[f"p_{task}"] = outputs.calibrated[:, i].double().sigmoid().cpu().numpy()
            columns[f"raw_{task}"] = outputs.logits[:, i].double().sigmoid().cpu().numpy()
        self._parts.append(pl.DataFrame(columns))

    def table(self) -> pl.DataFrame | None:
        """All rows so far; None if there are none."""
        return pl.concat(self._parts) if self._parts else None


def gather(collector: PredictionCollector, path: Path, ranks: Ranks, dataset: Dataset) -> Predictions | None:
    """Write all ranks' predictions to one file, in an order that does not depend on the ranks.

    Every rank calls this; the first returns the predictions, with the simulator's truths where there are any.
    """
    part = path.with_suffix(f".rank{ranks.rank}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = collector.table()
    if table is not None:
        table.write_parquet(part)
    ranks.barrier()
    predictions = None
    if ranks.is_first:
        parts = [p for r in range(ranks.world_size) if (p := path.with_suffix(f".rank{r}.parquet")).exists()]
        if not parts:
            raise DataError("the days to score hold no request", file=str(dataset.root))
        whole = pl.concat([pl.read_parquet(p, hive_partitioning=False) for p in parts])
        whole = _ordered(whole, collector.surfaces)
        predictions = write_predictions(path, with_truth(whole, dataset, collector.tasks))
    ranks.barrier()
    part.unlink(missing_ok=True)
    return predictions


def score_days(path: Path, dataset: Dataset, days: tuple[str, ...], progress: Progress = untold) -> Predictions:
    """Predictions of a checkpoint for whole days of a log, in this process alone, on the CPU.

    Args:
        path: of the checkpoint.
        dataset: the log.
        days: which days.
        progress: told of every batch.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a log with other columns.
        DataError: the log has no such day, or no request on it.
    """
    state = checkpoint.read_state(path)
    if state.schema != dataset.schema:
        raise CheckpointError(
            f"{path} was trained on a log of another schema than {dataset.root}; score a log written with the same "
            "spec and vocabularies"
        )
    plan = state.plan
    task = checkpoint.load_task(path)
    task.eval()
    collector = PredictionCollector(state.config.surfaces, state.config.tasks)
    with torch.no_grad():
        for day in days:
            loader = Loader(
                dataset,
                plan.layout,
                replace(state.config.loader, shuffle=False, max_candidates=None),
                days=(day,),
                seed=state.config.seed,
            )
            for done, batch in enumerate(loader.batches(0), 1):
                collector.add(day, task(batch)[1])
                progress(done, loader.steps, f"scoring {day}")
    table = collector.table()
    if table is None:
        raise DataError(f"the days {', '.join(days)} hold no request", file=str(dataset.root))
    return Predictions.of(with_truth(_ordered(table, collector.surfaces), dataset, collector.tasks))


def _ordered(table: pl.DataFrame, surfaces: tuple[str, ...]) -> pl.DataFrame:
    """Rows by surface in the model's order, day, request and candidate."""
    return table.sort(pl.col("surface").cast(pl.Enum(list(surfaces))), "date", REQUEST_ID, "candidate")


def trivial_predictions(predictions: Predictions, dataset: Dataset, training_days: tuple[str, ...]) -> Predictions:
    """The trivial baseline, fit on the training days, for the rows of a model's predictions."""
    item = item_feature(dataset.schema)
    surfaces, tasks = predictions.surfaces, predictions.tasks
    seen = impressions(dataset, surfaces=surfaces, tasks=tasks, days=training_days, item=item)
    items = impressions(dataset, surfaces=surfaces, tasks=tasks, days=predictions.dates, item=item).select(
        "surface", REQUEST_ID, "candidate", item
    )
    rows = predictions.table.join(
        items.collect(), on=["surface", REQUEST_ID, "candidate"], how="left", maintain_order="left"
    )
    return TrivialBaseline(item=item).fit(seen).judge(Predictions(rows))


def judge(
    predictions: Predictions,
    dataset: Dataset,
    training_days: tuple[str, ...],
    *,
    resamples: int,
    others: dict[str, Predictions] | None = None,
) -> Comparison:
    """A model beside the trivial baseline, other runs, and the oracle where the log was simulated."""
    trivial = trivial_predictions(predictions, dataset, training_days)
    return compare(lineup(predictions, trivial=trivial, others=others), resamples=resamples)
