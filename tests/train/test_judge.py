"""Predictions name the right candidates, labels and truths, whatever the batches were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.config import LoaderConfig
from pipeline.data.flat import impressions, item_feature
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.data.truth import read_truth, with_truth
from pipeline.errors import SchemaError
from pipeline.train.judge import PredictionCollector, trivial_predictions
from pipeline.train.task import StepOutputs
from tests.data.logs import DAYS, SURFACES, schema, write_log
from tests.train.runs import tiny_config
from tests.train.test_build import MOMENTS, model_plan


def collected(dataset: Dataset, days: tuple[str, ...]) -> pl.DataFrame:
    """Predictions whose logit says which item and user the row is about."""
    plan = model_plan(tiny_config(), dataset.schema, dict.fromkeys(MOMENTS, (0.0, 1.0)))
    collector = PredictionCollector(SURFACES, ("click", "save"))
    for day in days:
        loader = Loader(dataset, plan.layout, LoaderConfig(requests_per_batch=7), days=(day,), seed=0)
        for batch in loader.batches(0):
            item = batch.inputs.sequence_ids["item"].values().float()
            logits = torch.stack([item / 10, -item / 10], dim=1)
            collector.add(day, StepOutputs(batch, torch.zeros(4), logits, logits))
    table = collector.table()
    assert table is not None
    return table


def test_each_row_is_its_candidate(tmp_path: Path) -> None:
    dataset, rows = write_log(tmp_path / "data", {"hf": 20, "sr": 12, "rp": 5})
    table = collected(dataset, DAYS)
    assert table.height == sum(len(row["item"]) for row in rows.values())
    for found in table.iter_rows(named=True):
        row: dict[str, Any] = rows[found["surface"], found["request_id"]]
        i = found["candidate"]
        assert found["user_id"] == row["user_id"]
        assert found["timestamp_ms"] == row["timestamp_ms"]
        assert found["label_click"] == row["click"][i]
        assert found["label_save"] == row["save"][i]
        assert found["p_click"] == pytest.approx(1 / (1 + np.exp(-row["item"][i] / 10)))
        assert found["raw_save"] == pytest.approx(1 / (1 + np.exp(row["item"][i] / 10)))


def test_impressions_are_the_rows_of_the_log(tmp_path: Path) -> None:
    dataset, rows = write_log(tmp_path / "data", {"hf": 9, "rp": 4}, weighted=True)
    flat = impressions(dataset, surfaces=("hf", "rp"), tasks=("click", "save"), days=DAYS, item="item").collect()
    found = {
        (r["surface"], r["request_id"], r["candidate"]): (r["item"], r["label_click"], r["label_save"], r["user_id"])
        for r in flat.iter_rows(named=True)
    }
    assert found == {
        (s, n, i): (row["item"][i], row["click"][i], row["save"][i], row["user_id"])
        for (s, n), row in rows.items()
        for i in range(len(row["item"]))
    }


def test_the_item_is_the_candidates_feature_of_the_historys_vocabulary() -> None:
    assert item_feature(schema()) == "item"
    bare = schema()
    only_numbers = tuple(f for f in bare.features if f.name in ("user", "price"))
    with pytest.raises(SchemaError, match="could name the item"):
        item_feature(
            type(bare)(surfaces=bare.surfaces, tasks=bare.tasks, vocabularies=bare.vocabularies, features=only_numbers)
        )


def test_truths_join_on_the_candidate(tmp_path: Path) -> None:
    dataset = simulate(tmp_path / "data", SimulationConfig.tiny())
    day = dataset.days[-1]
    flat = impressions(dataset, surfaces=("rp",), tasks=("click",), days=(day,), item="item").collect()
    table = with_truth(flat.sample(fraction=1, shuffle=True, seed=0), dataset, ("click",))
    truth = read_truth(dataset, "rp", (day,)).to_pylist()
    wanted = {(r["request_id"], i): p for r in truth for i, p in enumerate(r["click"])}
    assert table.height == len(wanted)
    for row in table.iter_rows(named=True):
        assert row["truth_click"] == pytest.approx(wanted[row["request_id"], row["candidate"]])


def test_the_trivial_baseline_sees_training_days_only(tmp_path: Path) -> None:
    from pipeline.evaluate.predictions import Predictions

    dataset, rows = write_log(tmp_path / "data", {"hf": 60, "sr": 20, "rp": 8})
    predictions = Predictions.of(collected(dataset, DAYS[1:]))
    trivial = trivial_predictions(predictions, dataset, DAYS[:1])
    training = [row for (s, n), row in rows.items() if s == "hf" and n < 40]
    labels = [label for row in training for label in row["click"]]
    base = sum(labels) / len(labels)

    def lift(chosen: list[float]) -> float:
        return (sum(chosen) + 20 * base) / ((len(chosen) + 20) * base)

    for row in trivial.table.filter(pl.col("surface") == "hf").iter_rows(named=True):
        shown = rows["hf", row["request_id"]]
        item = shown["item"][row["candidate"]]
        of_item = [label for r in training for i, label in zip(r["item"], r["click"], strict=True) if i == item]
        of_user = [label for r in training if r["user_id"] == shown["user_id"] for label in r["click"]]
        assert row["p_click"] == pytest.approx(base * lift(of_item) * lift(of_user), abs=1e-6)
