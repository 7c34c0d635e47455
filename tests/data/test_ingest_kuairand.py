"""The shipped KuaiRand spec on the real log, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.data.ingest import ingest
from pipeline.data.logs import Dataset

ROOT = Path(os.environ.get("TREFOIL_KUAIRAND", Path(__file__).parents[3] / "shared/data/kuairand"))
LOG = ROOT / "log_standard_0425_0505.parquet"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not LOG.is_file(), reason=f"the KuaiRand slice is not at {ROOT}; set TREFOIL_KUAIRAND to its folder"
    ),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ingest("kuairand", tmp_path_factory.mktemp("kuairand") / "log", {"root": str(ROOT)})


def read(dataset: Dataset, surface: str) -> pl.DataFrame:
    """Every request of a surface."""
    files = [dataset.root / f.path for p in dataset.partitions(surface) for f in p.files]
    return pl.concat([pl.read_parquet(f, hive_partitioning=False) for f in files])


def test_every_impression_of_the_three_tabs_is_a_request(dataset: Dataset) -> None:
    log = pl.read_parquet(LOG)
    beijing = pl.from_epoch("time_ms", time_unit="ms").dt.offset_by("8h").dt.date()
    log = log.filter(beijing >= pl.date(2022, 4, 25))
    for surface, tab in (("hf", 1), ("sr", 0), ("rp", 4)):
        mine, theirs = read(dataset, surface), log.filter(pl.col("tab") == tab)
        assert len(mine) == len(theirs)
        for task, column in (("click", "is_click"), ("long_view", "long_view")):
            assert mine[task].list.sum().sum() == theirs[column].sum()
        assert mine["item"].list.len().unique().to_list() == [1]
        assert sorted(mine["user_id"]) == sorted(theirs["user_id"])


def test_histories_and_rates_of_some_requests(dataset: Dataset) -> None:
    log = pl.read_parquet(LOG).sort("time_ms")
    before = pl.read_parquet(ROOT / "user_history_before_0425.parquet")
    item = dict(pl.read_parquet(dataset.root / "vocabularies/item.parquet").select("key", "id").iter_rows())
    user, time = log["user_id"].to_numpy(), log["time_ms"].to_numpy()
    for row in read(dataset, "sr").sample(100, seed=1).iter_rows(named=True):
        now = row["timestamp_ms"]
        mine = log[np.flatnonzero((user == row["user_id"]) & (time < now))]
        first = before.filter((pl.col("user_id") == row["user_id"]) & (pl.col("last_time_ms") < now))
        items = first["video_id_seq"].explode().to_list() if len(first) else []
        newest = [item[str(v)] for v in (items + mine["video_id"].to_list())[-50:]]
        assert sorted(row["history_item"]) == sorted(newest)
        assert row["user_count"] == pytest.approx(np.log1p(len(mine)), abs=1e-5)
        if len(mine) == 0:
            assert row["user_rate_click"] == 0.0


def test_causal_features_say_something_and_not_too_much(dataset: Dataset) -> None:
    from sklearn.metrics import roc_auc_score

    rows = read(dataset, "hf").filter(pl.col("user_count") > 0)
    label = rows["click"].list.first().to_numpy()
    auc = roc_auc_score(label, rows["user_rate_click"].to_numpy())
    assert 0.58 < auc < 0.75  # a leak of the row's own label would go far beyond
