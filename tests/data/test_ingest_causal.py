"""Causal label features: hand-computed, equal to plain loops, and blind to the future."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.ingest.describe import causal_features
from pipeline.data.ingest.load import load_spec
from pipeline.data.ingest.rates import ewma
from pipeline.schema import Level
from tests.data.ingest_logs import CAUSAL, DAY, MINUTE, Reckoning, random_log, rows, run, spec_with, write

T = 10_000 * DAY


def spec(**changes: Any) -> dict[str, Any]:
    return spec_with(causal=CAUSAL, **changes)


def test_hand_computed(tmp_path: Path) -> None:
    log = pl.DataFrame(
        {
            "user": [2, 2, 1, 1, 1],
            "item": ["c", "c", "a", "b", "a"],
            "time": [T, T + 1, T + MINUTE, T + 2 * MINUTE, T + 2 * MINUTE + 5000],
            "tab": ["h", "h", "h", "h", "h"],
            "click": [1, 1, 0, 1, 0],
            "long": [0, 0, 0, 0, None],
        }
    )
    last = rows(run(tmp_path, spec(), log))[-1]
    # Base rates of click on h: (2 + 1) / (2 + 2) after the first minute; (2 + 1) / (3 + 2) after the next.
    first_residual, second_residual = 0 - 3 / 4, 1 - 3 / 5
    assert last["u_rate_click"] == pytest.approx((first_residual + second_residual) / (2 + 4))
    assert last["u_ewma_click"] == pytest.approx(0.5 * (0.5 * first_residual) + 0.5 * second_residual)
    assert (last["u_last_click"], last["u_last_long"]) == (1.0, 0.0)
    assert last["u_count"] == pytest.approx(math.log(3))
    assert last["u_recency"] == pytest.approx(math.log(1 + 5))
    assert last["i_rate_click"][0] == pytest.approx(first_residual / (1 + 10))  # item a, once before
    assert last["ua_count"][0] == pytest.approx(math.log(3))  # a and b are of author x
    # Item a has tags 1 and 2, b has tag 2: tag 2 says two events, tag 1 one.
    assert last["ut_count"][0] == pytest.approx(math.log(1 + 3))
    assert last["ut_rate_click"][0] == pytest.approx((2 * first_residual + second_residual) / (3 + 5))
    assert last["session_position"] == pytest.approx(math.log(1 + 2))
    first = rows(run(tmp_path, spec(), log, "again"))[0]
    assert (first["u_rate_click"], first["u_count"], first["u_ewma_click"]) == (0.0, 0.0, 0.0)
    assert (first["u_last_click"], first["u_recency"], first["session_recency"]) == (None, None, None)
    assert (first["ut_rate_click"], first["ut_count"]) == ([None], [None])  # item c has no tag at all


def test_levels(tmp_path: Path) -> None:
    loaded = load_spec(write(tmp_path, spec(), random_log(0, 5)), {"root": str(tmp_path)})
    levels = causal_features(loaded)
    assert levels["us_rate_click"] is Level.REQUEST
    assert levels["i_rate_click"] is Level.CANDIDATE
    assert "is_rate_click" not in levels  # that rate is of one task
    assert "is_rate_long" in levels


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), delay_s=st.sampled_from([0, 0.001, 60, 600, 86_400]))
def test_equal_to_plain_loops(seed: int, delay_s: float) -> None:
    log = random_log(seed, 60)
    reckoning = Reckoning(log, round(delay_s * 1000))
    with TemporaryDirectory() as folder:
        found = rows(run(Path(folder), spec(label_delay_s=delay_s), log))
    names = {1: "a", 2: "b", 3: "c", 4: "d"}
    order = sorted(set(log["item"]), key=lambda i: (log.filter(pl.col("item") == i)["time"].min() // DAY, i))  # type: ignore[operator]
    names = dict(enumerate(order, start=1))
    tab = {"hf": "h", "sr": "s"}
    for row in found:
        now, user, item = row["timestamp_ms"], row["user_id"], names[row["item"][0]]
        cases = [
            ("u", 4.0, reckoning.known(now, user=user)),
            ("us", 5.0, reckoning.known(now, user=user, tab=tab[row["surface"]])),
            ("i", 10.0, reckoning.known(now, item=item)),
        ]
        for name, strength, events in cases:
            assert all(t < now - reckoning.delay for t in row["history_time_ms"])
            for task in ("click", "long"):
                value = row[f"{name}_rate_{task}"]
                value = value[0] if isinstance(value, list) else value
                assert value == pytest.approx(reckoning.rate(events, task, strength), abs=1e-6)
            count = row[f"{name}_count"]
            assert (count[0] if isinstance(count, list) else count) == pytest.approx(math.log1p(len(events)), abs=1e-6)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), delay_s=st.sampled_from([0, 300, 86_400]), cut=st.integers(1, 59))
def test_future_labels_change_no_feature(seed: int, delay_s: float, cut: int) -> None:
    log = random_log(seed, 60).sort("time")
    now = log["time"][cut]
    # Every outcome that is not known at `now` under the delay is turned round.
    future = pl.col("time") >= now - round(delay_s * 1000)
    other = log.with_columns(
        pl.when(future).then(1 - pl.col(c).fill_null(0)).otherwise(pl.col(c)).alias(c) for c in ("click", "long")
    )
    with TemporaryDirectory() as folder:
        first = rows(run(Path(folder) / "a", spec(label_delay_s=delay_s), log))
        second = rows(run(Path(folder) / "b", spec(label_delay_s=delay_s), other))

    def features(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        drop = ("click", "long", "request_id")
        known = [{k: v for k, v in r.items() if k not in drop} for r in found if r["timestamp_ms"] <= now]
        return sorted(known, key=lambda r: (r["timestamp_ms"], r["user_id"], r["surface"], r["item"]))

    assert features(first) == features(second)


def test_long_and_short_groups_are_smoothed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(0)
    values = np.where(g.random(3000) < 0.2, np.nan, g.normal(size=3000))
    start, initial = np.array([0, 700, 703, 1500]), np.array([0.0, 1.0, -1.0, 0.5])
    mixed = ewma(values, start, initial, 0.3)
    monkeypatch.setattr("pipeline.data.ingest.rates._LONG", 10_000)
    assert np.array_equal(ewma(values, start, initial, 0.3), mixed)


def test_buckets_do_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = random_log(5, 300, users=20)
    whole = rows(run(tmp_path, spec(), log))
    monkeypatch.setattr("pipeline.data.ingest.run.bucket_count", lambda *_: 7)
    assert rows(run(tmp_path, spec(), log, "cut")) == whole


def test_similar_items_outcomes_weigh_in(tmp_path: Path) -> None:
    earlier = {"files": ["${root}/before.parquet"], "user": "user", "items": "items", "last_time": "last"}
    tmp_path.mkdir(exist_ok=True)
    # a and b are always seen together, and so are c and d.
    lists = [["a", "b"]] * 6 + [["c", "d"]] * 5
    before = {"user": list(range(100, 111)), "items": lists, "last": [T - 1] * 11}
    pl.DataFrame(before).write_parquet(tmp_path / "before.parquet")
    others = pl.DataFrame(
        {"user": list(range(100, 111)), "item": ["a"] * 11, "time": T - 2 * DAY, "tab": "z", "click": 0, "long": 0}
    )
    log = pl.DataFrame(
        {
            "user": [1, 1, 1],
            "item": ["a", "b", "c"],
            "time": [T, T + MINUTE, T + 2 * MINUTE],
            "tab": ["h", "h", "h"],
            "click": [1, 1, 1],
            "long": [0, 0, 0],
        }
    )
    log = pl.concat([others.select(log.columns).cast(log.schema), log])  # type: ignore[arg-type]
    causal = {"similarity": {"dimension": 2, "strength": 1.0, "tasks": ["click"]}}
    spec_ = spec_with(causal=causal, history={**spec_with()["history"], "earlier": earlier})
    found = rows(run(tmp_path, spec_, log))
    residual = 1 - 0.5  # nothing of surface h was known at the first click
    assert [r["similar_rate_click"][0] for r in found] == pytest.approx([0.0, residual / 2, 0.0], abs=1e-5)
    assert found[1]["similar_weight"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[2]["similar_affinity"][0] == pytest.approx(0.0, abs=1e-5)
