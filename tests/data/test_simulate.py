"""The simulated log itself: bytes, columns, histories, labels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.data.logs import Dataset, arrow_schema
from pipeline.data.simulate import TASKS, SimulationConfig, oracle_figures, simulate
from pipeline.errors import DataError

DAY_MS = 86_400_000


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def rows(dataset: Dataset, surface: str) -> pl.DataFrame:
    paths = [dataset.root / f.path for p in dataset.partitions(surface) for f in p.files]
    return pl.concat([pl.read_parquet(p, hive_partitioning=False) for p in paths])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Enough for statistics: 4 000 requests, no warm-up, so that every history can be rebuilt from the log."""
    config = SimulationConfig(
        requests=4_000, days=4, users=300, items=200, advertisers=24, warmup_days=0, bucket_mb=1, label_delay_s=600
    )
    assert config.buckets > 1
    return simulate(tmp_path_factory.mktemp("simulated") / "log", config)


def test_same_seed_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    simulate(tmp_path / "a", SimulationConfig.tiny())
    threads = pa.cpu_count()
    pa.set_cpu_count(1)
    try:
        simulate(tmp_path / "b", SimulationConfig.tiny())
    finally:
        pa.set_cpu_count(threads)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_another_seed_gives_another_log(tmp_path: Path) -> None:
    a = simulate(tmp_path / "a", SimulationConfig.tiny(seed=0))
    b = simulate(tmp_path / "b", SimulationConfig.tiny(seed=1))
    assert a.fingerprint != b.fingerprint
    assert rows(a, "hf")["timestamp_ms"].to_list() != rows(b, "hf")["timestamp_ms"].to_list()


def test_a_folder_with_a_log_is_refused(tmp_path: Path) -> None:
    simulate(tmp_path, SimulationConfig.tiny())
    with pytest.raises(DataError, match="already holds a log"):
        simulate(tmp_path, SimulationConfig.tiny())


def test_requests_are_met_exactly_and_progress_ends_at_them(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    dataset = simulate(tmp_path, SimulationConfig.tiny(), progress=lambda done, total, what: seen.append((done, total)))
    assert sum(p.requests for p in dataset.description.partitions) == 300
    assert seen[-1] == (300, 300)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_request_ids_are_unique_and_rows_in_time_order(log: Dataset) -> None:
    ids = np.concatenate([rows(log, s)["request_id"].to_numpy() for s in log.schema.surfaces])
    assert np.unique(ids).size == ids.size == 4_000
    for surface in log.schema.surfaces:
        for partition in log.partitions(surface):
            for file in partition.files:
                frame = pl.read_parquet(log.root / file.path, hive_partitioning=False)
                assert frame["timestamp_ms"].is_sorted()
                days = pl.from_epoch(frame["timestamp_ms"], time_unit="ms").dt.date().cast(pl.String).unique()
                assert days.to_list() == [partition.date]


def test_features_lie_only_on_their_surface(log: Dataset) -> None:
    columns = {s: set(arrow_schema(log.schema, s).names) for s in log.schema.surfaces}
    assert columns["sr"] - columns["hf"] == {"query", "match_score"}
    assert columns["rp"] - columns["hf"] == {"related_item"}
    assert columns["hf"] == columns["sr"] & columns["rp"]
    assert 18 <= len(log.schema.features) <= 24
    assert rows(log, "sr")["query"].list.len().min() == 1
    assert rows(log, "rp")["related_item"].null_count() == 0


def test_some_values_are_absent_and_most_are_there(log: Dataset) -> None:
    frame = rows(log, "hf")
    for absent in (frame["age_bucket"], frame["price"].explode()):
        assert 0.02 < absent.null_count() / absent.len() < 0.25
    assert frame["hours_since_last"].null_count() > 0
    assert frame["country"].null_count() == 0


def test_histories_are_exactly_the_known_past(log: Dataset) -> None:
    """Rebuilt from the log's own impressions by brute force, label delay and limits included."""
    past: dict[int, list[tuple[int, int, int, int]]] = {}
    for index, surface in enumerate(log.schema.surfaces):
        for row in rows(log, surface).select("user_id", "timestamp_ms", "item", *TASKS).iter_rows():
            user, time, items, *labels = row
            for item, *outcome in zip(items, *labels, strict=True):
                action = 1 + sum(2**t for t, y in enumerate(outcome) if y)
                past.setdefault(user, []).append((time, item, action, 1 + index))
    for events in past.values():
        events.sort(key=lambda e: e[0])
    full = 0
    for surface, limit in (("hf", 48), ("sr", 40), ("rp", 64)):
        for row in rows(log, surface).iter_rows(named=True):
            known = [e for e in past[row["user_id"]] if e[0] < row["timestamp_ms"] - 600_000][-limit:]
            history = ("history_time_ms", "history_item", "history_action", "history_surface")
            assert list(zip(*(row[c] for c in history), strict=True)) == known
            full += len(known) == limit
    assert full > 100


def test_long_clicks_are_observed_exactly_where_clicked(log: Dataset) -> None:
    for surface in log.schema.surfaces:
        frame = rows(log, surface).select(TASKS).explode(TASKS)
        assert frame["click"].null_count() == frame["save"].null_count() == frame["hide"].null_count() == 0
        assert (frame["long_click"].is_null() == (frame["click"] == 0)).all()
        assert frame.filter((pl.col("click") == 1) & (pl.col("hide") == 1)).is_empty()
        assert set(frame["click"].unique()) == {0.0, 1.0}


def test_unknown_users_and_new_ads_appear_each_day(log: Dataset) -> None:
    days = []
    for surface in log.schema.surfaces:
        frame = rows(log, surface).select("user_id", "item", "ad_age_days", day=pl.col("timestamp_ms") // DAY_MS)
        days.append(frame)
    frame = pl.concat(days)
    for day in sorted(frame["day"].unique())[1:]:
        now, before = frame.filter(pl.col("day") == day), frame.filter(pl.col("day") < day)
        assert set(now["user_id"]) - set(before["user_id"])
        ads, old = now["item"].explode(), before["item"].explode()
        assert set(ads) - set(old)
        assert now["ad_age_days"].explode().min() == 0


def test_popularity_is_skewed(log: Dataset) -> None:
    counts = rows(log, "hf")["item"].explode().value_counts()["count"].sort(descending=True)
    assert counts[:20].sum() > 3 * counts[-20:].sum()


def test_truth_is_calibrated(log: Dataset) -> None:
    """Rates match the mean truth within four binomial standard errors, for every surface and task."""
    for tasks in oracle_figures(log).values():
        assert set(tasks) == set(TASKS)
        for f in tasks.values():
            error = (f.mean_truth * (1 - f.mean_truth) / f.impressions) ** 0.5
            assert abs(f.rate - f.mean_truth) < 4 * error
            assert 0.6 < f.auc < 0.95


def test_volumes_and_lengths_are_ordered_as_told(log: Dataset) -> None:
    requests = {s: sum(p.requests for p in log.partitions(s)) for s in log.schema.surfaces}
    assert requests["hf"] > requests["sr"] > requests["rp"]
    shares = np.array([requests[s] for s in ("hf", "sr", "rp")]) / 4_000
    np.testing.assert_allclose(shares, [0.62, 0.27, 0.11], atol=0.05)
    candidates = {s: rows(log, s)["item"].list.len().mean() for s in log.schema.surfaces}
    assert candidates == pytest.approx({"hf": 4, "sr": 5, "rp": 10}, rel=0.05)
    longest = {s: rows(log, s)["history_item"].list.len().max() for s in log.schema.surfaces}
    assert longest == {"hf": 48, "sr": 40, "rp": 64}
