"""Attention by age and norms of rows, against loops over a tiny model's batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config import HistoryConfig, LoaderConfig
from pipeline.data.batch import Batch
from pipeline.data.flat import seen_users
from pipeline.data.loader import Loader
from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.errors import ConfigError
from pipeline.schema import Kind
from pipeline.train.build import build_task
from pipeline.train.history_use import AGES, OLDER, attention_by_age
from pipeline.train.model_plan import ModelPlan, model_plan
from pipeline.train.table_use import expected_sharing, lookups, row_norms, shared_rows
from pipeline.train.task import TrainTask
from tests.train.runs import tiny_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate(tmp_path_factory.mktemp("logs") / "data", SimulationConfig.tiny())


def made(dataset: Dataset, kind: str = "attention") -> tuple[ModelPlan, TrainTask, list[Batch]]:
    model = replace(tiny_config().model, history=HistoryConfig(kind=kind, width=8, heads=2))  # type: ignore[arg-type]
    moments = {f.name: (0.0, 1.0) for f in dataset.schema.select(kind=Kind.NUMERIC)}
    plan = model_plan(tiny_config(model=model), dataset.schema, moments)
    torch.manual_seed(0)
    task = build_task(plan, table_device=torch.device("cpu"))
    loader = Loader(dataset, plan.layout, LoaderConfig(requests_per_batch=60), days=None, seed=0)
    return plan, task, list(loader.batches(0))[:2]


def ages_of(batch: Batch) -> list[list[float]]:
    """Ages of the events of each candidate's request."""
    lengths = batch.inputs.sequence_ids["history_item"].lengths()
    rows = [part.tolist() for part in torch.split(batch.inputs.history_age, lengths.tolist())]
    return [rows[r] for r in batch.inputs.request_of_candidate.tolist()]


def test_equal_attention_lifts_no_age(dataset: Dataset) -> None:
    _, task, batches = made(dataset)
    with torch.no_grad():
        task.model.body.history.reader.key_value.weight[:8].zero_()
    found = attention_by_age(task, batches, resamples=20)
    assert list(found) == ["hf", "sr", "rp"]
    first = [ages for b in batches for ages in ages_of(b)[: b.inputs.candidates_per_surface[0]] if ages]
    hf = found["hf"]
    assert hf.candidates == len(first)
    # All scores are 0, that of the empty slot too: each of n events gets 1 / (n + 1).
    assert hf.nothing.value == pytest.approx(np.mean([1 / (len(ages) + 1) for ages in first]), rel=1e-5)
    edges = [0.0, *AGES.values(), math.inf]
    for (name, use), low, high in zip(hf.ages.items(), edges, edges[1:], strict=False):
        shares = [sum(low < a <= high for a in ages) / len(ages) for ages in first]
        assert use.events == pytest.approx(np.mean(shares), abs=1e-6), name
        if use.lift.value is not None:
            assert use.lift.value == pytest.approx(1.0, abs=1e-5)
            assert (use.lift.low, use.lift.high) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert sum(use.events for use in hf.ages.values()) == pytest.approx(1.0)
    assert sum(use.attention for use in hf.ages.values()) == pytest.approx(1.0)
    assert list(hf.ages)[-1] == OLDER
    assert not task.model.body.history.reader._forward_pre_hooks


@pytest.mark.parametrize("kind", ["attention", "transformer", "target"])
def test_attention_of_an_untrained_model_adds_up(dataset: Dataset, kind: str) -> None:
    _, task, batches = made(dataset, kind)
    for use in attention_by_age(task, batches, resamples=20).values():
        assert sum(of.attention for of in use.ages.values()) == pytest.approx(1.0)
        assert (use.nothing.value == 0) is (kind == "target")


@pytest.mark.parametrize("kind", ["none", "mean", "din"])
def test_a_model_that_shares_no_attention_is_refused(dataset: Dataset, kind: str) -> None:
    _, task, batches = made(dataset, kind)
    with pytest.raises(ConfigError, match=r"set model\.history\.kind to transformer, attention or target"):
        attention_by_age(task, batches)


def test_lookups_and_norms(dataset: Dataset) -> None:
    plan, task, batches = made(dataset)
    sizes = {v.name: v.size for v in dataset.schema.vocabularies}
    counts = lookups(plan.layout, sizes, batches)
    want = torch.cat([b.inputs.request_ids["country"].values() for b in batches]).bincount(minlength=sizes["country"])
    np.testing.assert_array_equal(counts["country"], want.numpy())
    items = ("history_item", "related_item", "item")
    want = torch.cat([b.inputs.sequence_ids[f].values() for b in batches for f in items])
    np.testing.assert_array_equal(counts["item"], want.bincount(minlength=sizes["item"]).numpy())
    counts["item"][:] = 0
    counts["item"][1:8] = [1, 2, 3, 4, 7, 8, 8]
    weight = task.model.embeddings.sequences.embeddings["item"].weight
    with torch.no_grad():
        weight.zero_()
        weight[:, 0] = torch.arange(len(weight))
    found = row_norms(task, counts)["item"]
    assert [(n.seen, n.rows) for n in found] == [("0", len(weight) - 7), ("1", 1), ("2+", 2), ("4+", 2), ("8+", 2)]
    assert [n.median for n in found[1:]] == [1.0, 2.5, 4.5, 6.5]
    assert (found[2].low, found[2].high) == pytest.approx((2.1, 2.9))


def test_expected_sharing_is_what_an_even_hash_costs() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 1001, size=(200, 500))
    shared = [
        np.isin(r, [i for i, n in zip(*np.unique(r, return_counts=True), strict=True) if n > 1]).mean() for r in rows
    ]
    assert expected_sharing(keys=500, rows=1001) == pytest.approx(np.mean(shared), abs=0.01)
    assert expected_sharing(keys=1, rows=10) == 0.0


def test_shared_rows_come_from_the_ingests_own_count(dataset: Dataset) -> None:
    assert shared_rows(dataset) == {}
    counted = {"hash_collisions": {"brand": {"size": 3, "keys": 2, "colliding_share": 1.0}}}
    hashed = replace(dataset, description=replace(dataset.description, provenance=counted))
    found = shared_rows(hashed)["brand"]
    assert (found.rows, found.keys, found.share, found.expected) == (3, 2, 1.0, 0.5)


def test_users_that_training_saw(dataset: Dataset) -> None:
    first, second, last = dataset.days
    seen = seen_users(dataset, surfaces=("hf", "rp"), training={last: (first, second)})
    assert set(seen) == {(last, "hf"), (last, "rp")}
    loader = Loader(
        dataset, made(dataset)[0].layout, LoaderConfig(requests_per_batch=500), days=(first, second), seed=0
    )
    (batch,) = loader.batches(0)
    assert seen[last, "hf"] == set(batch.user_id[: batch.inputs.requests_per_surface[0]].tolist())
