"""Scores of the validation and test days, beside the baselines: on the console, in files and in MLflow."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from pipeline.evaluate import figures
from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.predictions import Predictions
from pipeline.evaluate.report import MODEL, as_dict, print_report
from pipeline.tracking import Tracker, metric_name
from pipeline.train.judge import PredictionCollector, gather, judge
from pipeline.train.trainer import Trainer

METRICS = "metrics.json"


def judge_days(trainer: Trainer, folder: Path, console: Console, tracker: Tracker) -> Comparison | None:
    """Score validation and test days on all ranks; the first compares and reports."""
    comparison = None
    for split, days in (("val", trainer.days.validation), ("test", trainer.days.test)):
        if not days:
            continue
        collector = PredictionCollector(trainer.config.surfaces, trainer.config.tasks)
        trainer.predict(days, collector.add)
        if trainer.stopped:
            return None
        predictions = gather(collector, folder / "predictions" / f"{split}.parquet", trainer.ranks, trainer.dataset)
        if predictions is not None:
            comparison = _report(trainer, split, predictions, folder, console, tracker)
    return comparison


def metrics_of(comparison: Comparison, *, split: str) -> dict[str, float]:
    """What MLflow keeps of the model's scores: every metric that has a value, by its name there.

    The mean of the AUC over several surfaces stands as that of surface `macro`, as reports call it.
    """
    scores = comparison.scores[MODEL]
    found = {
        (surface, task, metric): estimate.value
        for surface, tasks in scores.items()
        for task, score in tasks.items()
        for metric, estimate in score.estimates.items()
    }
    if len(scores) > 1:
        found |= {("macro", task, "auc"): estimate.value for task, estimate in comparison.macro_auc[MODEL].items()}
    return {metric_name(*name, split=split): value for name, value in found.items() if value is not None}


def _report(
    trainer: Trainer, split: str, predictions: Predictions, folder: Path, console: Console, tracker: Tracker
) -> Comparison:
    resamples = trainer.config.bootstrap_resamples
    comparison = judge(predictions, trainer.dataset, trainer.days.train, resamples=resamples)
    tracker.log_metrics(metrics_of(comparison, split=split), step=trainer.total_steps)
    path = folder / f"{split}_{METRICS}"
    path.write_text(json.dumps({"days": predictions.dates, **as_dict(comparison)}, indent=1) + "\n")
    tracker.log_artifact(path)
    for task in trainer.config.tasks:
        tracker.log_figure(figures.reliability({MODEL: predictions}, task=task), f"{split}_{task}_reliability.png")
        roc = figures.roc({MODEL: predictions}, task=task, resamples=resamples)
        tracker.log_figure(roc, f"{split}_{task}_roc.png")
    if split == "test":
        console.print(f"\nTest days {', '.join(predictions.dates)}:")
        print_report(comparison, console=console)
    return comparison
