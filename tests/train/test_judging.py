"""MLflow keeps the numbers that the report prints."""

from __future__ import annotations

import pytest

from pipeline.evaluate.compare import compare
from pipeline.job.judging import metrics_of
from tests.evaluate.rows import simulated


def test_mlflow_keeps_every_number_of_the_report_and_the_mean_over_surfaces() -> None:
    predictions = simulated(seed=1)
    comparison = compare({"model": predictions}, resamples=0)
    kept = metrics_of(comparison, split="test")
    scores = comparison.scores["model"]
    for surface, tasks in scores.items():
        for metric, estimate in tasks["click"].estimates.items():
            assert kept[f"test/{surface}/click/{metric}"] == estimate.value
    areas = [kept[f"test/{surface}/click/auc"] for surface in scores]
    assert len(areas) > 1
    assert kept["test/macro/click/auc"] == pytest.approx(sum(areas) / len(areas))
    # On one surface there is nothing to take a mean over.
    alone = compare({"model": predictions.select(surfaces=["hf"])}, resamples=0)
    assert not [name for name in metrics_of(alone, split="test") if "macro" in name]
